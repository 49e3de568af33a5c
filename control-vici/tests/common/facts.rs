//! What charon has negotiated, in the words of VICI and of XFRM.

use super::*;

/// One negotiated pair of SAs; numbered, so that SPIs and keys differ.
#[derive(Clone, Debug)]
pub struct Negotiated {
    pub number: u32,
    /// charon's number of it.
    pub unique_id: u32,
    pub esn: bool,
    pub suite: AeadSuite,
    pub reqid: u32,
    pub connection: &'static str,
    pub child: &'static str,
    pub ike: u32,
    /// Networks of west and of east.
    pub networks: (Vec<&'static str>, Vec<&'static str>),
    pub udp: bool,
}

impl Negotiated {
    pub fn new(number: u32) -> Self {
        Self {
            number,
            unique_id: number,
            esn: true,
            suite: AeadSuite::Aes128Gcm16,
            reqid: 1,
            connection: "site",
            child: "net",
            ike: 1,
            networks: (vec!["10.1.0.0/16"], vec!["10.2.0.0/16"]),
            udp: false,
        }
    }

    pub(super) fn spi_towards(&self, side: Side) -> Spi {
        let base = match side {
            Side::West => 0xc000_1000,
            Side::East => 0xc000_e000,
        };
        Spi::new(base + self.number).unwrap()
    }

    pub(super) fn key_towards(&self, side: Side) -> KeyMaterial {
        let seed = self.number as u8 * 2 + u8::from(side == Side::West) + 1;
        let bytes = vec![seed; self.suite.keying_material_bytes()];
        KeyMaterial::new(self.suite, &bytes).unwrap()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    West,
    East,
}

impl Side {
    pub fn other(self) -> Self {
        match self {
            Self::West => Self::East,
            Self::East => Self::West,
        }
    }
}

impl End {
    pub fn sa(&self, of: &Negotiated, direction: Direction) -> XfrmSa {
        let towards = match direction {
            Direction::Inbound => self.side,
            Direction::Outbound => self.side.other(),
        };
        let (source, destination) = match direction {
            Direction::Inbound => (self.peer, self.address),
            Direction::Outbound => (self.address, self.peer),
        };
        let mark = ImportSettings::MARK;
        XfrmSa {
            key: SaKey {
                destination,
                spi: of.spi_towards(towards),
                mark: (mark.value, mark.mask),
            },
            source,
            reqid: of.reqid,
            mode: XfrmMode::Tunnel,
            mark: Some(mark),
            if_id: None,
            direction: None,
            cipher: XfrmCipher::Aead(of.key_towards(towards)),
            esn: of.esn,
            window_packets: 32,
            encap: of.udp.then_some(XfrmEncap {
                source_port: 4500,
                destination_port: 4500,
            }),
            soft: Limits::NONE,
            hard: Limits::NONE,
            sequence_sent: 0,
            sequence_received: 0,
            packets: 0,
            bytes: 0,
            added_unix_seconds: 1_700_000_000 + u64::from(of.number),
        }
    }

    pub fn child(&self, of: &Negotiated) -> ChildSa {
        let parse = |texts: &[&str]| -> Vec<TrafficSelector> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        let (west, east) = (parse(&of.networks.0), parse(&of.networks.1));
        let (local_ts, remote_ts) = match self.side {
            Side::West => (west, east),
            Side::East => (east, west),
        };
        let mark = Some(ImportSettings::MARK);
        ChildSa {
            name: of.child.into(),
            unique_id: of.unique_id,
            reqid: of.reqid,
            state: ChildState::Installed,
            mode: "TUNNEL".into(),
            protocol: "ESP".into(),
            udp_encap: of.udp,
            spi_in: Some(of.spi_towards(self.side)),
            spi_out: Some(of.spi_towards(self.side.other())),
            mark_in: mark,
            mark_out: mark,
            if_ids: (None, None),
            algorithm: "AES_GCM_16-128".into(),
            esn: of.esn,
            local_ts,
            remote_ts,
            unsupported_ts: Vec::new(),
            rekey_in: None,
            expires_in: None,
        }
    }

    pub fn ike(&self, of: &Negotiated, children: Vec<ChildSa>) -> IkeSa {
        let port = if of.udp { 4500 } else { 500 };
        IkeSa {
            name: of.connection.into(),
            unique_id: of.ike,
            state: "ESTABLISHED".into(),
            local: Some(SocketAddr::new(self.address, port)),
            remote: Some(SocketAddr::new(self.peer, port)),
            local_id: format!("{:?}", self.side),
            remote_id: format!("{:?}", self.side.other()),
            nat_local: false,
            nat_remote: of.udp,
            children,
        }
    }
}
