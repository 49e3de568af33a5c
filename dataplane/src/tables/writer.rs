//! The control side's handle: takes commands, publishes snapshots, answers questions.

use super::{
    CommandError, CommandProblem, Settings, Tables, error,
    state::{Context, Defined, Effect, State},
};
use crate::{
    aead::Aead,
    spd::{Decision, Rule, RulePlace, SpdWriter, TunnelSlot},
};
use esplane_api::{
    Direction, Now, Policy, PolicyAction, SaCommand, SaEvent, SaStatus, Spi, TunnelActivity,
    TunnelId, TunnelStatus,
};
use std::{collections::BTreeSet, sync::Arc};

/// The one that changes SAD, SPD and tunnels; one per daemon, on its control side.
pub struct TableWriter {
    settings: Settings,
    aead: Aead,
    state: State,
    spd: SpdWriter,
    tables: Arc<Tables>,
}

impl TableWriter {
    /// Without any tunnel.
    pub fn new(settings: Settings, aead: Aead) -> Self {
        Self {
            settings,
            aead,
            state: State::default(),
            spd: SpdWriter::default(),
            tables: Arc::new(Tables {
                number: 0,
                settings,
                aead,
                sad: Default::default(),
                spd: Arc::default(),
                tunnels: Default::default(),
                slots: Default::default(),
            }),
        }
    }

    /// Carries out all commands and publishes the result as a new snapshot, or refuses all of them.
    pub fn apply(&mut self, now: Now, commands: Vec<SaCommand>) -> Result<(), CommandError> {
        let mut state = self.state.clone();
        let mut context = Context {
            settings: self.settings,
            aead: self.aead,
            now,
            effects: Vec::new(),
        };
        let mut last_definition = None;
        let mut changed = Changed::default();
        for (index, command) in commands.into_iter().enumerate() {
            let name = error::name(&command);
            changed.note(&command);
            if matches!(command, SaCommand::DefineTunnel(_)) {
                last_definition = Some((index, name));
            }
            state
                .apply(&mut context, command)
                .map_err(|problem| refuse((index, name), problem))?;
        }
        // Only now: within a list a route may wander from one tunnel to another in any order.
        if let Some(at) = last_definition
            && let Some(problem) =
                state.route_claimed_twice(&self.state, &self.spd, &changed.defined)
        {
            return Err(refuse(at, problem));
        }

        // Nothing can fail from here on.
        state.keys.forget_oldest();
        for effect in context.effects {
            match effect {
                Effect::Extend(sequence, until) => sequence.extend(until),
                Effect::Resume(sequence, start) => sequence.resume(start),
            }
        }
        self.tables = Arc::new(self.snapshot(&state, &changed));
        self.state = state;
        Ok(())
    }

    /// The newest snapshot.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.clone()
    }

    /// Looks at lifetimes in seconds. What has outlived its hard limit carries nothing from now on.
    pub fn tick(&mut self, now: Now) -> Vec<SaEvent> {
        let mut events = Vec::new();
        for inbound in self.state.inbound.values() {
            let sa = &inbound.sa;
            sa.usage
                .tick(now, |reached| events.push(reached.event(sa.id)));
        }
        for outbound in self
            .state
            .tunnels
            .values()
            .flat_map(|tunnel| &tunnel.outbound)
        {
            let sa = &outbound.sa;
            sa.usage
                .tick(now, |reached| events.push(reached.event(sa.id)));
        }
        events
    }

    /// Every SA, by tunnel: outbound ones oldest first, then inbound ones by SPI.
    pub fn sas(&self) -> Vec<SaStatus> {
        let outbound = self
            .state
            .tunnels
            .values()
            .flat_map(|tunnel| &tunnel.outbound);
        let inbound = self.state.inbound.values();
        let mut all: Vec<_> = outbound
            .map(|sa| sa.status())
            .chain(inbound.map(|sa| sa.status()))
            .collect();
        all.sort_by_key(|status| status.id.tunnel); // stable
        all
    }

    /// Every tunnel, by number.
    pub fn tunnels(&self) -> Vec<TunnelStatus> {
        let status = |tunnel: &Arc<Defined>| TunnelStatus {
            id: tunnel.params.id,
            name: tunnel.params.name.clone(),
            policies: tunnel.params.policies.clone(),
        };
        self.state.tunnels.values().map(status).collect()
    }

    /// What every tunnel has carried, by number.
    pub fn activity(&self) -> Vec<TunnelActivity> {
        let tunnels = self.state.tunnels.values();
        tunnels.map(|tunnel| self.state.activity(tunnel)).collect()
    }

    /// Whether an inbound SA has this SPI.
    pub fn uses_inbound_spi(&self, spi: Spi) -> bool {
        self.state.inbound.contains_key(&spi)
    }

    /// What has not changed is shared with the snapshot before.
    fn snapshot(&mut self, state: &State, changed: &Changed) -> Tables {
        if !changed.defined.is_empty() {
            let before = rules(&self.state, state, &changed.defined);
            let after = rules(state, &self.state, &changed.defined);
            self.spd.change(before, after);
        }
        let last = &self.tables;
        let (mut tunnels, mut slots) = (last.tunnels.clone(), last.slots.clone());
        // Those that are gone first: their slots may have new owners.
        for id in &changed.defined {
            let slot = |state: &State| state.tunnels.get(id).map(|tunnel| tunnel.slot);
            if let Some(before) = slot(&self.state)
                && slot(state) != Some(before)
            {
                tunnels.set(before, None);
                slots.remove_mut(id);
            }
        }
        let touched = changed.tunnels.iter();
        for tunnel in touched.filter_map(|id| state.tunnels.get(id)) {
            tunnels.set(tunnel.slot, Some(Arc::new(tunnel.view())));
            slots.insert_mut(tunnel.params.id, tunnel.slot);
        }
        let mut sad = last.sad.clone();
        for spi in changed.inbound(&self.state) {
            let sa = |state: &State| state.inbound.get(&spi).map(|inbound| inbound.sa.clone());
            let (before, after) = (sa(&self.state), sa(state));
            if before.as_ref().map(Arc::as_ptr) != after.as_ref().map(Arc::as_ptr) {
                sad.remove(spi.get());
                if let Some(sa) = after {
                    sad.insert(sa);
                }
            }
        }
        Tables {
            number: last.number + 1,
            settings: self.settings,
            aead: self.aead,
            sad,
            spd: if changed.defined.is_empty() {
                last.spd.clone()
            } else {
                Arc::new(self.spd.spd())
            },
            tunnels,
            slots,
        }
    }
}

