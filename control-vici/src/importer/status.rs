//! The children as a person wants to see them.

use super::{
    charon::{Child, ChildId, Presence, unique_id},
    engine::Importer,
    kernel::OutboundStage,
    output::{ChildStatus, ImportedSa},
    place::tunnel_key,
    tunnel::{Origin, Tunnel, TunnelKey},
};
use esplane_api::{Direction, TunnelId};
use std::collections::BTreeMap;

impl Importer {
    /// Every child that is imported or should be, with why it is not; on-demand ones too.
    pub fn children(&self) -> Vec<ChildStatus> {
        let mut by_key: BTreeMap<TunnelKey, Vec<(ChildId, &Child)>> = BTreeMap::new();
        for (id, child) in self.charon.children() {
            if let Some(ike) = self.charon.ike_of(child)
                && child.presence != Presence::Ended
            {
                by_key
                    .entry(tunnel_key(ike, child))
                    .or_default()
                    .push((id, child));
            }
        }
        let mut all: Vec<ChildStatus> = (self.tunnels.iter())
            .map(|(id, tunnel)| {
                let children = by_key.remove(&tunnel.key).unwrap_or_default();
                self.status(*id, tunnel, &children)
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn status(&self, id: TunnelId, tunnel: &Tunnel, children: &[(ChildId, &Child)]) -> ChildStatus {
        let newest = children.last().map(|(_, child)| *child);
        let ike = newest.and_then(|child| self.charon.ike_of(child));
        let (reqid, remote_id) = match &tunnel.key.origin {
            Origin::Sas { reqid, remote_id } => (*reqid, remote_id.clone()),
            Origin::Trap => (0, String::new()),
        };
        ChildStatus {
            connection: tunnel.key.connection.clone(),
            child: tunnel.key.child.clone(),
            tunnel: tunnel.mirror.params.is_some().then_some(id),
            name: tunnel.name.clone(),
            reqid,
            ike_unique_id: newest.map(|child| unique_id(child.ike)),
            unique_ids: children.iter().map(|(id, _)| unique_id(*id)).collect(),
            state: newest.map(|child| child.sa.state),
            on_demand: tunnel.is_trap(),
            local_id: ike.map(|ike| ike.local_id.clone()).unwrap_or_default(),
            remote_id,
            local: ike.and_then(|ike| ike.local),
            remote: ike.and_then(|ike| ike.remote),
            selectors: tunnel.selectors.clone(),
            sas: self.sas(tunnel),
        }
    }

    fn sas(&self, tunnel: &Tunnel) -> Vec<ImportedSa> {
        let members =
            (tunnel.members.iter()).filter_map(|serial| Some((*serial, self.kernel.get(*serial)?)));
        members
            .filter_map(|(serial, sa)| {
                let direction = sa.direction?;
                let installed = match direction {
                    Direction::Inbound => {
                        let mut has = tunnel.mirror.inbound.values();
                        has.any(|has| has.serial == Some(serial))
                    }
                    Direction::Outbound => tunnel
                        .mirror
                        .outbound
                        .iter()
                        .any(|has| has.serial == serial),
                };
                let waits = match sa.outbound {
                    OutboundStage::Reserving { .. } => {
                        Some("its sequence numbers are being reserved")
                    }
                    OutboundStage::Unusable { .. } => Some(
                        "its sequence numbers are used up or unknown; charon is asked to rekey",
                    ),
                    _ => None,
                };
                let problem = sa.problem.as_ref().map(ToString::to_string);
                Some(ImportedSa {
                    spi: sa.fact.key.spi,
                    direction,
                    unique_id: sa.child.map(unique_id),
                    installed,
                    problem: problem.or_else(|| waits.map(str::to_owned)),
                })
            })
            .collect()
    }
}
