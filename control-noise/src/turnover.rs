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
//! A generation is the SAs of one handshake: one each way, or several, one for each worker (RFC 9611). At any time there are
//! outbound SAs of at most one generation, and inbound ones of every generation that the peer may still or already be sending
//! with: at most [`MOST_PENDING`] + 1 + [`MOST_OLD`].

use crate::timers::{CONFIRM_MOST, GRACE, PENDING_MOST, PENDING_YOUNG};
use esplane_api::{AeadSuite, Direction, SaCommand, SaId, SaParams, Spi, TunnelId};
use std::{collections::VecDeque, net::SocketAddr, time::Duration};

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

/// The SAs of one handshake, each way at least one; the fallback SA is the first.
pub(crate) struct Sas {
    pub inbound: Vec<SaParams>,
    pub outbound: Vec<SaParams>,
    pub suite: AeadSuite,
}

/// What is remembered of them once their parameters are with the dataplane.
#[derive(Clone, Debug)]
pub(crate) struct Generation {
    pub inbound: Vec<Spi>,
    pub outbound: Vec<Spi>,
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
    /// Grows with every generation of this tunnel.
    serial: u64,
}

/// When a new generation is to be replaced, and when it ends at the latest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub rekey_at: Duration,
    pub ends_at: Duration,
}

struct Pending {
    generation: Generation,
    outbound: Vec<SaParams>,
}

struct Old {
    inbound: Vec<Spi>,
    remove_at: Duration,
}

/// All SAs of one tunnel.
pub(crate) struct Turnover {
    tunnel: TunnelId,
    current: Option<Generation>,
    /// Oldest first.
    pending: VecDeque<Pending>,
    /// Oldest first.
    old: VecDeque<Old>,
    serial: u64,
}

/// What the first packet on an inbound SA meant.
pub(crate) enum FirstPacket {
    /// The peer has taken our answer: carry these out, the new generation is current.
    Switched {
        commands: Vec<SaCommand>,
        replaces: bool,
    },
    /// The peer has taken an answer of ours, and a later handshake of our own has overtaken it: what
    /// it sends with that is welcome, but we stay with the current generation.
    Overtaken(Vec<SaCommand>),
    /// The peer sends with the current generation too.
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

