//! What the kernel has told: its SAs, oldest first, and where each stands on its way into the dataplane.
//!
//! Keys stay here as long as the kernel has their SA, for another installation under another address, and are wiped then.

use super::{
    charon::ChildId,
    notice::SaProblem,
    numbers::KeyName,
    settings::{Database, ImportSettings},
};
use crate::{
    vici::ChildSa,
    xfrm::{SaKey, XfrmCipher, XfrmMode, XfrmSa},
};
use esplane_api::{
    Direction, KeyMaterial, Lifetime, Limits, OuterPath, PathError, SequenceStart, TunnelId,
    UdpEncap,
};
use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// An SA's number here: those seen earlier have lower ones.
pub(super) type Serial = u64;

/// The SAs of the kernel's database.
#[derive(Default)]
pub(super) struct Kernel {
    by_key: HashMap<SaKey, Serial>,
    sas: BTreeMap<Serial, Sa>,
    last: Serial,
}

/// One SA.
pub(super) struct Sa {
    pub fact: XfrmSa,
    /// Its key's name; `None` while it has none that can be used.
    pub name: Option<KeyName>,
    /// Which way it goes, once that is known.
    pub direction: Option<Direction>,
    /// charon's number of its CHILD_SA, once that is known.
    pub child: Option<ChildId>,
    /// The tunnel it belongs to, once that is known.
    pub tunnel: Option<TunnelId>,
    /// Why it cannot be imported.
    pub problem: Option<SaProblem>,
    /// Whether the operator knows of the problem.
    pub problem_told: bool,
    /// Outbound: where it stands with its numbers.
    pub outbound: OutboundStage,
    /// How often the kernel has not stored its numbers.
    pub store_failures: u32,
    /// What was last stored of what it carried: packets, bytes, number.
    pub stored: (u64, u64, u64),
    /// When that was.
    pub stored_at: Option<Duration>,
    /// When charon was last told that a limit is reached: soft, hard.
    pub limit_told: [Option<Duration>; 2],
}

/// Where an outbound SA stands with its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum OutboundStage {
    /// No numbers yet.
    New,
    /// A Store is under way, since then.
    Reserving {
        start: SequenceStart,
        since: Duration,
    },
    /// These are stored and not used: it can be installed, at this path.
    Ready { start: SequenceStart },
    /// It is installed, at the path it had then.
    Installed { path: OuterPath },
    /// It is installed, and a Store of further numbers is under way.
    Extending {
        path: OuterPath,
        until: u64,
        since: Duration,
    },
    /// Nobody knows its numbers, or none are left; charon was last asked for a successor then.
    Unusable { asked: Option<Duration> },
}

impl Kernel {
    /// Adds an SA.
    pub fn insert(&mut self, fact: XfrmSa, name: Option<KeyName>) -> Serial {
        self.last += 1;
        self.by_key.insert(fact.key, self.last);
        let stored = (fact.packets, fact.bytes, fact.sequence_received);
        let sa = Sa {
            direction: fact.direction,
            fact,
            name,
            child: None,
            tunnel: None,
            problem: None,
            problem_told: false,
            outbound: OutboundStage::New,
            store_failures: 0,
            stored,
            stored_at: None,
            limit_told: [None; 2],
        };
        self.sas.insert(self.last, sa);
        self.last
    }

    pub fn remove(&mut self, key: &SaKey) -> Option<(Serial, Sa)> {
        let serial = self.by_key.remove(key)?;
        Some((serial, self.sas.remove(&serial)?))
    }

    pub fn serial(&self, key: &SaKey) -> Option<Serial> {
        self.by_key.get(key).copied()
    }

    pub fn get(&self, serial: Serial) -> Option<&Sa> {
        self.sas.get(&serial)
    }

    pub fn get_mut(&mut self, serial: Serial) -> Option<&mut Sa> {
        self.sas.get_mut(&serial)
    }

    pub fn keys(&self) -> Vec<SaKey> {
        self.by_key.keys().copied().collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Serial, &Sa)> {
        self.sas.iter().map(|(serial, sa)| (*serial, sa))
    }
}

