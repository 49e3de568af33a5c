//! Tunnels that packets ask for (`start_action = trap`).
//!
//! charon installs a trap in its own tables, and with `policies = no` nowhere else: no policy of the kernel fires. It lists traps by name and
//! networks (`list-policies`), without their reqid, and an ACQUIRE finds a trap by nothing but that reqid. So a trap becomes a
//! tunnel without SAs whose packets wait; they make us ask charon by name (`initiate`), which tells how it ended.
//! The CHILD_SA then has a tunnel of its own, whose policies come before the trap's, and what waits is looked up
//! again. When it goes, the trap is still there: nothing leaves in clear.

use super::{
    ChildLabel,
    engine::Importer,
    notice::ImportEvent,
    output::ImportOutput,
    tunnel::{Origin, TunnelKey},
};
use crate::vici::{Trap, ViciRequest};
use esplane_api::{Now, TunnelId};
use std::{collections::BTreeSet, time::Duration};

/// How long charon may take for a negotiation whose outcome it never tells: by default it gives up after 165 s.
const NEGOTIATION: Duration = Duration::from_secs(200);
/// How long packets wait after a failed negotiation until they ask for another.
const NEGOTIATION_PAUSE: Duration = Duration::from_secs(5);

impl Importer {
    /// Traps become tunnels without SAs, whose packets wait and ask.
    pub(super) fn follow_traps(&mut self) {
        let fits = |trap: &&Trap| {
            self.settings.imports(&trap.ike, &trap.child)
                && (trap.mode.is_empty() || trap.mode == "TUNNEL")
        };
        let traps: Vec<Trap> = self.charon.traps.iter().filter(fits).cloned().collect();
        let mut listed = BTreeSet::new();
        for trap in traps {
            let selectors = trap.selectors();
            let id = self.tunnel_with(TunnelKey {
                connection: trap.ike,
                child: trap.child,
                origin: Origin::Trap,
            });
            if let Some(tunnel) = self.tunnels.get_mut(&id) {
                tunnel.selectors = selectors;
            }
            listed.insert(id);
        }
        let mut all = self.tunnels.iter_mut();
        for (id, tunnel) in all.by_ref().filter(|(_, tunnel)| tunnel.is_trap()) {
            if !listed.contains(id) {
                tunnel.selectors.clear();
            }
            self.dirty.insert(*id);
        }
    }

    /// Packets wait and no SA can carry them.
    pub(super) fn wanted_by_packets(&mut self, now: Now, id: TunnelId) {
        let connected = self.charon.connected;
        let Some(tunnel) = self.tunnels.get_mut(&id) else {
            return;
        };
        let asked = tunnel
            .wanted_until
            .is_some_and(|until| now.monotonic < until);
        // Without charon the next packet asks again. SAs that are there come by themselves.
        if !tunnel.is_trap() || !connected || asked {
            return;
        }
        tunnel.wanted_until = Some(now.monotonic + NEGOTIATION);
        let (ike, child) = (tunnel.key.connection.clone(), tunnel.key.child.clone());
        let label = ChildLabel {
            connection: ike.clone(),
            child: child.clone(),
            unique_id: None,
        };
        let request = ViciRequest::Initiate { ike, child };
        self.outputs.push_back(ImportOutput::Vici(request));
        self.notice(Some(label), ImportEvent::Wanted);
    }

    pub(super) fn negotiation_ended(&mut self, now: Now, ike: &str, child: &str, done: bool) {
        let key = TunnelKey {
            connection: ike.to_owned(),
            child: child.to_owned(),
            origin: Origin::Trap,
        };
        let tunnel = self
            .by_key
            .get(&key)
            .and_then(|id| self.tunnels.get_mut(id));
        let Some(tunnel) = tunnel else {
            return;
        };
        tunnel.wanted_until = Some(now.monotonic + NEGOTIATION_PAUSE);
        if !done {
            let label = ChildLabel {
                connection: key.connection,
                child: key.child,
                unique_id: None,
            };
            self.notice(Some(label), ImportEvent::NotNegotiated);
        }
    }
}
