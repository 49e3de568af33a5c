//! What the dataplane has seen, told to the kernel and charon: counters, limits, a peer that has moved.

use super::{
    engine::Importer,
    kernel::{OutboundStage, Serial},
    notice::ImportEvent,
    numbers::{Chunk, esn},
    output::ImportOutput,
    settings::Database,
    tunnel::Roamed,
};
use crate::xfrm::XfrmRequest;
use esplane_api::{Direction, Now, SaCommand, SaId, SaStatus, TunnelId};
use std::{net::SocketAddr, time::Duration};

/// How long charon may take to follow a limit until it is told again.
const LIMIT_PATIENCE: Duration = Duration::from_secs(30);

impl Importer {
    /// What an SA has carried. charon reads it from the kernel: `swanctl --list-sas` shows it, not older than `spread`.
    pub(super) fn used(&mut self, now: Now, status: &SaStatus, spread: Duration) {
        let Some((serial, base)) = self.installed_as(status.id) else {
            return;
        };
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let Some(known) = sa.name.and_then(|name| self.numbers.get_mut(name)) else {
            return;
        };
        let inbound = status.id.direction == Direction::Inbound;
        if inbound {
            known.received = known.received.max(status.sequence);
        }
        let carried = (
            base.0 + status.statistics.packets,
            base.1 + status.statistics.bytes,
        );
        known.carried = carried;
        let progress = (carried.0, carried.1, status.sequence);
        if progress == sa.stored {
            return;
        }
        let (stage, width) = (sa.outbound, esn(&sa.fact));
        if sa.stored_at.is_none_or(|at| now.monotonic >= at + spread) {
            (sa.stored, sa.stored_at) = (progress, Some(now.monotonic));
            self.store(serial, false);
        }
        if let Some(tunnel) = self.tunnels.get_mut(&status.id.tunnel) {
            tunnel.last_carried = Some(now.monotonic);
        }
        // SequenceLow is a hint that may be lost.
        let known = self
            .kernel
            .get(serial)
            .and_then(|sa| self.numbers.get(sa.name?));
        let reserved = known.and_then(|known| known.used_until);
        let low = reserved
            .is_some_and(|until| until.saturating_sub(status.sequence) < Chunk::size(width) / 4);
        if !inbound && matches!(stage, OutboundStage::Installed { .. }) && low {
            self.extend(now, status.id, status.sequence + 1);
        }
    }

    /// An SA has come to a limit: charon is told, as the kernel would.
    pub(super) fn limit_reached(&mut self, now: Now, sa: SaId, hard: bool) {
        if let Some(serial) = self.serial_of(sa) {
            self.tell_limit(now, serial, hard);
        }
    }

    pub(super) fn tell_limit(&mut self, now: Now, serial: Serial, hard: bool) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let told = &mut sa.limit_told[usize::from(hard)];
        if told.is_some_and(|told| now.monotonic < told + LIMIT_PATIENCE) {
            return;
        }
        *told = Some(now.monotonic);
        let key = sa.fact.key;
        self.outputs
            .push_back(ImportOutput::Xfrm(XfrmRequest::Expire { key, hard }));
    }

    /// The peer's NAT has another mapping. A real kernel tells charon of that only for SAs it receives with itself.
    pub(super) fn endpoint_moved(&mut self, id: TunnelId, remote: SocketAddr) {
        let Some(tunnel) = self.tunnels.get_mut(&id) else {
            return;
        };
        let active = tunnel
            .mirror
            .outbound
            .iter()
            .find(|sa| Some(sa.spi) == tunnel.mirror.active);
        let Some(active) = active else {
            return;
        };
        // Not over to plain ESP, nor to an address nothing can be sent to.
        if active.path.encap().is_none() || active.path.moved_to(remote).is_err() {
            return;
        }
        let stated = active.path.remote_socket();
        let now_at = tunnel.roamed.filter(|roamed| roamed.stated == stated);
        if now_at.map_or(stated, |roamed| roamed.observed) == remote {
            return;
        }
        tunnel.roamed = Some(Roamed {
            stated,
            observed: remote,
        });
        let command = SaCommand::MoveEndpoint { tunnel: id, remote };
        let newest = tunnel
            .mirror
            .inbound
            .values()
            .filter_map(|sa| sa.serial)
            .max();
        self.commands(Vec::new(), vec![command]);
        if self.settings.database == Database::Esplane
            && let Some(sa) = newest.and_then(|serial| self.kernel.get(serial))
        {
            let key = sa.fact.key;
            self.outputs
                .push_back(ImportOutput::Xfrm(XfrmRequest::PeerMoved { key, remote }));
        }
        self.notice(
            self.label(None, Some(id)),
            ImportEvent::Moved { to: remote },
        );
    }

    /// The kernel's SA behind one of the dataplane's.
    pub(super) fn serial_of(&self, sa: SaId) -> Option<Serial> {
        self.installed_as(sa).map(|(serial, _)| serial)
    }

    /// The same, and what its key had carried when it was installed.
    fn installed_as(&self, sa: SaId) -> Option<(Serial, (u64, u64))> {
        let mirror = &self.tunnels.get(&sa.tunnel)?.mirror;
        match sa.direction {
            Direction::Inbound => {
                let has = mirror.inbound.get(&sa.spi)?;
                Some((has.serial?, has.base))
            }
            Direction::Outbound => {
                let has = mirror.outbound.iter().find(|has| has.spi == sa.spi)?;
                Some((has.serial, has.base))
            }
        }
    }
}
