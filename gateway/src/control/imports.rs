//! A strongSwan's tunnels, beside their SAs: where sockets listen, which routes lead in, the MTU.

use super::{Control, MESSAGES_AT_ONCE, overview::can_send};
use crate::{
    config::{Config, Mode, Mtu},
    network::inner_mtu,
    status::{ChildRow, PeerRow, StrongswanRow},
    strongswan::{Fact, Takeover, ways},
    ways::Ways,
};
use esplane_api::{Direction, IpPrefix, SaStatus, SelectorPair, TrafficSelector, TunnelId};
use esplane_control_vici::{
    importer::{ChildStatus, ImportNotice, Severity},
    vici::ChildState,
};
use std::collections::BTreeSet;
use tracing::{error, info, warn};

impl Control {
    pub(super) fn hear_strongswan(&mut self, first: Fact) {
        let Some(takeover) = &mut self.takeover else {
            return;
        };
        takeover.hear(&mut self.node, self.clock.now(), first);
        for _ in 0..MESSAGES_AT_ONCE {
            self.act();
            let Some(takeover) = &mut self.takeover else {
                return;
            };
            let Some(fact) = takeover.link.try_next() else {
                return;
            };
            takeover.hear(&mut self.node, self.clock.now(), fact);
        }
    }

    pub(super) fn ask(&mut self, ask: impl FnOnce(&mut Takeover)) {
        if let Some(takeover) = &mut self.takeover {
            ask(takeover);
        }
    }

    /// Routes and MTU as the children want them now. A route that the kernel refuses is told and
    /// shown; the others come all the same.
    pub(super) async fn follow_imports(&mut self) {
        let Some(takeover) = &mut self.takeover else {
            return;
        };
        if !takeover.news() {
            return;
        }
        let imported: Vec<_> = self
            .node
            .children()
            .iter()
            .filter_map(|child| child.tunnel)
            .collect();
        let ids = &self.ids;
        self.node
            .retain_traffic(|tunnel| ids.name(tunnel).is_some() || imported.contains(&tunnel));
        self.follow_mtu().await;
        self.unrouted.clear();
        let wanted = self.ways_with(&self.config);
        let mut refused = self.network.set_by_source(&wanted.by_source).await;
        refused.extend(self.network.set_what_can_be(&wanted.routes).await);
        for (prefix, error) in refused {
            error!("{prefix}, behind a tunnel of strongSwan's, gets no route: {error}");
            self.unrouted.insert(prefix, error.to_string());
        }
        let local = self.imported_networks();
        self.network.prefer_sources(&local).await;
    }

    /// The networks behind the children, each with what may send there.
    fn imported_networks(&self) -> Vec<(IpPrefix, TrafficSelector)> {
        let children = self.node.children();
        let pairs = children.iter().flat_map(|child| &child.selectors);
        pairs
            .flat_map(|pair| {
                let remotes = pair.remote.prefixes().into_iter();
                remotes.map(|remote| (remote, pair.local))
            })
            .collect()
    }

    /// How the networks behind the children are reached under `config`, and why the others are not.
    pub(super) fn imported_ways(&self, config: &Config) -> Ways {
        let Some(takeover) = &self.takeover else {
            return Ways::default();
        };
        let (wanted, pairs) = (self.node.imported_routes(), self.imported_networks());
        let mut ways = ways(config, wanted, &pairs, &takeover.paths());
        ways.routes
            .retain(|prefix, _| !self.unrouted.contains_key(prefix));
        ways.none.extend(self.unrouted.clone());
        ways
    }

    /// The children of a strongSwan as people count them: one that is up does not wait on demand besides.
    pub(super) fn children(&self) -> Vec<ChildStatus> {
        let mut children = self.node.children();
        let is_up = |child: &ChildStatus| child.sas.iter().any(|sa| sa.installed);
        let up: BTreeSet<(String, String)> = children
            .iter()
            .filter(|child| is_up(child))
            .map(|child| (child.connection.clone(), child.child.clone()))
            .collect();
        children.retain(|child| {
            let names = (child.connection.clone(), child.child.clone());
            !child.sas.is_empty() || child.state.is_some() || !up.contains(&names)
        });
        children
    }

    /// Why packets of imported tunnels cannot flow yet.
    pub(super) fn imports_not_ready_because(&self) -> Option<String> {
        let (takeover, config) = (self.takeover.as_ref()?, self.config.strongswan.as_ref()?);
        takeover.not_ready_because(config)
    }

