//! The engine's public face, and the way of a message from a datagram to the peer it concerns.

use crate::{
    config::{ConfigError, KemPolicy, NodeConfig, PeerConfig, check_peers, is_usable},
    context::Context,
    cookie::CookieMint,
    handshake::Opened,
    keys::PublicKey,
    notice::{Notice, NoticeEvent},
    peer::Peer,
    ratelimit::{Admission, Limiter},
    timers::{NOTICE_PAUSE, Timers},
    wire::{Initiation, Message, Response},
};
use esplane_api::{
    AeadSuite, DropCounters, DropReason, Now, SaCommand, SaEvent, Spi, TunnelActivity, TunnelId,
};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::SocketAddr,
    time::Duration,
};

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
///
/// Call a `handle_…` function when something has happened, then [`Self::poll_output`] until it is
/// empty, then wait until [`Self::poll_timeout`]. Nothing here waits, sends or reads a clock.
pub struct Engine {
    ctx: Context,
    peers: BTreeMap<TunnelId, Peer>,
    by_key: BTreeMap<PublicKey, TunnelId>,
    timers: Timers,
    mint: CookieMint,
    limiter: Limiter,
    loaded: bool,
    last_stranger: Option<Duration>,
}

impl Engine {
    /// A node that knows nobody yet.
    pub fn new(node: NodeConfig) -> Result<Self, ConfigError> {
        node.check()?;
        let limiter = Limiter::new(node.under_load);
        let mut ctx = Context::new(node);
        Ok(Self {
            mint: CookieMint::new(&ctx.public_key, &mut ctx.random),
            ctx,
            peers: BTreeMap::new(),
            by_key: BTreeMap::new(),
            timers: Timers::default(),
            limiter,
            loaded: false,
            last_stranger: None,
        })
    }

    /// Our own name.
    pub fn public_key(&self) -> PublicKey {
        self.ctx.public_key
    }

    /// Replaces the whole set of peers, or changes nothing.
    ///
    /// Peers are the same if their number is. Those that stay as they were keep their SAs, as do those
    /// of which only name, routes, endpoint or timers change (other routes also ask for new SAs at
    /// once). Another public key, pre-shared key or way to encrypt ends a peer's SAs.
    pub fn set_peers(&mut self, now: Now, peers: Vec<PeerConfig>) -> Result<(), ConfigError> {
        check_peers(self.ctx.public_key, &peers)?;
        let mut commands = Vec::new();
        let kept: BTreeSet<TunnelId> = peers.iter().map(|peer| peer.id).collect();
        for (id, mut gone) in self.peers.extract_if(.., |id, _| !kept.contains(id)) {
            gone.forget_sas(&mut self.ctx);
            self.timers.set(id, None);
            commands.push(SaCommand::RemoveTunnel(id));
        }
        self.by_key = peers
            .iter()
            .map(|peer| (peer.public_key, peer.id))
            .collect();
        for config in peers {
            match self.peers.entry(config.id) {
                Entry::Occupied(mut known) => {
                    known
                        .get_mut()
                        .reconfigure(&mut self.ctx, now, config, &mut commands)
                }
                Entry::Vacant(free) => commands.push(free.insert(Peer::new(config)).definition()),
            }
        }
        self.ctx.commands(commands);
        for id in kept {
            self.with_peer(id, now, |peer, ctx| {
                if peer.should_be_there() {
                    peer.start(ctx, now);
                }
            });
        }
        Ok(())
    }

    /// Takes SPIs that static SAs use, besides those of [`NodeConfig::reserved_spis`].
    pub fn reserve_spis(&mut self, spis: &[Spi]) {
        self.ctx.reserve_spis(spis);
    }

    /// Gives back SPIs that static SAs used.
    pub fn release_spis(&mut self, spis: &[Spi]) {
        self.ctx.release_reserved_spis(spis);
    }

    /// A DNS name has been resolved (again). An address that the peer has shown by its own packets is
    /// kept while it is alive there.
    pub fn set_endpoint(&mut self, now: Now, peer: TunnelId, endpoint: SocketAddr) {
        if is_usable(endpoint) {
            self.with_peer(peer, now, |peer, ctx| peer.set_endpoint(ctx, now, endpoint));
        }
    }

    /// Takes one handshake message, the bytes behind the non-ESP marker.
    ///
    /// 1. Read it; 2. look at its MAC; 3. look at the load; only then 4. compute.
    pub fn handle_datagram(&mut self, now: Now, from: SocketAddr, message: &[u8]) {
        match Message::parse(message) {
            Ok(Message::Initiation(message)) => self.handle_initiation(now, from, &message),
            Ok(Message::Response(message)) => self.handle_response(now, from, &message),
            Ok(Message::CookieReply(reply)) => {
                self.with_owner(reply.index, now, |peer, ctx| {
                    peer.handle_cookie(ctx, now, &reply)
                });
            }
            Err(reason) => self.ctx.drop_message(reason),
        }
    }

