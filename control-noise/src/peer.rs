//! One peer: its handshake if one is under way, its SAs, and what is known of it.
//!
//! ```text
//!            start                     message 2                  first packet
//!   idle ───────────▶ attempt ──────────────────────▶ current ◀──────────────── pending ◀── message 1
//!    ▲                 │  ▲ repeat, backing off        │  │
//!    └─────────────────┘  └────────────────────────────┘  └──▶ ends: removed, idle again
//!      given up              rekey due, peer silent
//! ```

use crate::{
    Disagreement, Initiate, NoticeEvent, PeerConfig, PeerLabel, PeerState, PeerStatus, Severity,
    context::Context,
    cookie::{self, HeldCookie, PublicMacs},
    handshake::{HandshakeError, Opened, Session, Terms, Waiting},
    liveness::{Liveness, LivenessAction, LivenessPolicy},
    timers::*,
    turnover::{FirstPacket, Role, Schedule, Turnover},
    wire::{Answer, CookieReply, MAC_BYTES, Offer, Response, Timestamp},
};
use esplane_api::{
    AeadSuite, Direction, DropReason, Esn, KeyMaterial, Lifetime, Limits, Now, OuterPath, Policy,
    PolicyAction, SaCommand, SaEvent, SaId, SaPair, SaParams, SequenceStart, Spi, TunnelActivity,
    TunnelParams, UdpEncap,
};
use std::{
    collections::VecDeque,
    mem::{Discriminant, discriminant},
    net::SocketAddr,
    time::Duration,
};

/// Hard limits lie at least this far past soft ones, so that a successor has time to come at any speed.
const SLACK_PACKETS: u64 = 1 << 26;
const SLACK_BYTES: u64 = 1 << 36;
/// With 32-bit numbers a successor is asked for when half of them are used.
const SOFT_PACKETS_WITHOUT_ESN: u64 = 1 << 31;

pub(crate) struct Peer {
    config: PeerConfig,
    macs: PublicMacs,
    /// Where it is: the configured address until an authentic packet shows another.
    endpoint: Option<SocketAddr>,
    attempt: Option<Attempt>,
    sas: Turnover,
    liveness: Liveness,
    /// As initiator: dummies until the new inbound SA has received.
    confirm: Option<Confirm>,
    /// As responder: dummies that tell the initiator that we send with the new SA.
    echoes: VecDeque<Duration>,
    timestamp_sent: Option<Timestamp>,
    timestamp_received: Option<Timestamp>,
    cookie: Option<HeldCookie>,
    /// It has refused us; packets start no handshake before this.
    refused_until: Duration,
    /// Packets wait and there was no address to send a handshake to.
    waits_for_endpoint: bool,
    unreachable: bool,
    last_handshake: Option<Now>,
    handshakes: u64,
    rekeys: u64,
    failures: u64,
    peer_window_packets: Option<u32>,
    last_notices: Vec<(Discriminant<NoticeEvent>, Duration)>,
}

/// A handshake that we have started.
struct Attempt {
    waiting: Waiting,
    index: u32,
    spi: Spi,
    /// Header, Noise message and MAC1 of the last initiation: all but MAC2, to be sent again with a cookie.
    message: Vec<u8>,
    mac1: [u8; MAC_BYTES],
    sent_to: SocketAddr,
    sent_at: Duration,
    started: Duration,
    repetition: u32,
    next_at: Duration,
    /// The peer's own initiation goes first; ours is tried again if that comes to nothing.
    yielded: bool,
    /// Long unanswered: goes on slowly.
    slow: bool,
}

struct Confirm {
    next_at: Duration,
    repetition: u32,
}

/// What of the configuration the SAs that exist were made with.
fn same_sas(one: &PeerConfig, other: &PeerConfig) -> bool {
    let same_psk = match (&one.psk, &other.psk) {
        (Some(one), Some(other)) => one.same_secret(other),
        (one, other) => one.is_none() && other.is_none(),
    };
    same_psk
        && (one.public_key, &one.suites, one.esn, one.kem, one.window)
            == (
                other.public_key,
                &other.suites,
                other.esn,
                other.kem,
                other.window,
            )
}

