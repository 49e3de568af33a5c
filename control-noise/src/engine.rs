use crate::{
    config::{ConfigError, KemPolicy, NodeConfig, PeerConfig},
    keys::PublicKey,
    notice::Notice,
};
use esplane_api::{
    AeadSuite, DropCounters, Now, SaCommand, SaEvent, Spi, TunnelActivity, TunnelId,
};
use std::{collections::VecDeque, net::SocketAddr, time::Duration};

/// What the engine wants done. To be carried out in order: commands before what follows them.
#[derive(Debug)]
pub enum Output {
    /// Send one UDP payload, complete with its non-ESP marker, from our listen port.
    Send {
        /// Where to.
        to: SocketAddr,
        /// Non-ESP marker and message.
        datagram: Vec<u8>,
    },
    /// Apply all of these at once.
    Commands(Vec<SaCommand>),
    /// Seal and send one ESP dummy packet on the tunnel's active SA (RFC 4303 §2.6).
    SendDummy(TunnelId),
    /// Tell the operator.
    Notice(Notice),
}

/// What a peer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// No SAs, and nothing asks for any.
    Idle,
    /// No SAs yet; a handshake is under way.
    Connecting,
    /// SAs are there and work.
    Established,
    /// SAs are there, and the peer has not been heard for too long.
    Silent,
    /// No SAs, and the last handshake got no answer.
    Unreachable,
}

impl PeerState {
    /// The name in logs and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Connecting => "connecting",
            Self::Established => "established",
            Self::Silent => "silent",
            Self::Unreachable => "unreachable",
        }
    }
}

/// One peer as a person wants to see it.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerStatus {
    /// Its tunnel's number.
    pub id: TunnelId,
    /// Its name.
    pub name: String,
    /// Its key.
    pub public_key: PublicKey,
    /// What it is doing.
    pub state: PeerState,
    /// Where it is, as far as we know.
    pub endpoint: Option<SocketAddr>,
    /// When the last handshake was completed.
    pub last_handshake: Option<Now>,
    /// Handshakes completed.
    pub handshakes: u64,
    /// How many of them replaced SAs that worked.
    pub rekeys: u64,
    /// Handshakes that were given up or refused.
    pub failures: u64,
    /// What packets are sealed with now.
    pub suite: Option<AeadSuite>,
    /// The post-quantum half, as configured: there is no other.
    pub kem: KemPolicy,
    /// Whether a pre-shared key is configured.
    pub has_psk: bool,
    /// The replay window that the peer says it has.
    pub peer_window_packets: Option<u32>,
}

/// The key exchange of one node with all its peers.
pub struct Engine {
    node: NodeConfig,
    outputs: VecDeque<Output>,
    drops: DropCounters,
}

impl Engine {
    /// A node that knows nobody yet.
    pub fn new(node: NodeConfig) -> Result<Self, ConfigError> {
        node.check()?;
        Ok(Self {
            node,
            outputs: VecDeque::new(),
            drops: DropCounters::default(),
        })
    }

    /// Our own name.
    pub fn public_key(&self) -> PublicKey {
        self.node.private_key.public_key()
    }

    /// Replaces the whole set of peers, or changes nothing.
    ///
    /// Peers that stay as they were keep their SAs, as do those of which only selectors, endpoint or
    /// timers change. Another public key, pre-shared key or way to encrypt ends a peer's SAs.
    pub fn set_peers(&mut self, now: Now, peers: Vec<PeerConfig>) -> Result<(), ConfigError> {
        let _ = now;
        crate::config::check_peers(self.public_key(), &peers)
    }

    /// Takes SPIs that static SAs use, besides those of [`NodeConfig::reserved_spis`].
    pub fn reserve_spis(&mut self, spis: &[Spi]) {
        self.node.reserved_spis.extend_from_slice(spis);
    }

    /// A DNS name has been resolved (again).
    pub fn set_endpoint(&mut self, now: Now, peer: TunnelId, endpoint: SocketAddr) {
        let _ = (now, peer, endpoint);
    }

    /// Takes one handshake message, the bytes behind the non-ESP marker.
    pub fn handle_datagram(&mut self, now: Now, from: SocketAddr, message: &[u8]) {
        let _ = (now, from, message);
    }

    /// Takes an event of the dataplane.
    pub fn handle_event(&mut self, now: Now, event: SaEvent) {
        let _ = (now, event);
    }

    /// Takes what the tunnels have carried; to be called about once a second.
    pub fn handle_activity(&mut self, now: Now, activity: &[TunnelActivity]) {
        let _ = (now, activity);
    }

    /// Does what is due; to be called when [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Now) {
        let _ = now;
    }

    /// Starts a handshake now, whether one is needed or not.
    pub fn initiate(&mut self, now: Now, peer: TunnelId) {
        let _ = (now, peer);
    }

    /// What is to be done next; to be called until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called, on [`Now::monotonic`].
    pub fn poll_timeout(&self) -> Option<Duration> {
        None
    }

    /// Handshake messages that were dropped, by reason.
    pub fn drops(&self) -> &DropCounters {
        &self.drops
    }

    /// All peers, in the order of their numbers.
    pub fn peers(&self) -> Vec<PeerStatus> {
        Vec::new()
    }
}