/// What a list of commands touches.
#[derive(Default)]
struct Changed {
    /// Whatever of theirs.
    tunnels: BTreeSet<TunnelId>,
    /// Those of them that are defined or removed.
    defined: BTreeSet<TunnelId>,
    /// Inbound SAs that come or go by name.
    spis: BTreeSet<Spi>,
}

impl Changed {
    fn note(&mut self, command: &SaCommand) {
        let tunnel = match command {
            SaCommand::DefineTunnel(params) => {
                self.defined.insert(params.id);
                params.id
            }
            SaCommand::RemoveTunnel(tunnel) => {
                self.defined.insert(*tunnel);
                *tunnel
            }
            SaCommand::Install(params) => {
                if params.direction == Direction::Inbound {
                    self.spis.insert(params.spi);
                }
                params.tunnel
            }
            SaCommand::Remove(sa) => {
                if sa.direction == Direction::Inbound {
                    self.spis.insert(sa.spi);
                }
                sa.tunnel
            }
            SaCommand::Activate { tunnel, .. }
            | SaCommand::Retire { tunnel, .. }
            | SaCommand::MoveEndpoint { tunnel, .. } => *tunnel,
            SaCommand::ExtendSequence { .. } => return,
        };
        self.tunnels.insert(tunnel);
    }

    /// Inbound SAs that come or go, be it with their tunnels, which were `before`.
    fn inbound(&self, before: &State) -> BTreeSet<Spi> {
        let tunnels = self.defined.iter();
        let theirs = tunnels.filter_map(|id| before.tunnels.get(id));
        let theirs = theirs.flat_map(|tunnel| tunnel.inbound.iter().copied());
        theirs.chain(self.spis.iter().copied()).collect()
    }
}

/// The changed tunnels' rules that `other` does not have at the same place.
fn rules<'s>(
    state: &'s State,
    other: &'s State,
    changed: &'s BTreeSet<TunnelId>,
) -> impl Iterator<Item = (RulePlace, Rule)> + 's {
    let tunnels = changed.iter().filter_map(|id| state.tunnels.get(id));
    tunnels.flat_map(move |tunnel| {
        let same = other.tunnels.get(&tunnel.params.id);
        let same = same.filter(|same| same.order == tunnel.order);
        let known = same.map_or(&[][..], |same| &same.params.policies);
        let policies = tunnel.params.policies.iter().enumerate();
        policies
            .filter(move |(at, policy)| known.get(*at) != Some(policy))
            .map(move |(at, policy)| ((tunnel.order, at as u32), rule(policy, tunnel.slot)))
    })
}

fn rule(policy: &Policy, tunnel: TunnelSlot) -> Rule {
    Rule {
        selectors: policy.selectors,
        priority: policy.priority,
        decision: match &policy.action {
            // Its own: no tunnel protects another's packets.
            PolicyAction::Protect(_) => Decision::Protect(tunnel),
            PolicyAction::Bypass => Decision::Bypass,
            PolicyAction::Discard => Decision::Discard,
        },
    }
}

fn refuse((index, command): (usize, &'static str), problem: CommandProblem) -> CommandError {
    CommandError {
        index,
        command,
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::OuterHeaders;
    use esplane_api::{DfPolicy, TunnelParams};

    fn define(id: u32) -> SaCommand {
        SaCommand::DefineTunnel(TunnelParams {
            id: TunnelId(id),
            name: format!("tunnel-{id}"),
            policies: Vec::new(),
            roaming: false,
            df: DfPolicy::Clear,
        })
    }

    #[test]
    fn no_snapshot_keeps_what_an_earlier_one_had_at_a_slot() {
        let settings = Settings {
            outer_headers: OuterHeaders::ByKernel,
        };
        let mut writer = TableWriter::new(settings, Aead::portable());
        let now = Now::default();
        writer.apply(now, (1..=3).map(define).collect()).unwrap();
        // The first one comes back, at the slot of the one that went last.
        let gone = [1, 3, 2].map(|id| SaCommand::RemoveTunnel(TunnelId(id)));
        let list = gone.into_iter().chain([define(1)]).collect();
        writer.apply(now, list).unwrap();
        let tables = writer.tables();
        let at = |slot| tables.tunnel(TunnelSlot(slot)).map(|tunnel| tunnel.id);
        let found: Vec<TunnelId> = (0..3).filter_map(at).collect();
        assert_eq!(found, [TunnelId(1)]);
        assert!(tables.tunnel_by_id(TunnelId(1)).is_some());
        assert!(tables.tunnel_by_id(TunnelId(2)).is_none());
    }
}
