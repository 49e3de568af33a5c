//! Make before break: the SAs of one tunnel, from the one to come to the last straggler's.
//!
//! ```text
//!              answered (responder)              confirmed: first packet received
//!   ─────────▶ pending ─────────────────────────▶ current ───────────────▶ old
//!              inbound installed,                 both installed,          inbound only, for stragglers;
//!              outbound kept back                 outbound sends           removed after the grace time
//!   ─────────────────────────────────────────────▶
//!              got the answer (initiator)
//! ```
//! At any time there is at most one outbound SA, and inbound ones for every key that the peer may
//! still or already be sending with: at most [`MOST_PENDING`] + 1 + [`MOST_OLD`].

use crate::timers::{CONFIRM_MOST, GRACE, PENDING_MOST, PENDING_YOUNG};
use esplane_api::{
    AeadSuite, Direction, OuterPath, SaCommand, SaId, SaPair, SaParams, Spi, TunnelId,
};
use std::{collections::VecDeque, time::Duration};

/// Answers that wait for their confirmation at once; more than one only while answers get lost.
pub(crate) const MOST_PENDING: usize = 3;
/// Superseded inbound SAs at once; more than one only when rekeying faster than the grace time.
pub(crate) const MOST_OLD: usize = 4;

/// Who started the handshake that an SA pair came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Initiator,
    Responder,
}

/// What is remembered of a pair once its parameters are with the dataplane.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub inbound: Spi,
    pub outbound: Spi,
    pub suite: AeadSuite,
    pub role: Role,
    /// Whether something has come in on it, so that the peer has the keys too.
    pub confirmed: bool,
    pub since: Duration,
    /// When to negotiate a successor.
    pub rekey_at: Duration,
    /// When it ends, successor or not.
    pub ends_at: Duration,
    /// The peer did not answer or refused: no successor before this.
    not_before: Duration,
    /// Grows with every pair of this tunnel.
    serial: u64,
}

/// When a new pair is to be replaced, and when it ends at the latest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub rekey_at: Duration,
    pub ends_at: Duration,
}

struct Pending {
    pair: Pair,
    outbound: SaParams,
}

struct Old {
    inbound: Spi,
    remove_at: Duration,
}

/// All SAs of one tunnel.
pub(crate) struct Turnover {
    tunnel: TunnelId,
    current: Option<Pair>,
    /// Oldest first.
    pending: VecDeque<Pending>,
    /// Oldest first.
    old: VecDeque<Old>,
    serial: u64,
}

/// What the first packet on an inbound SA meant.
pub(crate) enum FirstPacket {
    /// The peer has taken our answer: carry these out, the new pair is current.
    Switched {
        commands: Vec<SaCommand>,
        replaces: bool,
    },
    /// The peer has taken an answer of ours, and a later handshake of our own has overtaken it: what
    /// it sends with that is welcome, but we stay with the current pair.
    Overtaken(Vec<SaCommand>),
    /// The peer sends with the current pair too.
    Confirmed,
    /// Nothing new.
    Nothing,
}

impl Turnover {
    pub(crate) fn new(tunnel: TunnelId) -> Self {
        Self {
            tunnel,
            current: None,
            pending: VecDeque::new(),
            old: VecDeque::new(),
            serial: 0,
        }
    }

