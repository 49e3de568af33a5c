//! The control side's handle: takes commands, publishes snapshots, answers questions.

use super::{
    Activity, CommandError, CommandProblem, Settings, Tables, Tunnel, error,
    state::{Context, Defined, Effect, State},
};
use crate::{
    aead::Aead,
    sad::{InboundEntry, Sad},
    spd::{Decision, Rule, Spd, TunnelSlot},
};
use esplane_api::{
    Now, PolicyAction, SaCommand, SaEvent, SaStatus, Spi, TunnelActivity, TunnelId, TunnelStatus,
};
use std::sync::Arc;

/// The one that changes SAD, SPD and tunnels; one per daemon, on its control side.
pub struct TableWriter {
    settings: Settings,
    aead: Aead,
    state: State,
    tables: Arc<Tables>,
}

impl TableWriter {
    /// Without any tunnel.
    pub fn new(settings: Settings, aead: Aead) -> Self {
        Self {
            settings,
            aead,
            state: State::default(),
            tables: Arc::new(Tables {
                settings,
                aead,
                sad: Sad::default(),
                spd: Arc::default(),
                tunnels: Vec::new(),
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
        let mut tunnels_changed = false;
        for (index, command) in commands.into_iter().enumerate() {
            let name = error::name(&command);
            match command {
                SaCommand::DefineTunnel(_) => last_definition = Some((index, name)),
                SaCommand::RemoveTunnel(_) => tunnels_changed = true,
                _ => {}
            }
            state
                .apply(&mut context, command)
                .map_err(|problem| refuse((index, name), problem))?;
        }
        if let Some(at) = last_definition {
            // Only now: within a list a route may wander from one tunnel to another in any order.
            tunnels_changed = true;
            if let Some(problem) = state.route_claimed_twice() {
                return Err(refuse(at, problem));
            }
        }

        // Nothing can fail from here on.
        state.keys.forget_oldest();
        for effect in context.effects {
            match effect {
                Effect::Extend(sequence, until) => sequence.extend(until),
                Effect::Resume(sequence, start) => sequence.resume(start),
            }
        }
        self.tables = Arc::new(self.snapshot(&state, tunnels_changed));
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
        let tunnels = self.state.tunnels.iter();
        tunnels
            .map(|(id, tunnel)| Activity::read(&tunnel.activity, *id))
            .collect()
    }

    /// Whether an inbound SA has this SPI.
    pub fn uses_inbound_spi(&self, spi: Spi) -> bool {
        self.state.inbound.contains_key(&spi)
    }

    fn snapshot(&self, state: &State, tunnels_changed: bool) -> Tables {
        let ids: Vec<TunnelId> = state.tunnels.keys().copied().collect();
        let slot = |id: &TunnelId| ids.binary_search(id).ok().map(|at| TunnelSlot(at as u32));
        let entries = state.inbound.values().filter_map(|inbound| {
            Some(InboundEntry {
                sa: inbound.sa.clone(),
                tunnel: slot(&inbound.sa.id.tunnel)?,
            })
        });
        Tables {
            settings: self.settings,
            aead: self.aead,
            sad: Sad::new(entries),
            spd: if tunnels_changed {
                Arc::new(Spd::new(rules(state, slot)))
            } else {
                self.tables.spd.clone()
            },
            tunnels: (state.tunnels.iter())
                .map(|(id, tunnel)| self.view(*id, tunnel))
                .collect(),
        }
    }

    /// The last snapshot's view of a tunnel if nothing about the tunnel has changed since.
    fn view(&self, id: TunnelId, tunnel: &Arc<Defined>) -> Arc<Tunnel> {
        let same = |known: &&Arc<Defined>| Arc::ptr_eq(known, tunnel);
        let unchanged = self.state.tunnels.get(&id).filter(same);
        let at = self
            .tables
            .tunnels
            .binary_search_by_key(&id, |known| known.id);
        match (unchanged, at) {
            (Some(_), Ok(at)) => self.tables.tunnels[at].clone(),
            _ => Arc::new(tunnel.view()),
        }
    }
}

/// All policies, those of tunnels defined earlier first.
fn rules(state: &State, slot: impl Fn(&TunnelId) -> Option<TunnelSlot>) -> Vec<Rule> {
    let mut tunnels: Vec<_> = state.tunnels.values().collect();
    tunnels.sort_by_key(|tunnel| tunnel.order);
    let policies = tunnels.iter().flat_map(|tunnel| &tunnel.params.policies);
    let rule = |policy: &esplane_api::Policy| {
        Some(Rule {
            selectors: policy.selectors,
            priority: policy.priority,
            decision: match &policy.action {
                PolicyAction::Protect(tunnel) => Decision::Protect(slot(tunnel)?),
                PolicyAction::Bypass => Decision::Bypass,
                PolicyAction::Discard => Decision::Discard,
            },
        })
    };
    policies.filter_map(rule).collect()
}

fn refuse((index, command): (usize, &'static str), problem: CommandProblem) -> CommandError {
    CommandError {
        index,
        command,
        problem,
    }
}