    pub(crate) fn current(&self) -> Option<&Generation> {
        self.current.as_ref()
    }

    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Every inbound SPI that is installed.
    pub(crate) fn inbound_spis(&self) -> impl Iterator<Item = Spi> + '_ {
        let pending = self.pending.iter().map(|pending| &pending.generation);
        let live = self.current.iter().chain(pending);
        let live = live.flat_map(|generation| &generation.inbound);
        live.chain(self.old.iter().flat_map(|old| &old.inbound))
            .copied()
    }

    /// Whether an answer of ours went out a moment ago.
    pub(crate) fn has_young_pending(&self, now: Duration) -> bool {
        self.pending
            .back()
            .is_some_and(|pending| now.saturating_sub(pending.generation.since) < PENDING_YOUNG)
    }

    /// The responder, before it answers: receive from now on, send only when the initiator does.
    pub(crate) fn stage(&mut self, now: Duration, sas: Sas, schedule: Schedule) -> Vec<SaCommand> {
        let generation = self.generation(now, &sas, Role::Responder, schedule);
        let mut commands = install(sas.inbound);
        self.pending.push_back(Pending {
            generation,
            outbound: sas.outbound,
        });
        if self.pending.len() > MOST_PENDING
            && let Some(oldest) = self.pending.pop_front()
        {
            self.keep_for_stragglers(oldest.generation.inbound, now + GRACE, &mut commands);
        }
        commands
    }

    /// The initiator, with the answer in hand: the responder receives already, so send at once.
    pub(crate) fn activate(
        &mut self,
        now: Duration,
        sas: Sas,
        schedule: Schedule,
    ) -> Vec<SaCommand> {
        let generation = self.generation(now, &sas, Role::Initiator, schedule);
        let mut commands = install(sas.inbound);
        self.switch(now, generation, sas.outbound, &mut commands);
        commands
    }

    /// Something authentic has arrived on an inbound SA for the first time.
    pub(crate) fn first_packet(
        &mut self,
        now: Duration,
        inbound: Spi,
        endpoint: Option<SocketAddr>,
    ) -> FirstPacket {
        if let Some(current) = &mut self.current
            && current.inbound.contains(&inbound)
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
            .position(|pending| pending.generation.inbound.contains(&inbound))
        else {
            return FirstPacket::Nothing;
        };
        let Some(Pending {
            mut generation,
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
            .is_some_and(|current| current.serial > generation.serial)
        {
            self.keep_for_stragglers(generation.inbound, now + GRACE, &mut commands);
            return FirstPacket::Overtaken(commands);
        }
        generation.confirmed = true;
        for sa in &mut outbound {
            // The peer may have moved meanwhile; from which of our ports an SA leaves stays its own affair.
            let moved = endpoint.and_then(|endpoint| sa.path.moved_to(endpoint).ok());
            sa.path = moved.unwrap_or(sa.path);
        }
        self.switch(now, generation, outbound, &mut commands);
        self.start_grace(now);
        FirstPacket::Switched { commands, replaces }
    }

    /// The current generation carries nothing any more; what is left of it goes.
    pub(crate) fn remove_current(&mut self) -> Vec<SaCommand> {
        let Some(current) = self.current.take() else {
            return Vec::new();
        };
        let mut commands = self.remove(Direction::Outbound, &current.outbound);
        commands.extend(self.remove(Direction::Inbound, &current.inbound));
        commands
    }

    /// An inbound SA of a generation that is not current has ended; the others of it end with it.
    pub(crate) fn remove_inbound(&mut self, inbound: Spi) -> Vec<SaCommand> {
        let mut gone = Vec::new();
        self.pending.retain(|pending| {
            let ends = pending.generation.inbound.contains(&inbound);
            gone.extend(ends.then(|| pending.generation.inbound.clone()));
            !ends
        });
        self.old.retain(|old| {
            let ends = old.inbound.contains(&inbound);
            gone.extend(ends.then(|| old.inbound.clone()));
            !ends
        });
        self.remove(Direction::Inbound, &gone.concat())
    }

    /// Removes what nobody waits for any more. Also says whether an answer was never confirmed.
    pub(crate) fn expire(&mut self, now: Duration) -> (Vec<SaCommand>, bool) {
        let mut gone = Vec::new();
        let mut unconfirmed = false;
        while let Some(Pending { generation, .. }) = self
            .pending
            .pop_front_if(|pending| now >= pending.generation.since + PENDING_MOST)
        {
            unconfirmed = self
                .current
                .as_ref()
                .is_none_or(|current| current.serial < generation.serial);
            gone.extend(generation.inbound);
        }
        self.old.retain(|old| {
            if now >= old.remove_at {
                gone.extend(&old.inbound);
            }
            now < old.remove_at
        });
        (self.remove(Direction::Inbound, &gone), unconfirmed)
    }

    /// When [`Self::expire`] has something to do.
    pub(crate) fn expires_at(&self) -> Option<Duration> {
        let pending = self
            .pending
            .front()
            .map(|pending| pending.generation.since + PENDING_MOST);
        pending
            .into_iter()
            .chain(self.old.iter().map(|old| old.remove_at))
            .min()
    }

    /// When to negotiate a successor; not before the current generation is known to work.
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

    /// Makes a generation current and its outbound SAs the only ones.
    fn switch(
        &mut self,
        now: Duration,
        generation: Generation,
        outbound: Vec<SaParams>,
        commands: &mut Vec<SaCommand>,
    ) {
        let (tunnel, serial) = (self.tunnel, generation.serial);
        let new = generation.outbound.clone();
        let before = self.current.replace(generation);
        let outbound_before = before.as_ref().map_or(&[][..], |before| &before.outbound);
        // A peer that gives a new SA its old one's SPI can have only one of them; it has chosen.
        let (first, last): (Vec<Spi>, Vec<Spi>) =
            outbound_before.iter().partition(|spi| new.contains(spi));
        commands.extend(self.remove(Direction::Outbound, &first));
        commands.extend(install(outbound));
        let activate = |spi| SaCommand::Activate { tunnel, spi };
        commands.extend(new.into_iter().map(activate));
        commands.extend(self.remove(Direction::Outbound, &last));
        if let Some(before) = before {
            // Until the peer is known to send with the new ones, it may send with these.
            self.keep_for_stragglers(before.inbound, before.ends_at, commands);
        }
        while let Some(earlier) = self
            .pending
            .pop_front_if(|pending| pending.generation.serial < serial)
        {
            self.keep_for_stragglers(earlier.generation.inbound, now + GRACE, commands);
        }
    }

    fn keep_for_stragglers(
        &mut self,
        inbound: Vec<Spi>,
        remove_at: Duration,
        commands: &mut Vec<SaCommand>,
    ) {
        self.old.push_back(Old { inbound, remove_at });
        if self.old.len() > MOST_OLD
            && let Some(oldest) = self.old.pop_front()
        {
            commands.extend(self.remove(Direction::Inbound, &oldest.inbound));
        }
    }

    /// The peer sends with the current generation: what is older can only be on its way.
    fn start_grace(&mut self, now: Duration) {
        for old in &mut self.old {
            old.remove_at = old.remove_at.min(now + GRACE);
        }
    }

    fn generation(
        &mut self,
        now: Duration,
        sas: &Sas,
        role: Role,
        schedule: Schedule,
    ) -> Generation {
        self.serial += 1;
        let spis = |sas: &[SaParams]| sas.iter().map(|sa| sa.spi).collect();
        Generation {
            inbound: spis(&sas.inbound),
            outbound: spis(&sas.outbound),
            suite: sas.suite,
            role,
            confirmed: false,
            since: now,
            rekey_at: schedule.rekey_at,
            ends_at: schedule.ends_at,
            not_before: Duration::ZERO,
            serial: self.serial,
        }
    }

    fn remove(&self, direction: Direction, spis: &[Spi]) -> Vec<SaCommand> {
        let tunnel = self.tunnel;
        let id = |spi: &Spi| SaId {
            tunnel,
            direction,
            spi: *spi,
        };
        spis.iter().map(id).map(SaCommand::Remove).collect()
    }
}

fn install(sas: Vec<SaParams>) -> Vec<SaCommand> {
    sas.into_iter().map(SaCommand::Install).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use esplane_api::{Esn, KeyMaterial, Lifetime, OuterPath, SequenceStart, UdpEncap, WindowSize};
    use std::collections::BTreeSet;

    const SCHEDULE: Schedule = Schedule {
        rekey_at: Duration::from_secs(600),
        ends_at: Duration::from_secs(780),
    };

    /// One to three each way.
    fn sas(number: u32) -> Sas {
        let encap = Some(UdpEncap {
            local_port: 4500,
            remote_port: 4500,
        });
        let suite = AeadSuite::Aes128Gcm16;
        let sa = |direction, more: u32| SaParams {
            tunnel: TunnelId(1),
            direction,
            spi: Spi::new(number + 1000 * more).unwrap(),
            key: KeyMaterial::new(suite, &[number as u8; 20]).unwrap(),
            esn: Esn::On,
            window: WindowSize::DEFAULT,
            path: OuterPath::new([0, 0, 0, 0].into(), [192, 0, 2, 1].into(), encap).unwrap(),
            selectors: Vec::new(),
            lifetime: Lifetime::UNLIMITED,
            sequence: SequenceStart::FRESH,
            worker: more.checked_sub(1).map(|_| more as u16),
        };
        let all = |direction| (0..=number % 3).map(|more| sa(direction, more)).collect();
        Sas {
            inbound: all(Direction::Inbound),
            outbound: all(Direction::Outbound),
            suite,
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
                let number = number - (order >> 4) % (step + 1);
                let more = order % (number % 3 + 1);
                let inbound = Spi::new(number + 1000 * more).unwrap();
                match turnover.first_packet(now, inbound, None) {
                    FirstPacket::Switched { commands, .. } | FirstPacket::Overtaken(commands) => {
                        carry_out(&mut installed, commands);
                    }
                    FirstPacket::Confirmed | FirstPacket::Nothing => {}
                }
                let known: BTreeSet<u32> = turnover.inbound_spis().map(Spi::get).collect();
                assert_eq!(known, installed, "order {order:#b}, step {step}");
                assert!(installed.len() <= 3 * (MOST_PENDING + 1 + MOST_OLD));
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
    fn an_answer_follows_a_peer_that_moved_before_it_was_confirmed_and_keeps_its_own_port() {
        let (now, mut answer) = (Duration::ZERO, sas(302));
        let encap = UdpEncap {
            local_port: 20_001,
            remote_port: 4500,
        };
        let path = answer.outbound[1].path;
        answer.outbound[1].path = OuterPath::new(path.local(), path.remote(), Some(encap)).unwrap();
        let mut turnover = Turnover::new(TunnelId(1));
        turnover.stage(now, answer, SCHEDULE);
        let moved: SocketAddr = "198.51.100.7:61000".parse().unwrap();
        let first = turnover.first_packet(now, Spi::new(302).unwrap(), Some(moved));
        let FirstPacket::Switched { commands, .. } = first else {
            panic!("the peer has confirmed it");
        };
        let paths = commands.iter().filter_map(|command| match command {
            SaCommand::Install(sa) => Some(sa.path),
            _ => None,
        });
        let ends: Vec<_> = paths
            .map(|path| (path.encap().unwrap().local_port, path.remote_socket()))
            .collect();
        assert_eq!(ends, [(4500, moved), (20_001, moved), (4500, moved)]);
    }

    #[test]
    fn a_peer_that_reuses_its_spi_replaces_its_sa() {
        let mut turnover = Turnover::new(TunnelId(1));
        turnover.activate(Duration::ZERO, sas(300), SCHEDULE);
        let mut again = sas(301);
        again.outbound[0].spi = Spi::new(300).unwrap();
        let commands = turnover.activate(Duration::ZERO, again, SCHEDULE);
        let outbound = |command: &&SaCommand| match command {
            SaCommand::Install(sa) => sa.direction == Direction::Outbound,
            SaCommand::Remove(sa) => sa.direction == Direction::Outbound,
            _ => false,
        };
        let order: Vec<_> = commands.iter().filter(outbound).collect();
        assert!(
            matches!(
                order[..],
                [
                    SaCommand::Remove(_),
                    SaCommand::Install(_),
                    SaCommand::Install(_)
                ]
            ),
            "{order:?}"
        );
    }
}
