//! Manually keyed tunnels: installed with numbers that no earlier run of theirs has used.

use crate::{
    config::{StaticSa, TunnelIds},
    node::Node,
    reservation::{ReservationError, ReservationStore},
};
use esplane_api::{Direction, Now, SaId, SaPair, SaStatus, SequenceStart, TunnelId, TunnelParams};
use esplane_dataplane::CommandError;
use std::{collections::BTreeMap, path::PathBuf};
use tracing::warn;

/// The manually keyed tunnels that are installed, by name.
pub(crate) struct Statics {
    state_dir: PathBuf,
    /// Opened when the first is installed: a node without static keys needs no state.
    store: Option<ReservationStore>,
    installed: BTreeMap<String, Installed>,
}

/// One of them.
pub(crate) struct Installed {
    pub tunnel: TunnelId,
    pub sa: StaticSa,
    /// Who asked for it.
    pub source: Source,
}

/// Who asked for a static SA: a reload changes only what the file asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    File,
    Api,
}

/// Why manually keyed tunnels stay as they were.
#[derive(Debug, thiserror::Error)]
pub enum StaticError {
    /// It contradicts what is installed.
    #[error(transparent)]
    Refused(#[from] CommandError),
    /// No numbers to send with.
    #[error(transparent)]
    Reservation(#[from] ReservationError),
}

impl Statics {
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            state_dir,
            store: None,
            installed: BTreeMap::new(),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Installed> {
        self.installed.values()
    }

    pub fn get(&self, name: &str) -> Option<&Installed> {
        self.installed.get(name)
    }

    /// Removes some by name and installs others, as one step.
    pub fn change(
        &mut self,
        node: &mut Node,
        now: Now,
        ids: &TunnelIds,
        remove: &[String],
        install: Vec<StaticSa>,
        source: Source,
    ) -> Result<(), StaticError> {
        if remove.is_empty() && install.is_empty() {
            return Ok(());
        }
        let leaving: Vec<SaId> = remove
            .iter()
            .filter_map(|name| self.installed.get(name))
            .map(Installed::outbound)
            .collect();
        for sa in &leaving {
            // Workers may still send a batch with it: all its reserved numbers count as used.
            self.store()?.finish(*sa, None)?;
        }
        let mut begun = Vec::new();
        let outcome = self.reserve(ids, &install, &mut begun).and_then(|pairs| {
            let tunnels: Vec<TunnelId> = leaving.iter().map(|sa| sa.tunnel).collect();
            Ok(node.change_static(now, &tunnels, pairs)?)
        });
        if let Err(error) = outcome {
            self.take_back(node, now, &begun, &leaving);
            return Err(error);
        }
        self.installed.retain(|name, _| !remove.contains(name));
        for (sa, id) in install.into_iter().zip(begun) {
            let tunnel = id.tunnel;
            self.installed
                .insert(sa.name.clone(), Installed { tunnel, sa, source });
        }
        Ok(())
    }

    /// Reserves further numbers for an SA that is about to need them.
    pub fn extend(&mut self, sa: SaId) -> Result<u64, ReservationError> {
        self.store()?.extend(sa)
    }

    /// Gives back the numbers that were not used. Only when no worker sends any more.
    pub fn finish(mut self, sas: &[SaStatus]) {
        let Some(store) = &mut self.store else { return };
        for installed in self.installed.values() {
            let id = installed.outbound();
            let last_sent = sas.iter().find(|sa| sa.id == id).map(|sa| sa.sequence);
            if let Err(error) = store.finish(id, last_sent) {
                warn!("{error}");
            }
        }
    }

    fn reserve(
        &mut self,
        ids: &TunnelIds,
        install: &[StaticSa],
        begun: &mut Vec<SaId>,
    ) -> Result<Vec<(TunnelParams, SaPair)>, StaticError> {
        let mut pairs = Vec::new();
        for sa in install {
            let Some(tunnel) = ids.get(&sa.name) else {
                continue;
            };
            let outbound = sa.sa_pair(tunnel, SequenceStart::FRESH).outbound;
            let sequence = self.store()?.begin(&outbound)?;
            begun.push(outbound.id());
            pairs.push((sa.tunnel_params(tunnel), sa.sa_pair(tunnel, sequence)));
        }
        Ok(pairs)
    }

    /// After a failure: those that were to leave stay, with fresh reservations.
    fn take_back(&mut self, node: &mut Node, now: Now, begun: &[SaId], leaving: &[SaId]) {
        let again: Vec<_> = self
            .installed
            .values()
            .filter(|installed| leaving.contains(&installed.outbound()))
            .map(|installed| {
                installed
                    .sa
                    .sa_pair(installed.tunnel, SequenceStart::FRESH)
                    .outbound
            })
            .collect();
        let Ok(store) = self.store() else { return };
        for sa in begun {
            if let Err(error) = store.finish(*sa, None) {
                warn!("{error}");
            }
        }
        for sa in again {
            match store.begin(&sa) {
                Ok(SequenceStart {
                    reserved_until: Some(until),
                    ..
                }) => node.extend_sequence(now, sa.id(), until),
                Ok(_) => {}
                Err(error) => warn!("{error}"),
            }
        }
    }

    fn store(&mut self) -> Result<&mut ReservationStore, ReservationError> {
        let store = match self.store.take() {
            Some(store) => store,
            None => ReservationStore::open(&self.state_dir)?,
        };
        Ok(self.store.insert(store))
    }
}

impl Installed {
    /// The SA that needs reservations.
    fn outbound(&self) -> SaId {
        SaId {
            tunnel: self.tunnel,
            direction: Direction::Outbound,
            spi: self.sa.outbound.spi,
        }
    }
}
