//! The responder's side: agree or refuse, answer, and wait until the initiator sends.

use super::{Attempt, Peer, parameters::path};
use crate::{
    Disagreement, NoticeEvent,
    context::Context,
    handshake::{HandshakeError, Opened},
    timers::{ECHO, PENDING_YOUNG, YIELD},
    turnover::{FirstPacket, Role},
    wire::Offer,
};
use esplane_api::{AeadSuite, DropReason, Now, SaCommand, Spi};
use std::net::SocketAddr;

impl Peer {
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
            Err(HandshakeError::Unknown) => {
                // Authentic, but perhaps not new: for the log only.
                self.notice(ctx, now, NoticeEvent::Disagreement(Disagreement::Unknown));
                return ctx.drop_message(DropReason::HandshakeSettings);
            }
            Err(_) => return ctx.drop_message(DropReason::HandshakeMalformed),
        };
        if let Some(newest) = self
            .timestamp_received
            .filter(|newest| offer.timestamp <= *newest)
        {
            if offer.timestamp.is_long_before(newest) {
                self.notice(ctx, now, NoticeEvent::Replayed { endpoint: from });
            }
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

    /// The peer sends with a key that is new to us.
    pub(super) fn handle_first_packet(&mut self, ctx: &mut Context, now: Now, inbound: Spi) {
        let first = self.sas.first_packet(now.monotonic, inbound, self.endpoint);
        match first {
            FirstPacket::Switched { commands, replaces } => {
                self.end_attempt(ctx);
                ctx.commands(commands);
                ctx.dummy(self.config.id);
                self.echoes = ECHO.map(|later| now.monotonic + later).into();
                self.confirm = None;
                if let Some(suite) = self.sas.current().map(|generation| generation.suite) {
                    self.established(ctx, now, suite, replaces);
                }
            }
            FirstPacket::Overtaken(commands) => ctx.commands(commands),
            FirstPacket::Confirmed => self.confirm = None,
            FirstPacket::Nothing => {}
        }
    }

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
        let spis = ctx.allocate_spis(self.config.parallel_sas);
        let (psk, window) = (self.config.psk.as_ref(), self.config.window.packets());
        let answered = opened
            .accept(&mut ctx.random, psk, offer, &spis, suite, window)
            .and_then(|(message, session)| {
                let keys = session.esp_keys(suite, self.config.esn, &offer.spis, &spis)?;
                Ok((message, keys))
            });
        let (Ok((mut message, keys)), Some(path)) = (answered, path(ctx, from)) else {
            ctx.release_spis(spis.all());
            ctx.commands(commands);
            return ctx.drop_message(DropReason::HandshakeMalformed); // such as no valid KEM key
        };
        self.peer_window_packets = offer.window_packets;
        let outbound = (&offer.spis, keys.to_initiator);
        let sas = self.negotiated(ctx, path, suite, (&spis, keys.to_responder), outbound);
        let schedule = self.schedule(ctx, now, Role::Responder);
        commands.extend(self.sas.stage(now.monotonic, sas, schedule));
        ctx.commands(commands);
        self.macs.append_mac1(&mut message);
        ctx.send(from, &message);
        if let Some(attempt) = &mut self.attempt {
            attempt.yielded = true;
            attempt.next_at = now.monotonic + YIELD + ctx.random.up_to(YIELD / 4);
        }
    }
}
