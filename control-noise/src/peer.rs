//! One peer: its handshake if one is under way, its SAs, and what is known of it.
//!
//! ```text
//!            start                     message 2                  first packet
//!   idle ───────────▶ attempt ──────────────────────▶ current ◀──────────────── pending ◀── message 1
//!    ▲                 │  ▲ repeat, backing off        │  │
//!    └─────────────────┘  └────────────────────────────┘  └──▶ ends: removed, idle again
//!      given up              rekey due, peer silent
//! ```

mod initiator;
mod parameters;
mod responder;

use crate::{
    Disagreement, Initiate, NoticeEvent, PeerConfig, PeerLabel, PeerState, PeerStatus, Severity,
    context::Context,
    cookie::{HeldCookie, PublicMacs},
    liveness::{Liveness, LivenessAction, LivenessPolicy},
    timers::{CONFIRM_FIRST, CONFIRM_MOST, NOTICE_PAUSE, PENDING_YOUNG, RETRY_SLOW, backoff},
    turnover::{Role, Turnover},
    wire::Timestamp,
};
use esplane_api::{
    AeadSuite, Direction, DropReason, Now, SaCommand, SaEvent, SaId, TunnelActivity,
};
use initiator::Attempt;
use parameters::same_sas;
use std::{
    collections::VecDeque,
    mem::{Discriminant, discriminant},
    net::SocketAddr,
    time::Duration,
};

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
    /// Packets wait, and if our answer is not confirmed by then, we ask ourselves.
    wanted_at: Option<Duration>,
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

struct Confirm {
    next_at: Duration,
    repetition: u32,
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
            wanted_at: None,
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
        let made_with =
            |config: &PeerConfig| (config.selectors.clone(), config.window, config.parallel_sas);
        if made_with(&before) != made_with(&self.config) {
            // Installed SAs stay as they were made.
            self.sas.hasten_rekey(now.monotonic);
        }
    }

    /// The peer is not configured any more, or entirely otherwise: gives back what it held.
    pub(crate) fn forget_sas(&mut self, ctx: &mut Context) {
        self.end_attempt(ctx);
        ctx.release_spis(self.sas.inbound_spis());
        self.sas = Turnover::new(self.config.id);
        (self.confirm, self.cookie, self.unreachable) = (None, None, false);
        self.echoes.clear();
        self.wanted_at = None;
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

    pub(crate) fn handle_event(&mut self, ctx: &mut Context, now: Now, event: SaEvent) {
        match event {
            SaEvent::SaNeeded { .. } => self.handle_need(ctx, now),
            SaEvent::FirstReceived { sa } => self.handle_first_packet(ctx, now, sa.spi),
            SaEvent::SoftExpired { sa, .. } | SaEvent::SequenceLow { sa, .. }
                if self.is_current(sa) =>
            {
                let patience = match self.sas.current().map(|generation| generation.role) {
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
            .is_some_and(|generation| now.monotonic >= generation.ends_at)
        {
            self.end_current(ctx, now);
        }
        self.send_due_dummies(ctx, now);
        self.repeat_attempt(ctx, now);
        let wanted = self.wanted_at.take_if(|at| now.monotonic >= *at).is_some();
        let rekey = self.sas.rekey_at().is_some_and(|at| now.monotonic >= at);
        if wanted || rekey {
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
            current.map(|generation| generation.ends_at),
            self.sas.expires_at(),
            self.wanted_at,
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
            suite: self.sas.current().map(|generation| generation.suite),
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

// What both sides of a handshake come to.
impl Peer {
    fn established(&mut self, ctx: &mut Context, now: Now, suite: AeadSuite, rekey: bool) {
        self.handshakes += 1;
        self.rekeys += u64::from(rekey);
        self.last_handshake = Some(now);
        self.unreachable = false;
        (self.wanted_at, self.refused_until) = (None, Duration::ZERO);
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
        self.sas
            .current()
            .is_some_and(|generation| match sa.direction {
                Direction::Inbound => generation.inbound.contains(&sa.spi),
                Direction::Outbound => generation.outbound.contains(&sa.spi),
            })
    }

    fn liveness_policy(&self) -> LivenessPolicy {
        let seconds =
            |seconds: Option<u16>| seconds.map(|seconds| Duration::from_secs(seconds.into()));
        LivenessPolicy {
            keepalive: seconds(self.config.keepalive_seconds),
            dead_after: seconds(self.config.dead_after_seconds),
            several_ports: self
                .sas
                .current()
                .is_some_and(|generation| generation.outbound.len() > 1),
        }
    }
}
