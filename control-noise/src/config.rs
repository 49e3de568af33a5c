//! What the engine is told: about this node, and about each peer. All of it is checked as a whole
//! before any of it counts.

use crate::{PresharedKey, PublicKey, StaticSecretKey, wire::MOST_SAS};
use esplane_api::{AeadSuite, DfPolicy, Esn, SelectorPair, Spi, TunnelId, WindowSize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};
use zeroize::Zeroize;

/// This node.
#[derive(Clone)]
pub struct NodeConfig {
    /// Who we are. Wiped on drop.
    pub private_key: StaticSecretKey,
    /// Our UDP port for handshakes and ESP alike; usually 4500.
    pub listen_port: u16,
    /// Our outer address; `None` leaves the choice to the kernel's routing.
    pub local: Option<IpAddr>,
    /// 32 bytes from the operating system's random source: all randomness of the engine comes from
    /// them. Never the same twice outside of tests.
    pub seed: [u8; 32],
    /// UDP ports of ours from which the workers from 1 on send with SAs that are theirs alone
    /// ([`PeerConfig::parallel_sas`]), in this order; those for whom there is none send from `listen_port`.
    pub worker_ports: Vec<u16>,
    /// Inbound SPIs that are taken already, by static SAs.
    pub reserved_spis: Vec<Spi>,
    /// When to ask strangers for a cookie, and what to refuse altogether.
    pub under_load: LoadPolicy,
}

/// How many handshake initiations the node works on. All are per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadPolicy {
    /// More initiations than this a second, over all sources, and every one of them needs a cookie.
    pub cookies_above: u32,
    /// At most this many initiations a second are answered at all, cookie replies included.
    pub at_most: u32,
    /// Initiations a second from one source (an IPv4 address or IPv6 /64).
    pub per_source: u32,
    /// Initiations that one source may send at once after a pause.
    pub per_source_burst: u32,
}

impl Default for LoadPolicy {
    fn default() -> Self {
        Self {
            cookies_above: 100,
            at_most: 2_000,
            per_source: 10,
            per_source_burst: 20,
        }
    }
}

/// One peer and the tunnel to it.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// The tunnel's number.
    pub id: TunnelId,
    /// Its name for people.
    pub name: String,
    /// Who the peer is.
    pub public_key: PublicKey,
    /// A secret shared with this peer alone.
    pub psk: Option<PresharedKey>,
    /// Where to reach it first; `None`: it will come to us. See also [`crate::Engine::set_endpoint`].
    pub endpoint: Option<SocketAddr>,
    /// Which packets belong into the tunnel.
    pub selectors: Vec<SelectorPair>,
    /// AEADs that may be used, best first.
    pub suites: Vec<AeadSuite>,
    /// Width of sequence numbers; must be the same on both ends.
    pub esn: Esn,
    /// Our replay window.
    pub window: WindowSize,
    /// SAs each way, one for each worker that sends (RFC 9611): so many may the peer send with, and so many of the peer's
    /// do we use. 1 to 16; need not be the same on both ends.
    pub parallel_sas: u8,
    /// The Don't Fragment bit of outer IPv4 headers.
    pub df: DfPolicy,
    /// The post-quantum half of the handshake; must be the same on both ends.
    pub kem: KemPolicy,
    /// When to start the first handshake.
    pub initiate: Initiate,
    /// When to replace the SAs.
    pub rekey: RekeyPolicy,
    /// Send something at least this often, so that NATs and firewalls keep the way open: an
    /// authenticated ESP dummy packet.
    pub keepalive_seconds: Option<u16>,
    /// After this long of sending without an answer, ask by a handshake whether the peer lives;
    /// `None`: never. Both ends should have the same.
    pub dead_after_seconds: Option<u16>,
}

impl PeerConfig {
    /// A peer with every setting at its default.
    pub fn new(id: TunnelId, name: impl Into<String>, public_key: PublicKey) -> Self {
        Self {
            id,
            name: name.into(),
            public_key,
            psk: None,
            endpoint: None,
            selectors: Vec::new(),
            suites: AeadSuite::ALL.to_vec(),
            esn: Esn::On,
            window: WindowSize::DEFAULT,
            parallel_sas: 1,
            df: DfPolicy::default(),
            kem: KemPolicy::default(),
            initiate: Initiate::default(),
            rekey: RekeyPolicy::default(),
            keepalive_seconds: None,
            dead_after_seconds: Some(15),
        }
    }
}

