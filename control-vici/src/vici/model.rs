//! What charon tells over VICI, in Rust's words. Field names follow `swanctl --list-sas --raw`.

use super::SelectorTextError;
use esplane_api::{SelectorPair, Spi, TrafficSelector};
use std::{net::SocketAddr, time::Duration};

/// A mark with its mask, as `mark_in` and `mark_out` of swanctl.conf: `0x00dead00/0xffffffff`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// What a packet's mark must be, under the mask.
    pub value: u32,
    /// Which bits count.
    pub mask: u32,
}

/// One IKE_SA with its CHILD_SAs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IkeSa {
    /// The connection's name in swanctl.conf; `(unnamed)` where charon has none yet.
    pub name: String,
    /// charon's number; a rekeyed IKE_SA has another.
    pub unique_id: u32,
    /// `ESTABLISHED`, `REKEYING`, …
    pub state: String,
    /// Our end, with the IKE port in use: 500, or 4500 behind NAT.
    pub local: Option<SocketAddr>,
    /// The peer's end.
    pub remote: Option<SocketAddr>,
    /// Our identity.
    pub local_id: String,
    /// The peer's identity.
    pub remote_id: String,
    /// Whether we are behind a NAT.
    pub nat_local: bool,
    /// Whether the peer is behind a NAT.
    pub nat_remote: bool,
    /// Its CHILD_SAs, those being replaced included.
    pub children: Vec<ChildSa>,
}

/// One CHILD_SA: a pair of ESP SAs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSa {
    /// The child's name in swanctl.conf.
    pub name: String,
    /// charon's number; a rekeyed CHILD_SA has another.
    pub unique_id: u32,
    /// The kernel's reqid; a rekeyed CHILD_SA keeps it.
    pub reqid: u32,
    /// Where it is in its life.
    pub state: ChildState,
    /// `TUNNEL`, `TRANSPORT`, `BEET`.
    pub mode: String,
    /// `ESP` or `AH`.
    pub protocol: String,
    /// Whether ESP travels in UDP.
    pub udp_encap: bool,
    /// What we receive with.
    pub spi_in: Option<Spi>,
    /// What the peer receives with.
    pub spi_out: Option<Spi>,
    /// `mark_in`.
    pub mark_in: Option<Mark>,
    /// `mark_out`.
    pub mark_out: Option<Mark>,
    /// `if_id_in`, `if_id_out`.
    pub if_ids: (Option<u32>, Option<u32>),
    /// As charon prints it: `AES_GCM_16-256`, `CHACHA20_POLY1305-256`, `AES_CBC-128/HMAC_SHA2_256_128`.
    pub algorithm: String,
    /// Whether it was negotiated with extended sequence numbers.
    pub esn: bool,
    /// Our networks.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer's networks.
    pub remote_ts: Vec<TrafficSelector>,
    /// What of the two Esplane cannot hold traffic to, such as ICMP types; in neither of them.
    pub unsupported_ts: Vec<SelectorTextError>,
    /// Until charon rekeys it.
    pub rekey_in: Option<Duration>,
    /// Until charon ends it.
    pub expires_in: Option<Duration>,
}

impl ChildSa {
    /// Every pair of a local and a remote selector of one family.
    pub fn selectors(&self) -> Vec<SelectorPair> {
        pairs(&self.local_ts, &self.remote_ts)
    }
}

fn pairs(local: &[TrafficSelector], remote: &[TrafficSelector]) -> Vec<SelectorPair> {
    let all = local.iter().flat_map(|local| {
        remote.iter().map(|remote| SelectorPair {
            local: *local,
            remote: *remote,
        })
    });
    all.filter(|pair| pair.local.first().is_ipv4() == pair.remote.first().is_ipv4())
        .collect()
}

/// A CHILD_SA's state, as `swanctl --list-sas` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChildState {
    /// Not yet negotiated (`CREATED`, `ROUTED`, `INSTALLING`).
    Coming,
    /// In use (`INSTALLED`, `UPDATING`).
    Installed,
    /// Being replaced (`REKEYING`, `REKEYED`).
    Replaced,
    /// On its way out (`RETRYING`, `DELETING`, `DELETED`, `DESTROYING`), and what a newer charon may say besides.
    Leaving,
}

/// One connection as it is loaded from swanctl.conf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Its name.
    pub name: String,
    /// `IKEv1`, `IKEv2`, `IKEv1/2`.
    pub version: String,
    /// Where it may be negotiated from: addresses, networks, names, `%any`.
    pub local_addrs: Vec<String>,
    /// Whom with.
    pub remote_addrs: Vec<String>,
    /// Its children.
    pub children: Vec<ConnectionChild>,
}

