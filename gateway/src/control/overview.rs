//! What `esplane show`, `/v1/status` and `/metrics` tell.

use super::Control;
use crate::{
    config::StaticSa,
    io,
    status::{HandshakeTotals, PeerRow, RouteRow, SaRow, Status, Traffic, WorkerRow},
};
use esplane_api::{Direction, IpPrefix, SaStatus, TunnelId};
use esplane_control_noise::PeerStatus;
use esplane_control_vici::importer::ChildStatus;
use std::collections::{BTreeMap, BTreeSet};

impl Control {
    /// Everything at this moment.
    pub(super) fn overview(&mut self) -> Status {
        let sas = self.node.table_writer().sas();
        self.node.observe_traffic();
        let now = self.clock.now();
        let noise = self.node.peers();
        let handshakes =
            noise
                .iter()
                .fold(HandshakeTotals::default(), |sum, peer| HandshakeTotals {
                    completed: sum.completed + peer.handshakes,
                    rekeys: sum.rekeys + peer.rekeys,
                    failed: sum.failed + peer.failures,
                });
        let mut ports = worker_ports(&sas, self.config.listen.port());
        let mut peers: Vec<PeerRow> = noise
            .iter()
            .map(|peer| PeerRow {
                worker_ports: Vec::from_iter(ports.remove(&peer.id).unwrap_or_default()),
                ..self.noise_row(peer, &sas, now)
            })
            .collect();
        let children = self.children();
        peers.extend(children.iter().map(|child| self.child_peer(child, &sas)));
        peers.extend(
            self.statics
                .iter()
                .map(|installed| self.static_row(&installed.sa, installed.tunnel, &sas)),
        );
        let mut status = Status {
            node: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            aead: self.aead.to_owned(),
            uptime_seconds: now.monotonic.as_secs(),
            ready: true,
            not_ready_because: None,
            interface: self.config.interface.name.clone(),
            mtu: self.mtu,
            sas: sas
                .iter()
                .map(|sa| SaRow::new(sa, self.tunnel_name(sa.id.tunnel, &children)))
                .collect(),
            strongswan: self.strongswan_row(&children),
            routes: self.route_rows(&children),
            workers: self.worker_rows(),
            peers,
            handshakes,
            reloads: self.reloads,
            ..Status::default()
        };
        status.not_ready_because = self.imports_not_ready_because();
        status.ready = status.not_ready_because.is_none();
        for (_, counters) in &self.counters {
            status.add_drops(&counters.snapshot().drops);
        }
        status.add_drops(self.node.handshake_drops());
        status.add_drops(&self.dummies.report.drops);
        status
    }

    fn noise_row(&self, peer: &PeerStatus, sas: &[SaStatus], now: esplane_api::Now) -> PeerRow {
        let (sent, received) = self.node.traffic(peer.id);
        PeerRow {
            name: peer.name.clone(),
            tunnel: peer.id.0,
            keyed_by: "noise".to_owned(),
            public_key: Some(peer.public_key.to_string()),
            endpoint: peer.endpoint.map(|endpoint| endpoint.to_string()),
            state: peer.state.name().to_owned(),
            up: can_send(peer.id, sas),
            last_handshake_seconds_ago: peer
                .last_handshake
                .map(|then| now.monotonic.saturating_sub(then.monotonic).as_secs()),
            suite: peer.suite.map(|suite| suite.to_string()),
            kem: Some(peer.kem.to_string()),
            handshakes: peer.handshakes,
            rekeys: peer.rekeys,
            handshake_failures: peer.failures,
            sent,
            received,
            ..PeerRow::default()
        }
    }

    fn static_row(&self, sa: &StaticSa, tunnel: TunnelId, sas: &[SaStatus]) -> PeerRow {
        let (sent, received) = self.node.traffic(tunnel);
        let up = can_send(tunnel, sas);
        PeerRow {
            name: sa.name.clone(),
            tunnel: tunnel.0,
            keyed_by: "static".to_owned(),
            endpoint: Some(match sa.path.encap() {
                Some(_) => sa.path.remote_socket().to_string(),
                None => sa.path.remote().to_string(),
            }),
            state: if up { "installed" } else { "ended" }.to_owned(),
            up,
            suite: Some(sa.outbound.key.suite().to_string()),
            sent,
            received,
            ..PeerRow::default()
        }
    }

    fn tunnel_name<'a>(&'a self, tunnel: TunnelId, children: &'a [ChildStatus]) -> &'a str {
        let imported = children.iter().find(|child| child.tunnel == Some(tunnel));
        let imported = imported.map(|child| child.name.as_str());
        imported.or_else(|| self.ids.name(tunnel)).unwrap_or("?")
    }

    fn route_rows(&self, children: &[ChildStatus]) -> Vec<RouteRow> {
        let row = |peer: &str, prefix: IpPrefix| RouteRow {
            destination: prefix.to_string(),
            peer: peer.to_owned(),
            metric: self.config.route_metric,
            installed: self.network.has_route(&prefix),
            problem: (!self.config.install_routes).then(|| "install_routes is off".to_owned()),
        };
        let peers = self
            .config
            .peers
            .iter()
            .flat_map(|peer| peer.routes.iter().map(|prefix| row(&peer.name, *prefix)));
        let statics = self.statics.iter().flat_map(|installed| {
            let routes = installed.sa.routes();
            routes
                .into_iter()
                .map(|prefix| row(&installed.sa.name, prefix))
        });
        let unrouted = self.imported_ways(&self.config).none;
        let imported = children
            .iter()
            .filter(|child| child.tunnel.is_some())
            .flat_map(|child| {
                let remotes = child
                    .selectors
                    .iter()
                    .flat_map(|pair| pair.remote.prefixes());
                let prefixes: BTreeSet<IpPrefix> = remotes.collect();
                let rows = prefixes.into_iter().map(|prefix| RouteRow {
                    problem: unrouted.get(&prefix).cloned(),
                    ..row(&child.name, prefix)
                });
                rows.collect::<Vec<_>>()
            });
        peers.chain(statics).chain(imported).collect()
    }

    fn worker_rows(&self) -> Vec<WorkerRow> {
        let rows = self.counters.iter().enumerate();
        rows.map(|(index, (core, counters))| {
            let now = counters.snapshot();
            WorkerRow {
                index,
                core: *core,
                batches: now.outbound_batches + now.inbound_batches,
                sent: traffic(now.outer_sent),
                received: traffic(now.inner_sent),
            }
        })
        .collect()
    }
}

fn traffic(carried: io::Traffic) -> Traffic {
    Traffic {
        packets: carried.packets,
        bytes: carried.bytes,
        ..Traffic::default()
    }
}

pub(super) fn can_send(tunnel: TunnelId, sas: &[SaStatus]) -> bool {
    sas.iter()
        .any(|sa| sa.id.tunnel == tunnel && sa.id.direction == Direction::Outbound && sa.active)
}

/// Ports other than `listen` that each tunnel's SAs leave from, of tunnels that have such.
fn worker_ports(sas: &[SaStatus], listen: u16) -> BTreeMap<TunnelId, BTreeSet<u16>> {
    let mut ports: BTreeMap<TunnelId, BTreeSet<u16>> = BTreeMap::new();
    for sa in sas {
        if sa.id.direction == Direction::Outbound
            && let Some(encap) = sa.path.encap()
            && encap.local_port != listen
        {
            let of_tunnel = ports.entry(sa.id.tunnel).or_default();
            of_tunnel.insert(encap.local_port);
        }
    }
    ports
}