// What the engine calls.
impl Peer {
    pub(crate) fn new(config: PeerConfig) -> Self {
        Self {
            macs: PublicMacs::of(&config.public_key),
            endpoint: config.endpoint,
            attempt: None,
            sas: Turnover::new(config.id),
            liveness: Liveness::default(),
            confirm: None,
            echoes: VecDeque::new(),
            timestamp_sent: None,
            timestamp_received: None,
            cookie: None,
            refused_until: Duration::ZERO,
            waits_for_endpoint: false,
            unreachable: false,
            last_handshake: None,
            handshakes: 0,
            rekeys: 0,
            failures: 0,
            peer_window_packets: None,
            last_notices: Vec::new(),
            config,
        }
    }

    /// The tunnel with one policy for each selector pair.
    pub(crate) fn definition(&self) -> SaCommand {
        let policy = |selectors| Policy {
            selectors,
            action: PolicyAction::Protect(self.config.id),
            priority: 0,
        };
        SaCommand::DefineTunnel(TunnelParams {
            id: self.config.id,
            name: self.config.name.clone(),
            policies: self.config.selectors.iter().copied().map(policy).collect(),
            roaming: true,
            df: self.config.df,
        })
    }

    /// Takes the peer's new configuration, from which the SAs may follow a new definition of the tunnel.
    pub(crate) fn reconfigure(
        &mut self,
        ctx: &mut Context,
        now: Now,
        config: PeerConfig,
        commands: &mut Vec<SaCommand>,
    ) {
        let before = std::mem::replace(&mut self.config, config);
        if self.config.endpoint != before.endpoint && self.config.endpoint.is_some() {
            self.endpoint = self.config.endpoint;
        }
        self.refused_until = Duration::ZERO; // perhaps that was just corrected
        if self.config.public_key != before.public_key {
            self.macs = PublicMacs::of(&self.config.public_key);
            self.timestamp_received = None; // another machine, another clock
        }
        if !same_sas(&before, &self.config) {
            self.forget_sas(ctx);
            commands.push(SaCommand::RemoveTunnel(self.config.id));
            commands.push(self.definition());
            return;
        }
        let same_packets = (&before.selectors, &before.name, before.df)
            == (&self.config.selectors, &self.config.name, self.config.df);
        if !same_packets {
            commands.push(self.definition());
        }
        if before.selectors != self.config.selectors {
            // Installed SAs check arriving packets against the selectors they were made with.
            self.sas.hasten_rekey(now.monotonic);
        }
    }

    /// The peer is not configured any more, or entirely otherwise: gives back what it held.
    pub(crate) fn forget_sas(&mut self, ctx: &mut Context) {
        self.end_attempt(ctx);
        for spi in self.sas.inbound_spis() {
            ctx.release_spi(spi);
        }
        self.sas = Turnover::new(self.config.id);
        (self.confirm, self.cookie, self.unreachable) = (None, None, false);
        self.echoes.clear();
        self.liveness = Liveness::default();
    }

    /// A DNS name has been resolved. An address learnt from a peer that answers is better.
    pub(crate) fn set_endpoint(&mut self, ctx: &mut Context, now: Now, endpoint: SocketAddr) {
        self.config.endpoint = Some(endpoint);
        if self.endpoint.is_none() || self.state() != PeerState::Established {
            self.endpoint = Some(endpoint);
        }
        if self.waits_for_endpoint || self.should_be_there() {
            self.start(ctx, now);
        }
    }

    /// Whether a handshake should be started without a packet that asks for one.
    pub(crate) fn should_be_there(&self) -> bool {
        self.config.initiate == Initiate::AtStart && self.sas.current().is_none()
    }

    /// Starts a handshake, unless one is under way.
    pub(crate) fn start(&mut self, ctx: &mut Context, now: Now) {
        if self.attempt.is_none() {
            self.send_initiation(ctx, now, now.monotonic, 0);
        }
    }