    pub(crate) fn current(&self) -> Option<&Pair> {
        self.current.as_ref()
    }

    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Every inbound SPI that is installed.
    pub(crate) fn inbound_spis(&self) -> impl Iterator<Item = Spi> + '_ {
        let pending = self.pending.iter().map(|pending| pending.pair.inbound);
        let old = self.old.iter().map(|old| old.inbound);
        self.current
            .iter()
            .map(|pair| pair.inbound)
            .chain(pending)
            .chain(old)
    }

    /// Whether an answer of ours went out a moment ago.
    pub(crate) fn has_young_pending(&self, now: Duration) -> bool {
        self.pending
            .back()
            .is_some_and(|pending| now.saturating_sub(pending.pair.since) < PENDING_YOUNG)
    }

    /// The responder, before it answers: receive from now on, send only when the initiator does.
    pub(crate) fn stage(
        &mut self,
        now: Duration,
        sas: SaPair,
        schedule: Schedule,
    ) -> Vec<SaCommand> {
        let pair = self.pair(now, &sas, Role::Responder, schedule);
        let mut commands = vec![SaCommand::Install(sas.inbound)];
        self.pending.push_back(Pending {
            pair,
            outbound: sas.outbound,
        });
        if self.pending.len() > MOST_PENDING
            && let Some(oldest) = self.pending.pop_front()
        {
            self.keep_for_stragglers(oldest.pair.inbound, now + GRACE, &mut commands);
        }
        commands
    }

    /// The initiator, with the answer in hand: the responder receives already, so send at once.
    pub(crate) fn activate(
        &mut self,
        now: Duration,
        sas: SaPair,
        schedule: Schedule,
    ) -> Vec<SaCommand> {
        let pair = self.pair(now, &sas, Role::Initiator, schedule);
        let mut commands = vec![SaCommand::Install(sas.inbound)];
        self.switch(now, pair, sas.outbound, &mut commands);
        commands
    }

    /// Something authentic has arrived on an inbound SA for the first time.
    pub(crate) fn first_packet(
        &mut self,
        now: Duration,
        inbound: Spi,
        path: Option<OuterPath>,
    ) -> FirstPacket {
        if let Some(current) = &mut self.current
            && current.inbound == inbound
        {
            if current.confirmed {
                return FirstPacket::Nothing;
            }
            current.confirmed = true;
            self.start_grace(now);
            return FirstPacket::Confirmed;
        }
        let Some(index) = self
            .pending
            .iter()
            .position(|pending| pending.pair.inbound == inbound)
        else {
            return FirstPacket::Nothing;
        };
        let Some(Pending {
            mut pair,
            mut outbound,
        }) = self.pending.remove(index)
        else {
            return FirstPacket::Nothing;
        };
        let mut commands = Vec::new();
        let replaces = self.current.is_some();
        if self
            .current
            .as_ref()
            .is_some_and(|current| current.serial > pair.serial)
        {
            self.keep_for_stragglers(inbound, now + GRACE, &mut commands);
            return FirstPacket::Overtaken(commands);
        }
        pair.confirmed = true;
        outbound.path = path.unwrap_or(outbound.path); // the peer may have moved meanwhile
        self.switch(now, pair, outbound, &mut commands);
        self.start_grace(now);
        FirstPacket::Switched { commands, replaces }
    }

    /// The current pair carries nothing any more; what is left of it goes.
    pub(crate) fn remove_current(&mut self) -> Vec<SaCommand> {
        let Some(current) = self.current.take() else {
            return Vec::new();
        };
        vec![
            self.remove(Direction::Outbound, current.outbound),
            self.remove(Direction::Inbound, current.inbound),
        ]
    }

    /// An inbound SA that is not current has ended.
    pub(crate) fn remove_inbound(&mut self, inbound: Spi) -> Vec<SaCommand> {
        let before = self.pending.len() + self.old.len();
        self.pending
            .retain(|pending| pending.pair.inbound != inbound);
        self.old.retain(|old| old.inbound != inbound);
        match self.pending.len() + self.old.len() < before {
            true => vec![self.remove(Direction::Inbound, inbound)],
            false => Vec::new(),
        }
    }

    /// Removes what nobody waits for any more. Also says whether an answer was never confirmed.
    pub(crate) fn expire(&mut self, now: Duration) -> (Vec<SaCommand>, bool) {
        let mut commands = Vec::new();
        let mut unconfirmed = false;
        while let Some(pending) = self
            .pending
            .pop_front_if(|pending| now >= pending.pair.since + PENDING_MOST)
        {
            commands.push(self.remove(Direction::Inbound, pending.pair.inbound));
            unconfirmed = self
                .current
                .as_ref()
                .is_none_or(|current| current.serial < pending.pair.serial);
        }
        let tunnel = self.tunnel;
        self.old.retain(|old| {
            if now >= old.remove_at {
                commands.push(SaCommand::Remove(SaId {
                    tunnel,
                    direction: Direction::Inbound,
                    spi: old.inbound,
                }));
            }
            now < old.remove_at
        });
        (commands, unconfirmed)
    }

    /// When [`Self::expire`] has something to do.
    pub(crate) fn expires_at(&self) -> Option<Duration> {
        let pending = self
            .pending
            .front()
            .map(|pending| pending.pair.since + PENDING_MOST);
        pending
            .into_iter()
            .chain(self.old.iter().map(|old| old.remove_at))
            .min()
    }

    /// When to negotiate a successor; not before the current pair is known to work.
    pub(crate) fn rekey_at(&self) -> Option<Duration> {
        let current = self.current.as_ref()?;
        let wanted = if current.confirmed {
            current.rekey_at
        } else {
            current.since + CONFIRM_MOST
        };
        Some(wanted.max(current.not_before))
    }

    /// Asks for a successor at `at`, if not sooner.
    pub(crate) fn hasten_rekey(&mut self, at: Duration) {
        if let Some(current) = &mut self.current {
            current.rekey_at = current.rekey_at.min(at);
        }
    }

    /// The peer does not answer: ask again at `at`.
    pub(crate) fn postpone_rekey(&mut self, at: Duration) {
        if let Some(current) = &mut self.current {
            current.not_before = at;
        }
    }

    /// Makes a pair current and its outbound SA the only one.
    fn switch(
        &mut self,
        now: Duration,
        pair: Pair,
        outbound: SaParams,
        commands: &mut Vec<SaCommand>,
    ) {
        let (tunnel, spi, serial) = (self.tunnel, pair.outbound, pair.serial);
        let before = self.current.replace(pair);
        let before_outbound = before
            .as_ref()
            .map(|before| self.remove(Direction::Outbound, before.outbound));
        // A peer that gives a new SA its old one's SPI can have only one of them; it has chosen.
        let same_spi = before.as_ref().is_some_and(|before| before.outbound == spi);
        let (first, last) = if same_spi {
            (before_outbound, None)
        } else {
            (None, before_outbound)
        };
        commands.extend(first);
        commands.extend([
            SaCommand::Install(outbound),
            SaCommand::Activate { tunnel, spi },
        ]);
        commands.extend(last);
        if let Some(before) = before {
            // Until the peer is known to send with the new pair, it may send with this one.
            self.keep_for_stragglers(before.inbound, before.ends_at, commands);
        }
        while let Some(earlier) = self
            .pending
            .pop_front_if(|pending| pending.pair.serial < serial)
        {
            self.keep_for_stragglers(earlier.pair.inbound, now + GRACE, commands);
        }
    }

    fn keep_for_stragglers(
        &mut self,
        inbound: Spi,
        remove_at: Duration,
        commands: &mut Vec<SaCommand>,
    ) {
        self.old.push_back(Old { inbound, remove_at });
        if self.old.len() > MOST_OLD
            && let Some(oldest) = self.old.pop_front()
        {
            commands.push(self.remove(Direction::Inbound, oldest.inbound));
        }
    }

    /// The peer sends with the current pair: what is older can only be on its way.
    fn start_grace(&mut self, now: Duration) {
        for old in &mut self.old {
            old.remove_at = old.remove_at.min(now + GRACE);
        }
    }

    fn pair(&mut self, now: Duration, sas: &SaPair, role: Role, schedule: Schedule) -> Pair {
        self.serial += 1;
        Pair {
            inbound: sas.inbound.spi,
            outbound: sas.outbound.spi,
            suite: sas.outbound.key.suite(),
            role,
            confirmed: false,
            since: now,
            rekey_at: schedule.rekey_at,
            ends_at: schedule.ends_at,
            not_before: Duration::ZERO,
            serial: self.serial,
        }
    }

    fn remove(&self, direction: Direction, spi: Spi) -> SaCommand {
        SaCommand::Remove(SaId {
            tunnel: self.tunnel,
            direction,
            spi,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use esplane_api::{Esn, KeyMaterial, Lifetime, SequenceStart, UdpEncap, WindowSize};
    use std::collections::BTreeSet;

    const SCHEDULE: Schedule = Schedule {
        rekey_at: Duration::from_secs(600),
        ends_at: Duration::from_secs(780),
    };

    fn sas(number: u32) -> SaPair {
        let encap = Some(UdpEncap {
            local_port: 4500,
            remote_port: 4500,
        });
        let sa = |direction| SaParams {
            tunnel: TunnelId(1),
            direction,
            spi: Spi::new(number).unwrap(),
            key: KeyMaterial::new(AeadSuite::Aes128Gcm16, &[number as u8; 20]).unwrap(),
            esn: Esn::On,
            window: WindowSize::DEFAULT,
            path: OuterPath::new([0, 0, 0, 0].into(), [192, 0, 2, 1].into(), encap).unwrap(),
            selectors: Vec::new(),
            lifetime: Lifetime::UNLIMITED,
            sequence: SequenceStart::FRESH,
        };
        SaPair {
            inbound: sa(Direction::Inbound),
            outbound: sa(Direction::Outbound),
        }
    }

    /// The inbound SPIs that are installed once these commands are carried out.
    fn carry_out(installed: &mut BTreeSet<u32>, commands: Vec<SaCommand>) {
        for command in commands {
            match command {
                SaCommand::Install(sa) if sa.direction == Direction::Inbound => {
                    assert!(installed.insert(sa.spi.get()));
                }
                SaCommand::Remove(sa) if sa.direction == Direction::Inbound => {
                    assert!(installed.remove(&sa.spi.get()));
                }
                _ => {}
            }
        }
    }

    #[test]
    fn what_is_installed_is_known_and_bounded_in_every_order_of_events() {
        let now = Duration::from_secs(1);
        for order in 0..4_096_u32 {
            let (mut turnover, mut installed) = (Turnover::new(TunnelId(1)), BTreeSet::new());
            for step in 0..12 {
                let number = 300 + step;
                let commands = match order >> step & 1 {
                    0 => turnover.stage(now, sas(number), SCHEDULE),
                    _ => turnover.activate(now, sas(number), SCHEDULE),
                };
                carry_out(&mut installed, commands);
                // A packet arrives with a key of some steps ago.
                let inbound = Spi::new(number - (order >> 4) % (step + 1)).unwrap();
                match turnover.first_packet(now, inbound, None) {
                    FirstPacket::Switched { commands, .. } | FirstPacket::Overtaken(commands) => {
                        carry_out(&mut installed, commands);
                    }
                    FirstPacket::Confirmed | FirstPacket::Nothing => {}
                }
                let known: BTreeSet<u32> = turnover.inbound_spis().map(Spi::get).collect();
                assert_eq!(known, installed, "order {order:#b}, step {step}");
                assert!(installed.len() <= MOST_PENDING + 1 + MOST_OLD);
            }
            carry_out(&mut installed, turnover.remove_current());
            carry_out(&mut installed, turnover.expire(now + SCHEDULE.ends_at).0);
            assert!(
                installed.is_empty(),
                "order {order:#b} leaves {installed:?}"
            );
        }
    }

    #[test]
    fn a_peer_that_reuses_its_spi_replaces_its_sa() {
        let mut turnover = Turnover::new(TunnelId(1));
        turnover.activate(Duration::ZERO, sas(300), SCHEDULE);
        let mut again = sas(301);
        again.outbound.spi = Spi::new(300).unwrap();
        let commands = turnover.activate(Duration::ZERO, again, SCHEDULE);
        let outbound = |command: &&SaCommand| match command {
            SaCommand::Install(sa) => sa.direction == Direction::Outbound,
            SaCommand::Remove(sa) => sa.direction == Direction::Outbound,
            _ => false,
        };
        let order: Vec<_> = commands.iter().filter(outbound).collect();
        assert!(
            matches!(order[..], [SaCommand::Remove(_), SaCommand::Install(_)]),
            "{order:?}"
        );
    }
}