/// The post-quantum half of a handshake. There is no "prefer": both ends are configured alike, so
/// nobody in between can talk them down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KemPolicy {
    /// ML-KEM-768 (FIPS 203, category 3). Its first message fits an MTU of 1500, not of 1280.
    #[default]
    MlKem768,
    /// ML-KEM-512 (FIPS 203, category 1), where handshakes must fit an MTU of 1280.
    MlKem512,
    /// None: X25519 alone, and a pre-shared key if there is one.
    Off,
}

impl KemPolicy {
    /// The name in configuration and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MlKem768 => "ml-kem-768",
            Self::MlKem512 => "ml-kem-512",
            Self::Off => "off",
        }
    }
}

impl fmt::Display for KemPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// When the first handshake with a peer starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initiate {
    /// With the first packet for it.
    #[default]
    OnDemand,
    /// As soon as the peer is known, and again for as long as it takes.
    AtStart,
}

/// When SAs are replaced; whichever limit comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RekeyPolicy {
    /// Seconds, minus up to a tenth at random so that many tunnels do not rekey at once.
    pub seconds: u32,
    /// Inner bytes in one direction.
    pub bytes: Option<u64>,
    /// Packets in one direction.
    pub packets: Option<u64>,
}

impl Default for RekeyPolicy {
    /// Ten minutes; or 16 TiB or 2^36 packets, far below what AES-GCM bears under one key.
    fn default() -> Self {
        Self {
            seconds: 600,
            bytes: Some(1 << 44),
            packets: Some(1 << 36),
        }
    }
}

/// What is wrong with a configuration, and whose. Nothing has changed when this is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// ESP in UDP and handshakes need a port.
    #[error("listen port 0 cannot be used; 4500 is the usual one (RFC 3948)")]
    ListenPort,
    /// Rates of zero would refuse every peer.
    #[error("load policy: {0} is 0, so no peer could ever connect; use at least 1")]
    LoadPolicy(&'static str),
    /// Two peers with one number.
    #[error("peers `{first}` and `{second}` both have the tunnel number {id}; each needs its own")]
    DuplicateId {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// What they share.
        id: TunnelId,
    },
    /// Two peers with one name.
    #[error("two peers are called `{0}`; each needs its own name")]
    DuplicateName(String),
    /// Two peers with one key: nobody could tell them apart.
    #[error(
        "peers `{first}` and `{second}` have the same public key {key}; each machine needs a key of its own"
    )]
    DuplicateKey {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// What they share.
        key: PublicKey,
    },
    /// We are no peer of ours.
    #[error(
        "peer `{0}` has this node's own public key; give it the public key of the other machine"
    )]
    OwnKey(String),
    /// Two tunnels for the same packets.
    #[error("peers `{first}` and `{second}` both claim {selectors}; a packet can go one way only")]
    SameSelectors {
        /// One.
        first: String,
        /// The other (or the same).
        second: String,
        /// What they share.
        selectors: String,
    },
    /// A tunnel that nothing may enter.
    #[error(
        "peer `{0}` has no routes, so its tunnel could carry nothing; name the networks behind it"
    )]
    NoSelectors(String),
    /// Nothing to encrypt with.
    #[error(
        "peer `{0}` has no suite; list at least one of aes128gcm16, aes256gcm16, chacha20poly1305"
    )]
    NoSuites(String),
    /// A suite listed twice.
    #[error("peer `{peer}` lists the suite {suite} twice")]
    DuplicateSuite {
        /// Whose list.
        peer: String,
        /// Which.
        suite: AeadSuite,
    },
    /// Nothing can be sent there.
    #[error("peer `{peer}` has the endpoint {endpoint}, which names no single host and port")]
    Endpoint {
        /// Whose.
        peer: String,
        /// As given.
        endpoint: SocketAddr,
    },
    /// None, or more than a handshake can make.
    #[error(
        "peer `{peer}`: {got} parallel SAs; use 1 to {}, no more than this node has workers",
        MOST_SAS
    )]
    ParallelSas {
        /// Whose.
        peer: String,
        /// As given.
        got: u8,
    },
    /// A limit of zero or one that is over at once.
    #[error("peer `{peer}`: {setting} is {got}; use at least {least}")]
    TooSmall {
        /// Whose.
        peer: String,
        /// Which setting.
        setting: &'static str,
        /// As given.
        got: u64,
        /// What would be right.
        least: u64,
    },
}