    /// An authentic message 1. The caller has matched its static key with ours of this peer.
    pub(crate) fn handle_initiation(
        &mut self,
        ctx: &mut Context,
        now: Now,
        from: SocketAddr,
        opened: Opened,
    ) {
        let offer = match opened.offer() {
            Ok(offer) => offer,
            Err(HandshakeError::Unknown) => return self.disagree(ctx, now, Disagreement::Unknown),
            Err(_) => return ctx.drop_message(DropReason::HandshakeMalformed),
        };
        if self
            .timestamp_received
            .is_some_and(|last| offer.timestamp <= last)
        {
            self.notice(ctx, now, NoticeEvent::Replayed { endpoint: from });
            return ctx.drop_message(DropReason::HandshakeReplayed);
        }
        self.timestamp_received = Some(offer.timestamp);
        let mut commands = Vec::new();
        self.follow(ctx, now, from, &mut commands);
        if self.wins_against_theirs(ctx, now) {
            ctx.commands(commands);
            return ctx.drop_message(DropReason::HandshakeUnexpected);
        }
        match self.choose(ctx, &offer) {
            Ok(suite) => self.accept(ctx, now, from, opened, &offer, suite, commands),
            Err(why) => {
                ctx.commands(commands);
                self.disagree(ctx, now, why);
                if let Ok(mut message) = opened.refuse(self.config.psk.as_ref(), why) {
                    self.macs.append_mac1(&mut message);
                    ctx.send(from, &message);
                }
            }
        }
    }

    /// A message 2 to one of our indices.
    pub(crate) fn handle_response(
        &mut self,
        ctx: &mut Context,
        now: Now,
        from: SocketAddr,
        response: &Response,
    ) {
        let Some(attempt) = self
            .attempt
            .as_mut()
            .filter(|attempt| attempt.index == response.index && !attempt.yielded)
        else {
            return ctx.drop_message(DropReason::HandshakeUnexpected);
        };
        match attempt.waiting.finish(response.noise) {
            Ok((
                Answer::Accepted {
                    spi,
                    suite,
                    window_packets,
                    ..
                },
                Some(session),
            )) if self.config.suites.contains(&suite) => {
                self.peer_window_packets = window_packets;
                self.complete(ctx, now, from, &session, spi, suite);
            }
            Ok((Answer::Refused(why), _)) => {
                self.disagree(ctx, now, why);
                self.slow_down(ctx, now);
            }
            Ok(_) | Err(HandshakeError::Unknown) => self.disagree(ctx, now, Disagreement::Unknown),
            Err(HandshakeError::Malformed) => ctx.drop_message(DropReason::HandshakeMalformed),
            Err(HandshakeError::Noise(_)) => {
                self.notice(ctx, now, NoticeEvent::WrongAnswer { endpoint: from });
                ctx.drop_message(DropReason::HandshakeDecryptFailed);
            }
        }
    }

    /// A cookie for one of our indices: the peer is under load, so show it, at once.
    pub(crate) fn handle_cookie(&mut self, ctx: &mut Context, now: Now, reply: &CookieReply) {
        let Some(attempt) = self
            .attempt
            .as_ref()
            .filter(|attempt| attempt.index == reply.index)
        else {
            return ctx.drop_message(DropReason::HandshakeUnexpected);
        };
        let Some(cookie) = self.macs.open_cookie(reply, &attempt.mac1) else {
            return ctx.drop_message(DropReason::HandshakeDecryptFailed);
        };
        let first = self.cookie.is_none_or(|held| !held.is_same(&cookie));
        self.cookie = Some(HeldCookie::new(cookie, now.monotonic));
        if first {
            let mut message = attempt.message.clone();
            cookie::append_mac2(&mut message, self.cookie, now.monotonic);
            ctx.send(attempt.sent_to, &message);
        }
    }