    pub(super) fn strongswan_row(&self, children: &[ChildStatus]) -> Option<StrongswanRow> {
        let (takeover, config) = (self.takeover.as_ref()?, self.config.strongswan.as_ref()?);
        Some(StrongswanRow {
            mode: match config.mode {
                Mode::Kernel => "kernel",
                Mode::Preload { .. } => "preload",
            }
            .to_owned(),
            vici: config.vici.display().to_string(),
            charon_answers: takeover.charon_answers,
            children: children.iter().map(child_row).collect(),
        })
    }

    /// A child as one of the tunnels.
    pub(super) fn child_peer(&self, child: &ChildStatus, sas: &[SaStatus]) -> PeerRow {
        let tunnel = child.tunnel.unwrap_or(TunnelId(0));
        let (sent, received) = self.node.traffic(tunnel);
        let up = child.tunnel.is_some() && can_send(tunnel, sas);
        let of_child = sas.iter().filter(|sa| sa.id.tunnel == tunnel);
        let sender = of_child
            .clone()
            .find(|sa| sa.active && sa.id.direction == Direction::Outbound);
        PeerRow {
            name: child.name.clone(),
            tunnel: tunnel.0,
            keyed_by: "strongswan".to_owned(),
            endpoint: match sender.map(|sa| sa.path) {
                Some(path) if path.encap().is_some() => Some(path.remote_socket().to_string()),
                Some(path) => Some(path.remote().to_string()),
                None => child.remote.map(|remote| remote.ip().to_string()),
            },
            state: state(child).to_ascii_lowercase(),
            up,
            suite: sender.map(|sa| sa.suite.to_string()),
            sent,
            received,
            ..PeerRow::default()
        }
    }

    async fn follow_mtu(&mut self) {
        let Some(takeover) = &self.takeover else {
            return;
        };
        if self.config.interface.mtu != Mtu::Auto {
            return;
        }
        let (netlink, paths) = (self.network.netlink(), takeover.paths());
        let mtu = inner_mtu(netlink, &self.config, &paths, &mut self.ways).await;
        let mtu = mtu.min(self.mtu_max);
        if mtu == self.mtu {
            return;
        }
        match self.network.set_mtu(mtu).await {
            Ok(()) => {
                info!(
                    "MTU of {} is {mtu} now (was {})",
                    self.config.interface.name, self.mtu
                );
                self.mtu = mtu;
            }
            Err(error) => warn!("{error}"),
        }
    }
}

fn child_row(child: &ChildStatus) -> ChildRow {
    let networks = |side: fn(&SelectorPair) -> TrafficSelector| {
        let networks: BTreeSet<String> = child
            .selectors
            .iter()
            .map(|pair| side(pair).to_string())
            .collect();
        networks.into_iter().collect()
    };
    let problems = child.sas.iter().filter_map(|sa| {
        let problem = sa.problem.as_ref()?;
        Some(format!(
            "{} SA {} is not carried: {problem}",
            sa.direction, sa.spi
        ))
    });
    // Of those replaced, the ones whose SAs are still here.
    let mut unique_ids: BTreeSet<u32> = child.sas.iter().filter_map(|sa| sa.unique_id).collect();
    unique_ids.extend(child.unique_ids.last());
    ChildRow {
        name: child.name.clone(),
        connection: child.connection.clone(),
        child: child.child.clone(),
        ike_unique_id: child.ike_unique_id,
        unique_ids: unique_ids.into_iter().collect(),
        reqid: child.reqid,
        state: state(child).to_owned(),
        on_demand: child.on_demand,
        local_id: child.local_id.clone(),
        local: child.local.map(|end| end.to_string()),
        remote_id: child.remote_id.clone(),
        remote: child.remote.map(|end| end.to_string()),
        local_ts: networks(|pair| pair.local),
        remote_ts: networks(|pair| pair.remote),
        problems: problems.collect(),
    }
}

/// As swanctl says it.
fn state(child: &ChildStatus) -> &'static str {
    match child.state {
        Some(ChildState::Coming) => "NEGOTIATING",
        Some(ChildState::Installed) => "INSTALLED",
        Some(ChildState::Replaced) => "REKEYING",
        Some(ChildState::Leaving) => "DELETING",
        None if child.on_demand => "ON DEMAND",
        None => "UNKNOWN TO CHARON",
    }
}

pub(super) fn log_notice(notice: &ImportNotice) {
    match notice.severity() {
        Severity::Info => info!("{notice}"),
        Severity::Warning => warn!("{notice}"),
        Severity::Error => error!("{notice}"),
    }
}