impl Sa {
    /// Its key, if it has one that can be used.
    pub fn key(&self) -> Option<&KeyMaterial> {
        match &self.fact.cipher {
            XfrmCipher::Aead(key) => Some(key),
            XfrmCipher::Larval | XfrmCipher::Concealed(_) | XfrmCipher::Unsupported(_) => None,
        }
    }

    /// Whether only an SPI is reserved so far.
    pub fn is_larval(&self) -> bool {
        matches!(self.fact.cipher, XfrmCipher::Larval)
    }

    /// Where its packets come from and go to; port 0 without UDP.
    pub fn socket_ends(&self) -> (SocketAddr, SocketAddr) {
        let encap = self.fact.encap;
        let source_port = encap.map_or(0, |encap| encap.source_port);
        let destination_port = encap.map_or(0, |encap| encap.destination_port);
        (
            SocketAddr::new(self.fact.source, source_port),
            SocketAddr::new(self.fact.key.destination, destination_port),
        )
    }

    /// Our address and the peer's.
    pub fn ends(&self, direction: Direction) -> (IpAddr, IpAddr) {
        match direction {
            Direction::Inbound => (self.fact.key.destination, self.fact.source),
            Direction::Outbound => (self.fact.source, self.fact.key.destination),
        }
    }

    /// Where its packets travel, as charon has it.
    pub fn path(&self) -> Result<OuterPath, PathError> {
        let direction = self.direction.unwrap_or(Direction::Outbound);
        let (local, remote) = self.ends(direction);
        let encap = self.fact.encap.map(|encap| match direction {
            Direction::Inbound => UdpEncap {
                local_port: encap.destination_port,
                remote_port: encap.source_port,
            },
            Direction::Outbound => UdpEncap {
                local_port: encap.source_port,
                remote_port: encap.destination_port,
            },
        });
        OuterPath::new(local, remote, encap)
    }

    /// What keeps it from being imported, as far as it alone and its child tell.
    pub fn find_problem(
        &self,
        settings: &ImportSettings,
        child: Option<&ChildSa>,
    ) -> Option<SaProblem> {
        let unlike = |text: &str, wanted: &str| !text.is_empty() && text != wanted;
        if let Some(child) = child {
            if unlike(&child.protocol, "ESP") {
                return Some(SaProblem::Protocol(child.protocol.clone()));
            }
            if unlike(&child.mode, "TUNNEL") {
                return Some(SaProblem::Mode(child.mode.to_lowercase()));
            }
        }
        match (self.fact.mode, child) {
            (XfrmMode::Tunnel, _) => {}
            (XfrmMode::Transport, Some(_)) => return Some(SaProblem::IpComp),
            (XfrmMode::Transport, None) => return Some(SaProblem::Mode("transport".into())),
            (XfrmMode::Other(number), _) => {
                return Some(SaProblem::Mode(format!("XFRM {number}")));
            }
        }
        match &self.fact.cipher {
            XfrmCipher::Unsupported(names) => return Some(SaProblem::Unsupported(names.clone())),
            XfrmCipher::Concealed(suite) => return Some(SaProblem::Concealed(*suite)),
            XfrmCipher::Larval | XfrmCipher::Aead(_) => {}
        }
        if let Database::Kernel { inert } = settings.database
            && self.fact.mark != Some(inert)
        {
            return Some(SaProblem::NotInert(inert.value));
        }
        self.path().err().map(SaProblem::Path)
    }

    /// The limits in bytes and packets that are left. Those in seconds are the kernel's own: its timer runs.
    pub fn lifetime(&self, carried: (u64, u64)) -> Lifetime {
        let left = |limit: Option<u64>, carried: u64| {
            limit.map(|limit| limit.saturating_sub(carried).max(1))
        };
        let rest = |limits: Limits| Limits {
            packets: left(limits.packets, carried.0),
            bytes: left(limits.bytes, carried.1),
            seconds: None,
        };
        let (mut soft, hard) = (rest(self.fact.soft), rest(self.fact.hard));
        let clamp = |soft: Option<u64>, hard: Option<u64>| match (soft, hard) {
            (Some(soft), Some(hard)) => Some(soft.min(hard)),
            (soft, _) => soft,
        };
        soft.packets = clamp(soft.packets, hard.packets);
        soft.bytes = clamp(soft.bytes, hard.bytes);
        Lifetime::new(soft, hard).unwrap_or(Lifetime::UNLIMITED)
    }
}