    pub(crate) fn handle_event(&mut self, ctx: &mut Context, now: Now, event: SaEvent) {
        match event {
            SaEvent::SaNeeded { .. } => self.handle_need(ctx, now),
            SaEvent::FirstReceived { sa } => self.handle_first_packet(ctx, now, sa.spi),
            SaEvent::SoftExpired { sa, .. } | SaEvent::SequenceLow { sa, .. }
                if self.is_current(sa) =>
            {
                let patience = match self.sas.current().map(|pair| pair.role) {
                    Some(Role::Responder) => {
                        PENDING_YOUNG / 2 + ctx.random.up_to(PENDING_YOUNG / 2)
                    }
                    _ => Duration::ZERO, // the initiator sees the same counters and goes first
                };
                self.sas.hasten_rekey(now.monotonic + patience);
            }
            SaEvent::SequenceExhausted { sa } if self.is_current(sa) => {
                self.sas.hasten_rekey(now.monotonic)
            }
            SaEvent::HardExpired { sa, .. } if self.is_current(sa) => self.end_current(ctx, now),
            SaEvent::HardExpired { sa, .. } if sa.direction == Direction::Inbound => {
                let commands = self.sas.remove_inbound(sa.spi);
                ctx.commands(commands);
            }
            SaEvent::EndpointMoved { remote, .. } => {
                let mut commands = Vec::new();
                self.follow(ctx, now, remote, &mut commands);
                ctx.commands(commands);
            }
            // Of SAs that are on their way out.
            SaEvent::SoftExpired { .. }
            | SaEvent::SequenceLow { .. }
            | SaEvent::SequenceExhausted { .. }
            | SaEvent::HardExpired { .. } => {}
        }
        self.handle_timeout(ctx, now);
    }

    pub(crate) fn handle_activity(
        &mut self,
        ctx: &mut Context,
        now: Now,
        activity: &TunnelActivity,
    ) {
        let policy = self.liveness_policy();
        self.liveness.observe(now.monotonic, activity, policy);
        self.handle_timeout(ctx, now);
    }

