//! The initiator's side: ask, repeat, complete.

use super::{Confirm, Peer, parameters::path};
use crate::{
    Disagreement, Initiate, NoticeEvent,
    context::Context,
    cookie::{self, HeldCookie},
    handshake::{HandshakeError, Session, Terms, Waiting},
    timers::{
        CONFIRM_FIRST, GIVE_UP, PENDING_YOUNG, RETRY_FIRST, RETRY_MOST, RETRY_SLOW, RETRY_WANTED,
        backoff,
    },
    turnover::Role,
    wire::{Answer, CookieReply, MAC_BYTES, Response, Spis, Timestamp},
};
use esplane_api::{AeadSuite, DropReason, Now};
use std::{net::SocketAddr, time::Duration};

/// A handshake that we have started.
pub(super) struct Attempt {
    pub(super) waiting: Waiting,
    pub(super) index: u32,
    pub(super) spis: Spis,
    /// Header, Noise message and MAC1 of the last initiation: all but MAC2, to be sent again with a cookie.
    pub(super) message: Vec<u8>,
    pub(super) mac1: [u8; MAC_BYTES],
    pub(super) sent_to: SocketAddr,
    pub(super) sent_at: Duration,
    pub(super) started: Duration,
    pub(super) repetition: u32,
    pub(super) next_at: Duration,
    /// The peer's own initiation goes first; ours is tried again if that comes to nothing.
    pub(super) yielded: bool,
    /// Long unanswered: goes on slowly.
    pub(super) slow: bool,
}

impl Peer {
    /// A packet waits for an SA.
    pub(super) fn handle_need(&mut self, ctx: &mut Context, now: Now) {
        if self.sas.current().is_some() || now.monotonic < self.refused_until {
            return;
        }
        if let Some(attempt) = &mut self.attempt {
            // Somebody waits now: do not sit out a long pause.
            attempt.next_at = attempt.next_at.min(attempt.sent_at + RETRY_WANTED);
        } else if self.sas.has_young_pending(now.monotonic) {
            self.wanted_at = Some(now.monotonic + PENDING_YOUNG);
        } else {
            self.start(ctx, now);
        }
    }

    /// Starts a handshake, unless one is under way.
    pub(crate) fn start(&mut self, ctx: &mut Context, now: Now) {
        if self.attempt.is_none() {
            self.send_initiation(ctx, now, now.monotonic, 0);
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
                    spis,
                    suite,
                    window_packets,
                    ..
                },
                Some(session),
            )) if self.config.suites.contains(&suite) => {
                self.peer_window_packets = window_packets;
                self.complete(ctx, now, from, &session, &spis, suite);
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

    /// The handshake that is under way gets no answer: once more, more slowly, or never mind.
    pub(super) fn repeat_attempt(&mut self, ctx: &mut Context, now: Now) {
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

    pub(super) fn end_attempt(&mut self, ctx: &mut Context) {
        if let Some(attempt) = self.attempt.take() {
            ctx.release_index(attempt.index);
            ctx.release_spis(attempt.spis.all());
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
        let index = ctx.allocate_index(self.config.id);
        let spis = ctx.allocate_spis(self.config.parallel_sas);
        let terms = Terms {
            timestamp,
            spis: &spis,
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
            return ctx.release_spis(spis.all());
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
            spis,
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

    /// The answer is there: both ends can receive, so switch, and say so with a dummy.
    fn complete(
        &mut self,
        ctx: &mut Context,
        now: Now,
        from: SocketAddr,
        session: &Session,
        spis: &Spis,
        suite: AeadSuite,
    ) {
        let Some(attempt) = self.attempt.take() else {
            return;
        };
        ctx.release_index(attempt.index); // the SPIs stay ours: their SAs are installed now
        let ours = attempt.spis;
        let Ok(keys) = session.esp_keys(suite, self.config.esn, &ours, spis) else {
            return ctx.release_spis(ours.all()); // cannot happen short of a key of zeros
        };
        let Some(path) = path(ctx, from) else {
            ctx.release_spis(ours.all());
            return ctx.drop_message(DropReason::HandshakeMalformed);
        };
        let mut commands = Vec::new();
        self.follow(ctx, now, from, &mut commands);
        let inbound = (&ours, keys.to_initiator);
        let sas = self.negotiated(ctx, path, suite, inbound, (spis, keys.to_responder));
        let schedule = self.schedule(ctx, now, Role::Initiator);
        let rekey = self.sas.current().is_some();
        commands.extend(self.sas.activate(now.monotonic, sas, schedule));
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