    /// Takes an event of the dataplane.
    pub fn handle_event(&mut self, now: Now, event: SaEvent) {
        let tunnel = match event {
            SaEvent::SaNeeded { tunnel } | SaEvent::EndpointMoved { tunnel, .. } => tunnel,
            SaEvent::SoftExpired { sa, .. }
            | SaEvent::HardExpired { sa, .. }
            | SaEvent::SequenceLow { sa, .. }
            | SaEvent::SequenceExhausted { sa }
            | SaEvent::FirstReceived { sa } => sa.tunnel,
        };
        self.with_peer(tunnel, now, |peer, ctx| peer.handle_event(ctx, now, event));
    }

    /// Takes what the tunnels have carried; to be called about once a second.
    pub fn handle_activity(&mut self, now: Now, activity: &[TunnelActivity]) {
        for tunnel in activity {
            self.with_peer(tunnel.tunnel, now, |peer, ctx| {
                peer.handle_activity(ctx, now, tunnel)
            });
        }
        self.watch_load(now);
    }

    /// Does what is due; to be called when [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Now) {
        while let Some(due) = self.timers.due(now.monotonic) {
            self.with_peer(due, now, |peer, ctx| peer.handle_timeout(ctx, now));
        }
        self.watch_load(now);
    }

    /// Starts a handshake now, whether one is needed or not.
    pub fn initiate(&mut self, now: Now, peer: TunnelId) {
        self.with_peer(peer, now, |peer, ctx| peer.start(ctx, now));
    }

    /// What is to be done next; to be called until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.ctx.outputs.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called, on [`Now::monotonic`].
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.timers.next()
    }

    /// Handshake messages that were dropped, by reason.
    pub fn drops(&self) -> &DropCounters {
        &self.ctx.drops
    }

    /// All peers, in the order of their numbers.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.peers.values().map(Peer::status).collect()
    }
}

impl Engine {
    /// Message 1, from anyone who knows our public key.
    fn handle_initiation(&mut self, now: Now, from: SocketAddr, message: &Initiation) {
        if !self.mint.is_mac1(message.under_mac1, message.mac1) {
            return self.ctx.drop_message(DropReason::HandshakeBadMac);
        }
        let proven = self
            .mint
            .is_mac2(now.monotonic, from, message, &mut self.ctx.random);
        let admission = self.limiter.admit(now.monotonic, from, proven);
        self.watch_load(now);
        match admission {
            Admission::Admit => {}
            Admission::Cookie => {
                self.ctx.drop_message(DropReason::HandshakeCookieNeeded);
                if let Some(reply) =
                    self.mint
                        .reply(now.monotonic, from, message, &mut self.ctx.random)
                {
                    self.ctx.send(from, &reply);
                }
                return;
            }
            Admission::Refuse => return self.ctx.drop_message(DropReason::HandshakeRateLimited),
        }
        let Ok(opened) = Opened::open(&mut self.ctx.random, &self.ctx.node.private_key, message)
        else {
            return self.ctx.drop_message(DropReason::HandshakeDecryptFailed);
        };
        match self.by_key.get(&opened.peer()) {
            Some(peer) => self.with_peer(*peer, now, |peer, ctx| {
                peer.handle_initiation(ctx, now, from, opened)
            }),
            None => self.meet_stranger(now, from, opened.peer()),
        }
    }

    /// Message 2, to a handshake of ours.
    fn handle_response(&mut self, now: Now, from: SocketAddr, message: &Response) {
        if !self.mint.is_mac1(message.under_mac1, message.mac1) {
            return self.ctx.drop_message(DropReason::HandshakeBadMac);
        }
        self.with_owner(message.index, now, |peer, ctx| {
            peer.handle_response(ctx, now, from, message)
        });
    }

    fn meet_stranger(&mut self, now: Now, endpoint: SocketAddr, public_key: PublicKey) {
        self.ctx.drop_message(DropReason::HandshakeUnknownPeer);
        if self
            .last_stranger
            .is_none_or(|last| now.monotonic >= last + NOTICE_PAUSE)
        {
            self.last_stranger = Some(now.monotonic);
            self.ctx.notice(
                None,
                NoticeEvent::Stranger {
                    public_key,
                    endpoint,
                },
            );
        }
    }

    /// Does something with the peer whose handshake has this index.
    fn with_owner(&mut self, index: u32, now: Now, act: impl FnOnce(&mut Peer, &mut Context)) {
        match self.ctx.peer_of_index(index) {
            Some(peer) => self.with_peer(peer, now, act),
            None => self.ctx.drop_message(DropReason::HandshakeUnexpected),
        }
    }

    /// Does something with a peer, and notes when it is due next: not at once again, so that nobody
    /// can keep the engine from the others.
    fn with_peer(&mut self, id: TunnelId, now: Now, act: impl FnOnce(&mut Peer, &mut Context)) {
        if let Some(peer) = self.peers.get_mut(&id) {
            act(peer, &mut self.ctx);
            let soonest = now.monotonic + Duration::from_millis(1);
            self.timers
                .set(id, peer.deadline().map(|due| due.max(soonest)));
        }
    }

    fn watch_load(&mut self, now: Now) {
        let loaded = self.limiter.is_loaded(now.monotonic);
        if loaded != std::mem::replace(&mut self.loaded, loaded) {
            let initiations_per_second = self.ctx.node.under_load.cookies_above;
            let event = if loaded {
                NoticeEvent::UnderLoad {
                    initiations_per_second,
                }
            } else {
                NoticeEvent::LoadOver
            };
            self.ctx.notice(None, event);
        }
    }
}