    /// Does all that is due by now.
    pub(crate) fn handle_timeout(&mut self, ctx: &mut Context, now: Now) {
        let (commands, unconfirmed) = self.sas.expire(now.monotonic);
        ctx.commands(commands);
        if unconfirmed {
            self.failures += 1;
            if let Some(endpoint) = self.endpoint {
                self.notice(ctx, now, NoticeEvent::NotConfirmed { endpoint });
            }
        }
        if self
            .sas
            .current()
            .is_some_and(|pair| now.monotonic >= pair.ends_at)
        {
            self.end_current(ctx, now);
        }
        self.send_due_dummies(ctx, now);
        self.repeat_attempt(ctx, now);
        if self.attempt.is_none() && self.sas.rekey_at().is_some_and(|at| now.monotonic >= at) {
            self.start(ctx, now);
        }
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let attempt = self.attempt.as_ref().map(|attempt| attempt.next_at);
        let rekey = if attempt.is_none() {
            self.sas.rekey_at()
        } else {
            None
        };
        let current = self.sas.current();
        let liveness = current.and_then(|_| self.liveness.deadline(self.liveness_policy()));
        [
            attempt,
            rekey,
            liveness,
            current.map(|pair| pair.ends_at),
            self.sas.expires_at(),
            self.confirm.as_ref().map(|confirm| confirm.next_at),
            self.echoes.front().copied(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    pub(crate) fn status(&self) -> PeerStatus {
        PeerStatus {
            id: self.config.id,
            name: self.config.name.clone(),
            public_key: self.config.public_key,
            state: self.state(),
            endpoint: self.endpoint,
            last_handshake: self.last_handshake,
            handshakes: self.handshakes,
            rekeys: self.rekeys,
            failures: self.failures,
            suite: self.sas.current().map(|pair| pair.suite),
            kem: self.config.kem,
            has_psk: self.config.psk.is_some(),
            peer_window_packets: self.peer_window_packets,
        }
    }

    fn state(&self) -> PeerState {
        if self.sas.current().is_some() {
            return if self.liveness.is_silent() {
                PeerState::Silent
            } else {
                PeerState::Established
            };
        }
        match &self.attempt {
            Some(attempt) if attempt.slow => PeerState::Unreachable,
            Some(_) => PeerState::Connecting,
            None if self.sas.has_pending() => PeerState::Connecting,
            None if self.unreachable => PeerState::Unreachable,
            None => PeerState::Idle,
        }
    }
}

// The initiator's side.
impl Peer {
    /// A packet waits for an SA.
    fn handle_need(&mut self, ctx: &mut Context, now: Now) {
        let held_off =
            now.monotonic < self.refused_until || self.sas.has_young_pending(now.monotonic);
        if self.sas.current().is_none() && !held_off {
            self.start(ctx, now);
        }
    }

    /// Sends message 1: a new one each time, with fresh keys, timestamp and SPI.
    fn send_initiation(&mut self, ctx: &mut Context, now: Now, started: Duration, repetition: u32) {
        let slow = self.attempt.as_ref().is_some_and(|attempt| attempt.slow);
        self.end_attempt(ctx);
        // Every other time to where the configuration says: a learnt address may be out of date.
        let (first, second) = match repetition % 2 {
            0 => (self.endpoint, self.config.endpoint),
            _ => (self.config.endpoint, self.endpoint),
        };
        let Some(to) = first.or(second) else {
            self.waits_for_endpoint = true;
            self.sas.postpone_rekey(now.monotonic + RETRY_SLOW);
            return self.notice(ctx, now, NoticeEvent::NoEndpoint);
        };
        self.waits_for_endpoint = false;
        let timestamp = Timestamp::after(self.timestamp_sent, now.unix);
        self.timestamp_sent = Some(timestamp);
        let (index, spi) = (ctx.allocate_index(self.config.id), ctx.allocate_spi());
        let terms = Terms {
            timestamp,
            spi,
            suites: &self.config.suites,
            esn: self.config.esn,
            window_packets: self.config.window.packets(),
            kem: self.config.kem,
        };
        let key = &ctx.node.private_key;
        let made = Waiting::start(
            &mut ctx.random,
            key,
            &self.config.public_key,
            self.config.psk.as_ref(),
            index,
            &terms,
        );
        let Ok((waiting, mut message)) = made else {
            // Cannot happen: keys have the right length and the message fits.
            ctx.release_index(index);
            return ctx.release_spi(spi);
        };
        let mac1 = self.macs.append_mac1(&mut message);
        let mut datagram = message.clone();
        cookie::append_mac2(&mut datagram, self.cookie, now.monotonic);
        ctx.send(to, &datagram);
        let wait = if slow {
            RETRY_SLOW + ctx.random.up_to(RETRY_SLOW / 4)
        } else {
            backoff(RETRY_FIRST, RETRY_MOST, repetition, &mut ctx.random)
        };
        self.attempt = Some(Attempt {
            waiting,
            index,
            spi,
            message,
            mac1,
            sent_to: to,
            sent_at: now.monotonic,
            started,
            repetition,
            next_at: now.monotonic + wait,
            yielded: false,
            slow,
        });
    }

    /// The handshake that is under way gets no answer: once more, more slowly, or never mind.
    fn repeat_attempt(&mut self, ctx: &mut Context, now: Now) {
        let Some(attempt) = self
            .attempt
            .as_mut()
            .filter(|attempt| now.monotonic >= attempt.next_at)
        else {
            return;
        };
        let (started, repetition, endpoint) =
            (attempt.started, attempt.repetition + 1, attempt.sent_to);
        let waited = now.monotonic.saturating_sub(started);
        if waited >= GIVE_UP && !attempt.slow {
            let retrying = self.config.initiate == Initiate::AtStart;
            self.failures += 1;
            self.notice(
                ctx,
                now,
                NoticeEvent::NoAnswer {
                    endpoint,
                    seconds: waited.as_secs(),
                    retrying,
                },
            );
            self.slow_down(ctx, now);
            if !retrying {
                return;
            }
        }
        if self.attempt.is_some() {
            self.send_initiation(ctx, now, started, repetition);
        }
    }

    /// No answer, or a refusal: a peer that should always be there is asked again now and then, another
    /// with the next packet.
    fn slow_down(&mut self, ctx: &mut Context, now: Now) {
        self.sas.postpone_rekey(now.monotonic + RETRY_SLOW);
        match &mut self.attempt {
            Some(attempt) if self.config.initiate == Initiate::AtStart => {
                attempt.slow = true;
                attempt.next_at = now.monotonic + RETRY_SLOW + ctx.random.up_to(RETRY_SLOW / 4);
            }
            _ => {
                self.unreachable = true;
                self.end_attempt(ctx);
            }
        }
    }

    fn end_attempt(&mut self, ctx: &mut Context) {
        if let Some(attempt) = self.attempt.take() {
            ctx.release_index(attempt.index);
            ctx.release_spi(attempt.spi);
        }
    }

    /// The answer is there: both ends can receive, so switch, and say so with a dummy.
    fn complete(
        &mut self,
        ctx: &mut Context,
        now: Now,
        from: SocketAddr,
        session: &Session,
        spi: Spi,
        suite: AeadSuite,
    ) {
        let Some(attempt) = self.attempt.take() else {
            return;
        };
        ctx.release_index(attempt.index); // the SPI stays ours: its SA is installed now
        let Ok(keys) = session.esp_keys(suite, self.config.esn, attempt.spi, spi) else {
            return ctx.release_spi(attempt.spi); // cannot happen short of a key of zeros
        };
        let Some(path) = path(ctx, from) else {
            ctx.release_spi(attempt.spi);
            return ctx.drop_message(DropReason::HandshakeMalformed);
        };
        let mut commands = Vec::new();
        self.follow(ctx, now, from, &mut commands);
        let pair = self.sa_pair(
            path,
            (attempt.spi, keys.to_initiator),
            (spi, keys.to_responder),
        );
        let schedule = self.schedule(ctx, now, Role::Initiator);
        let rekey = self.sas.current().is_some();
        commands.extend(self.sas.activate(now.monotonic, pair, schedule));
        ctx.commands(commands);
        ctx.dummy(self.config.id);
        self.confirm = Some(Confirm {
            next_at: now.monotonic + CONFIRM_FIRST,
            repetition: 1,
        });
        self.echoes.clear();
        self.established(ctx, now, suite, rekey);
    }
}

// The responder's side.
impl Peer {
    /// Whether our own initiation goes before theirs, so that of two that cross only one is answered:
    /// the one from the lower public key. One that has got no answer for a while has lost its precedence.
    fn wins_against_theirs(&self, ctx: &Context, now: Now) -> bool {
        let fresh = |attempt: &&Attempt| {
            !attempt.yielded && now.monotonic.saturating_sub(attempt.sent_at) < PENDING_YOUNG
        };
        self.attempt.as_ref().filter(fresh).is_some() && ctx.public_key < self.config.public_key
    }

    /// Whether both ends want the same, and the suite: the first on the list of the end with the lower
    /// public key that the other has too, so it is the same one whoever asks.
    fn choose(&self, ctx: &Context, offer: &Offer) -> Result<AeadSuite, Disagreement> {
        if offer.kem != self.config.kem {
            return Err(Disagreement::Kem);
        }
        if offer.esn != self.config.esn {
            return Err(Disagreement::Esn);
        }
        let (lower, higher) = match ctx.public_key < self.config.public_key {
            true => (&self.config.suites, &offer.suites),
            false => (&offer.suites, &self.config.suites),
        };
        lower
            .iter()
            .find(|suite| higher.contains(suite))
            .copied()
            .ok_or(Disagreement::Suites)
    }

    /// Installs the inbound SA, then answers.
    #[allow(clippy::too_many_arguments)] // one caller, which has just sorted these out
    fn accept(
        &mut self,
        ctx: &mut Context,
        now: Now,
        from: SocketAddr,
        opened: Opened,
        offer: &Offer,
        suite: AeadSuite,
        mut commands: Vec<SaCommand>,
    ) {
        let spi = ctx.allocate_spi();
        let (psk, window) = (self.config.psk.as_ref(), self.config.window.packets());
        let answered = opened
            .accept(&mut ctx.random, psk, offer, spi, suite, window)
            .and_then(|(message, session)| {
                let keys = session.esp_keys(suite, self.config.esn, offer.spi, spi)?;
                Ok((message, keys))
            });
        let (Ok((mut message, keys)), Some(path)) = (answered, path(ctx, from)) else {
            ctx.release_spi(spi);
            ctx.commands(commands);
            return ctx.drop_message(DropReason::HandshakeMalformed); // such as no valid KEM key
        };
        self.peer_window_packets = offer.window_packets;
        let pair = self.sa_pair(
            path,
            (spi, keys.to_responder),
            (offer.spi, keys.to_initiator),
        );
        let schedule = self.schedule(ctx, now, Role::Responder);
        commands.extend(self.sas.stage(now.monotonic, pair, schedule));
        ctx.commands(commands);
        self.macs.append_mac1(&mut message);
        ctx.send(from, &message);
        if let Some(attempt) = &mut self.attempt {
            attempt.yielded = true;
            attempt.next_at = now.monotonic + YIELD + ctx.random.up_to(YIELD / 4);
        }
    }

    /// The peer sends with a key that is new to us.
    fn handle_first_packet(&mut self, ctx: &mut Context, now: Now, inbound: Spi) {
        let path = self.endpoint.and_then(|endpoint| path(ctx, endpoint));
        match self.sas.first_packet(now.monotonic, inbound, path) {
            FirstPacket::Switched { commands, replaces } => {
                self.end_attempt(ctx);
                ctx.commands(commands);
                ctx.dummy(self.config.id);
                self.echoes = ECHO.map(|later| now.monotonic + later).into();
                self.confirm = None;
                if let Some(suite) = self.sas.current().map(|pair| pair.suite) {
                    self.established(ctx, now, suite, replaces);
                }
            }
            FirstPacket::Confirmed => self.confirm = None,
            FirstPacket::Nothing => {}
        }
    }
}

// Both sides.
impl Peer {
    fn established(&mut self, ctx: &mut Context, now: Now, suite: AeadSuite, rekey: bool) {
        self.handshakes += 1;
        self.rekeys += u64::from(rekey);
        self.last_handshake = Some(now);
        self.unreachable = false;
        self.refused_until = Duration::ZERO;
        self.liveness.reset(now.monotonic);
        self.last_notices.clear();
        if let Some(endpoint) = self.endpoint {
            let kem = self.config.kem;
            self.notice(
                ctx,
                now,
                NoticeEvent::Established {
                    endpoint,
                    suite,
                    kem,
                    rekey,
                },
            );
        }
    }

    /// The peer's authenticated packets come from here: answer there.
    fn follow(
        &mut self,
        ctx: &mut Context,
        now: Now,
        to: SocketAddr,
        commands: &mut Vec<SaCommand>,
    ) {
        if self.endpoint == Some(to) || !crate::config::is_usable(to) {
            return;
        }
        let from = self.endpoint.replace(to);
        if self.sas.current().is_some() {
            commands.push(SaCommand::MoveEndpoint {
                tunnel: self.config.id,
                remote: to,
            });
        }
        self.notice(ctx, now, NoticeEvent::Moved { from, to });
    }

    /// The current SAs carry nothing any more: fail closed, and start over when asked.
    fn end_current(&mut self, ctx: &mut Context, now: Now) {
        let commands = self.sas.remove_current();
        ctx.commands(commands);
        self.confirm = None;
        self.echoes.clear();
        self.notice(ctx, now, NoticeEvent::Expired);
        if self.should_be_there() {
            self.start(ctx, now);
        }
    }

    fn send_due_dummies(&mut self, ctx: &mut Context, now: Now) {
        if self.sas.current().is_none() {
            return;
        }
        if let Some(confirm) = self
            .confirm
            .as_mut()
            .filter(|confirm| now.monotonic >= confirm.next_at)
        {
            confirm.next_at = now.monotonic
                + backoff(
                    CONFIRM_FIRST,
                    CONFIRM_MOST,
                    confirm.repetition,
                    &mut ctx.random,
                );
            confirm.repetition += 1;
            ctx.dummy(self.config.id);
        }
        if self
            .echoes
            .pop_front_if(|due| now.monotonic >= *due)
            .is_some()
        {
            ctx.dummy(self.config.id);
        }
        let policy = self.liveness_policy();
        match self.liveness.due(now.monotonic, policy) {
            Some(LivenessAction::SendDummy) => ctx.dummy(self.config.id),
            Some(LivenessAction::AskWhetherAlive(silence)) => {
                self.notice(
                    ctx,
                    now,
                    NoticeEvent::Silent {
                        seconds: silence.as_secs(),
                    },
                );
                self.start(ctx, now);
            }
            None => {}
        }
    }

    /// Something is configured otherwise over there.
    fn disagree(&mut self, ctx: &mut Context, now: Now, why: Disagreement) {
        self.failures += 1;
        self.refused_until = now.monotonic + RETRY_SLOW;
        self.notice(ctx, now, NoticeEvent::Disagreement(why));
        ctx.drop_message(DropReason::HandshakeSettings);
    }

    /// Tells the operator, but not the same over and over.
    fn notice(&mut self, ctx: &mut Context, now: Now, event: NoticeEvent) {
        let kind = discriminant(&event);
        let recently =
            |(last, at): &(_, Duration)| *last == kind && now.monotonic < *at + NOTICE_PAUSE;
        if self.last_notices.iter().any(recently) {
            return;
        }
        if event.severity() > Severity::Info {
            self.last_notices.retain(|(last, _)| *last != kind);
            self.last_notices.push((kind, now.monotonic));
        }
        ctx.notice(
            Some(PeerLabel {
                id: self.config.id,
                name: self.config.name.clone(),
            }),
            event,
        );
    }

    fn is_current(&self, sa: SaId) -> bool {
        self.sas.current().is_some_and(|pair| match sa.direction {
            Direction::Inbound => pair.inbound == sa.spi,
            Direction::Outbound => pair.outbound == sa.spi,
        })
    }

    fn liveness_policy(&self) -> LivenessPolicy {
        let seconds =
            |seconds: Option<u16>| seconds.map(|seconds| Duration::from_secs(seconds.into()));
        LivenessPolicy {
            keepalive: seconds(self.config.keepalive_seconds),
            dead_after: seconds(self.config.dead_after_seconds),
        }
    }

    /// The initiator replaces its SAs up to a tenth early; the responder only if that has not happened.
    fn schedule(&self, ctx: &mut Context, now: Now, role: Role) -> Schedule {
        let lifetime = Duration::from_secs(self.config.rekey.seconds.into());
        let jitter = ctx.random.up_to(lifetime / 10);
        let rekey_after = match role {
            Role::Initiator => lifetime - jitter,
            Role::Responder => lifetime + (lifetime / 4).max(PENDING_YOUNG) + jitter,
        };
        Schedule {
            rekey_at: now.monotonic + rekey_after,
            ends_at: now.monotonic + lifetime + OVERTIME,
        }
    }

    fn sa_pair(
        &self,
        path: OuterPath,
        inbound: (Spi, KeyMaterial),
        outbound: (Spi, KeyMaterial),
    ) -> SaPair {
        let sa = |direction, (spi, key)| SaParams {
            tunnel: self.config.id,
            direction,
            spi,
            key,
            esn: self.config.esn,
            window: self.config.window,
            path,
            selectors: self.config.selectors.clone(),
            lifetime: self.lifetime(),
            sequence: SequenceStart::FRESH,
        };
        SaPair {
            inbound: sa(Direction::Inbound, inbound),
            outbound: sa(Direction::Outbound, outbound),
        }
    }

    /// Bytes and packets are counted by the dataplane. Seconds are ours; its own limit is only the
    /// last resort, should we stop.
    fn lifetime(&self) -> Lifetime {
        let rekey = &self.config.rekey;
        let soft_packets = match self.config.esn {
            Esn::On => rekey.packets,
            Esn::Off => Some(
                rekey
                    .packets
                    .unwrap_or(u64::MAX)
                    .min(SOFT_PACKETS_WITHOUT_ESN),
            ),
        };
        let hard =
            |soft: Option<u64>, slack: u64| soft.map(|soft| soft.saturating_add(soft.max(slack)));
        let soft = Limits {
            bytes: rekey.bytes,
            packets: soft_packets,
            seconds: None,
        };
        let hard = Limits {
            bytes: hard(soft.bytes, SLACK_BYTES),
            packets: hard(soft.packets, SLACK_PACKETS),
            seconds: Some(u64::from(rekey.seconds) + OVERTIME.as_secs() + 1),
        };
        Lifetime::new(soft, hard).unwrap_or(Lifetime::UNLIMITED) // limits of 0 were refused by check_peers
    }
}

/// From us to there, ESP in UDP between the same ports as the handshake's.
fn path(ctx: &Context, to: SocketAddr) -> Option<OuterPath> {
    let encap = UdpEncap {
        local_port: ctx.node.listen_port,
        remote_port: to.port(),
    };
    OuterPath::new(ctx.local_towards(to.ip()), to.ip(), Some(encap)).ok()
}