impl fmt::Debug for NodeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeConfig")
            .field("public_key", &self.private_key.public_key())
            .field("listen_port", &self.listen_port)
            .field("local", &self.local)
            .field("seed", &"[redacted]")
            .field("under_load", &self.under_load)
            .finish_non_exhaustive()
    }
}

impl Drop for NodeConfig {
    fn drop(&mut self) {
        self.seed.zeroize();
    }
}

impl NodeConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.listen_port == 0 {
            return Err(ConfigError::ListenPort);
        }
        for (name, rate) in [
            ("cookies_above", self.under_load.cookies_above),
            ("at_most", self.under_load.at_most),
            ("per_source", self.under_load.per_source),
            ("per_source_burst", self.under_load.per_source_burst),
        ] {
            if rate == 0 {
                return Err(ConfigError::LoadPolicy(name));
            }
        }
        Ok(())
    }
}

/// Checks a whole set of peers: each by itself, then against each other.
pub(crate) fn check_peers(own: PublicKey, peers: &[PeerConfig]) -> Result<(), ConfigError> {
    let mut ids = BTreeMap::new();
    let mut names = BTreeSet::new();
    let mut keys = BTreeMap::new();
    let mut claimed: BTreeMap<String, &str> = BTreeMap::new();
    for peer in peers {
        peer.check(own)?;
        let name = &peer.name;
        if let Some(first) = ids.insert(peer.id, name) {
            return Err(ConfigError::DuplicateId {
                first: first.clone(),
                second: name.clone(),
                id: peer.id,
            });
        }
        if !names.insert(name) {
            return Err(ConfigError::DuplicateName(name.clone()));
        }
        if let Some(first) = keys.insert(peer.public_key, name) {
            return Err(ConfigError::DuplicateKey {
                first: first.clone(),
                second: name.clone(),
                key: peer.public_key,
            });
        }
        for pair in &peer.selectors {
            if let Some(first) = claimed.insert(pair.to_string(), name) {
                return Err(ConfigError::SameSelectors {
                    first: first.to_owned(),
                    second: name.clone(),
                    selectors: pair.to_string(),
                });
            }
        }
    }
    Ok(())
}

impl PeerConfig {
    fn check(&self, own: PublicKey) -> Result<(), ConfigError> {
        if self.public_key == own {
            return Err(ConfigError::OwnKey(self.name.clone()));
        }
        if self.selectors.is_empty() {
            return Err(ConfigError::NoSelectors(self.name.clone()));
        }
        if self.suites.is_empty() {
            return Err(ConfigError::NoSuites(self.name.clone()));
        }
        for (index, suite) in self.suites.iter().enumerate() {
            if self.suites[..index].contains(suite) {
                return Err(ConfigError::DuplicateSuite {
                    peer: self.name.clone(),
                    suite: *suite,
                });
            }
        }
        if let Some(endpoint) = self.endpoint
            && !is_usable(endpoint)
        {
            return Err(ConfigError::Endpoint {
                peer: self.name.clone(),
                endpoint,
            });
        }
        if !(1..=MOST_SAS).contains(&usize::from(self.parallel_sas)) {
            return Err(ConfigError::ParallelSas {
                peer: self.name.clone(),
                got: self.parallel_sas,
            });
        }
        for (setting, got, least) in [
            ("rekey seconds", Some(u64::from(self.rekey.seconds)), 1),
            ("rekey bytes", self.rekey.bytes, 1),
            ("rekey packets", self.rekey.packets, 1),
            (
                "keepalive seconds",
                self.keepalive_seconds.map(u64::from),
                1,
            ),
            (
                "dead after seconds",
                self.dead_after_seconds.map(u64::from),
                3,
            ),
        ] {
            if let Some(got) = got
                && got < least
            {
                return Err(ConfigError::TooSmall {
                    peer: self.name.clone(),
                    setting,
                    got,
                    least,
                });
            }
        }
        Ok(())
    }
}

/// Whether datagrams can be sent there at all.
pub(crate) fn is_usable(endpoint: SocketAddr) -> bool {
    let ip = endpoint.ip();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    endpoint.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}