/// One child of a loaded connection (`list-conns`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionChild {
    /// Its name.
    pub name: String,
    /// `TUNNEL`, `TRANSPORT`, `BEET`, `PASS`, `DROP`.
    pub mode: String,
    /// Our networks; texts, since `dynamic` is one.
    pub local_ts: Vec<String>,
    /// The peer's networks.
    pub remote_ts: Vec<String>,
    /// `rekey_time`; `None` where charon does not tell.
    pub rekey_time: Option<Duration>,
}

/// A child that charon negotiates when packets ask for it (`start_action = trap`; `list-policies` with `trap`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trap {
    /// The connection's name.
    pub ike: String,
    /// The child's name.
    pub child: String,
    /// `TUNNEL`, `TRANSPORT`, `BEET`.
    pub mode: String,
    /// Our networks.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer's networks.
    pub remote_ts: Vec<TrafficSelector>,
}

/// Which charon it is (`version`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CharonVersion {
    /// `charon`, `charon-systemd`.
    pub daemon: String,
    /// Such as `5.9.8`.
    pub version: String,
    /// The kernel's release.
    pub release: String,
}

/// How charon is (`stats`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CharonStats {
    /// How long it has run, in charon's words.
    pub running: String,
    /// How many IKE_SAs there are.
    pub ike_sas: u32,
    /// Those not yet authenticated.
    pub half_open: u32,
    /// What it has loaded; `kernel-netlink` is the one that hands keys to the kernel.
    pub plugins: Vec<String>,
}

impl Trap {
    /// Every pair of a local and a remote selector of one family.
    pub fn selectors(&self) -> Vec<SelectorPair> {
        pairs(&self.local_ts, &self.remote_ts)
    }
}

/// What charon tells.
#[expect(clippy::large_enum_variant, reason = "a few of them each negotiation")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViciEvent {
    /// Everything there is now, after connecting or after a gap: replaces all that was known.
    Snapshot(Vec<IkeSa>),
    /// A CHILD_SA of this IKE_SA came up or went (`child-updown`). The IKE_SA holds only that child, whose state still
    /// says `INSTALLED` where it goes with its IKE_SA.
    ChildUpDown {
        /// Whether it came.
        up: bool,
        /// Its IKE_SA.
        ike: IkeSa,
    },
    /// A CHILD_SA was replaced (`child-rekey`). May come before or after the XFRM messages.
    ChildRekey {
        /// Its IKE_SA, without children.
        ike: IkeSa,
        /// What was replaced.
        old: ChildSa,
        /// By what.
        new: ChildSa,
    },
    /// An IKE_SA came up or went (`ike-updown`).
    IkeUpDown {
        /// Whether it came.
        up: bool,
        /// The IKE_SA.
        ike: IkeSa,
    },
    /// An IKE_SA was replaced (`ike-rekey`); its CHILD_SAs moved to the new one, unchanged.
    IkeRekey {
        /// What was replaced.
        old: IkeSa,
        /// By what.
        new: IkeSa,
    },
    /// An IKE_SA's addresses changed (`ike-update`, MOBIKE).
    IkeUpdate(IkeSa),
    /// The children that packets ask for, all of them: after connecting, and when they have changed. No
    /// event tells of a change, so the client looks every few seconds.
    Traps(Vec<Trap>),
    /// What became of [`ViciRequest::Initiate`], as soon as charon knows: up, refused, or no answer from the peer.
    InitiateEnded {
        /// The connection's name.
        ike: String,
        /// The child's name.
        child: String,
        /// Whether it is up.
        done: bool,
    },
    /// The connection to charon is gone. SAs live on: the kernel's database says which.
    Lost,
}

/// What charon can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViciRequest {
    /// Replace this CHILD_SA by a fresh one (`rekey`, `child-id`).
    RekeyChild {
        /// charon's number of it.
        unique_id: u32,
    },
    /// Negotiate this child (`initiate`). The client goes on meanwhile, and tells the outcome by
    /// [`ViciEvent::InitiateEnded`]; charon may take minutes.
    Initiate {
        /// The connection's name.
        ike: String,
        /// The child's name.
        child: String,
    },
    /// End this CHILD_SA (`terminate`, `child-id`).
    TerminateChild {
        /// charon's number of it.
        unique_id: u32,
    },
}
