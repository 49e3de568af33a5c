//! Prometheus' text form of a [`Status`]; the only place that knows Prometheus.
//!
//! A scrape builds its metrics from one status, so they agree with each other and cost nothing
//! between scrapes. SPIs change with every rekey and are no labels: traffic is counted per tunnel and
//! direction, over SAs that come and go, and so never goes backwards while the daemon runs. Every
//! drop reason is there from the start, at 0, so that a rate can be taken of its first packet.

use crate::status::{ChildRow, PeerRow, Status, Traffic};
use esplane_api::{DropReason, DropStage};
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder, core::Collector};
use std::collections::BTreeMap;

/// The text exposition format, version 0.0.4.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The body of `GET /metrics`.
pub fn render(status: &Status) -> Result<String, prometheus::Error> {
    let page = Page(Registry::new());
    daemon(&page, status)?;
    drops(&page, status)?;
    peers(&page, status)?;
    strongswan(&page, status)?;
    traffic(&page, status)?;
    workers(&page, status)?;
    TextEncoder::new().encode_to_string(&page.0.gather())
}

fn daemon(page: &Page, status: &Status) -> Result<(), prometheus::Error> {
    page.gauge(
        "esplane_build_info",
        "Always 1; the labels say what runs",
        &["version", "node", "aead"],
        [(vec![status.version.as_str(), &status.node, &status.aead], 1)],
    )?;
    page.gauge(
        "esplane_uptime_seconds",
        "Seconds since the daemon started",
        &[],
        [(vec![], status.uptime_seconds)],
    )?;
    page.gauge(
        "esplane_ready",
        "Whether packets can flow",
        &[],
        [(vec![], u64::from(status.ready))],
    )?;
    page.gauge(
        "esplane_interface_mtu_bytes",
        "The inner interface's MTU",
        &["interface"],
        [(vec![status.interface.as_str()], u64::from(status.mtu))],
    )?;
    let totals = status.handshakes;
    page.counter(
        "esplane_handshakes_total",
        "Handshakes over all peers, by how they ended",
        &["result"],
        [
            (vec!["completed"], totals.completed),
            (vec!["failed"], totals.failed),
        ],
    )?;
    page.counter(
        "esplane_rekeys_total",
        "Handshakes that replaced working SAs, over all peers",
        &[],
        [(vec![], totals.rekeys)],
    )?;
    let reloads = status.reloads;
    page.counter(
        "esplane_config_reloads_total",
        "How often the configuration was read again, by result",
        &["result"],
        [
            (vec!["succeeded"], reloads.succeeded),
            (vec!["failed"], reloads.failed),
        ],
    )?;
    let missing = status.routes.iter().filter(|route| !route.installed);
    page.gauge(
        "esplane_routes_missing",
        "Protected networks whose route the kernel does not have",
        &[],
        [(vec![], missing.count() as u64)],
    )
}

fn drops(page: &Page, status: &Status) -> Result<(), prometheus::Error> {
    let rows = DropReason::ALL.iter().map(|reason| {
        (
            vec![reason.name(), stage(reason.stage())],
            status.dropped(*reason),
        )
    });
    page.counter(
        "esplane_drops_total",
        "Packets that went no further, by reason; keepalive, dummy_packet, link_local and handshake_unexpected are no loss",
        &["reason", "stage"],
        rows,
    )
}

fn stage(stage: DropStage) -> &'static str {
    match stage {
        DropStage::Outbound => "outbound",
        DropStage::Inbound => "inbound",
        DropStage::Handshake => "handshake",
    }
}

fn peers(page: &Page, status: &Status) -> Result<(), prometheus::Error> {
    let each = |value: fn(&PeerRow) -> u64| {
        status
            .peers
            .iter()
            .map(move |peer| (vec![peer.name.as_str()], value(peer)))
    };
    page.gauge(
        "esplane_peer_up",
        "Whether an SA can carry traffic to the peer",
        &["peer"],
        each(|peer| u64::from(peer.up)),
    )?;
    let ages = status
        .peers
        .iter()
        .filter_map(|peer| Some((vec![peer.name.as_str()], peer.last_handshake_seconds_ago?)));
    page.gauge(
        "esplane_peer_last_handshake_seconds",
        "Seconds since the last completed handshake; missing before the first",
        &["peer"],
        ages,
    )?;
    page.counter(
        "esplane_peer_handshakes_total",
        "Completed handshakes with the peer",
        &["peer"],
        each(|peer| peer.handshakes),
    )?;
    page.counter(
        "esplane_peer_rekeys_total",
        "Handshakes that replaced working SAs of the peer",
        &["peer"],
        each(|peer| peer.rekeys),
    )?;
    page.counter(
        "esplane_peer_handshake_failures_total",
        "Handshakes with the peer that were given up",
        &["peer"],
        each(|peer| peer.handshake_failures),
    )?;
    let installed = |direction: &'static str| {
        status.peers.iter().map(move |peer| {
            let sas = status.sas.iter();
            let count = sas
                .filter(|sa| sa.peer == peer.name && sa.direction == direction)
                .count();
            (vec![peer.name.as_str(), direction], count as u64)
        })
    };
    page.gauge(
        "esplane_sas",
        "SAs installed now",
        &["peer", "direction"],
        installed("inbound").chain(installed("outbound")),
    )
}

/// Names of connections and children are joined to the other metrics by `peer`:
/// `esplane_sa_bytes_total * on (peer) group_left (connection, child) esplane_tunnel_info`.
fn strongswan(page: &Page, status: &Status) -> Result<(), prometheus::Error> {
    let children = status.strongswan.iter().flat_map(|it| &it.children);
    let by_name: BTreeMap<&str, &ChildRow> =
        children.map(|child| (child.name.as_str(), child)).collect();
    let info = status.peers.iter().map(|peer| {
        let child = by_name.get(peer.name.as_str());
        let (connection, child) = child.map_or(("", ""), |it| (&it.connection, &it.child));
        (
            vec![peer.name.as_str(), &peer.keyed_by, connection, child],
            1,
        )
    });
    page.gauge(
        "esplane_tunnel_info",
        "Always 1; the labels say what keys the peer's tunnel, and its names in swanctl.conf",
        &["peer", "keyed_by", "connection", "child"],
        info,
    )?;
    let Some(strongswan) = &status.strongswan else {
        return Ok(());
    };
    page.gauge(
        "esplane_strongswan_up",
        "Whether charon answers",
        &[],
        [(vec![], u64::from(strongswan.charon_answers))],
    )?;
    page.gauge(
        "esplane_strongswan_problems",
        "What of the child is not carried, or not as it should be; `esplane show tunnels` says why",
        &["peer"],
        by_name
            .iter()
            .map(|(name, child)| (vec![*name], child.problems.len() as u64)),
    )
}

fn traffic(page: &Page, status: &Status) -> Result<(), prometheus::Error> {
    let both = |value: fn(&Traffic) -> u64| {
        status.peers.iter().flat_map(move |peer| {
            [("outbound", &peer.sent), ("inbound", &peer.received)]
                .map(|(direction, traffic)| (vec![peer.name.as_str(), direction], value(traffic)))
        })
    };
    let received = |value: fn(&Traffic) -> u64| {
        status
            .peers
            .iter()
            .map(move |peer| (vec![peer.name.as_str()], value(&peer.received)))
    };
    page.counter(
        "esplane_sa_packets_total",
        "Packets carried by the peer's SAs, past ones included",
        &["peer", "direction"],
        both(|traffic| traffic.packets),
    )?;
    page.counter(
        "esplane_sa_bytes_total",
        "Inner bytes carried by the peer's SAs, past ones included",
        &["peer", "direction"],
        both(|traffic| traffic.bytes),
    )?;
    page.counter(
        "esplane_sa_authentication_failures_total",
        "Received packets of the peer's SAs with a wrong ICV",
        &["peer"],
        received(|traffic| traffic.authentication_failures),
    )?;
    page.counter(
        "esplane_sa_replays_total",
        "Received packets of the peer's SAs that the replay window refused",
        &["peer"],
        received(|traffic| traffic.replays),
    )
}

fn workers(page: &Page, status: &Status) -> Result<(), prometheus::Error> {
    let names: Vec<String> = status
        .workers
        .iter()
        .map(|worker| worker.index.to_string())
        .collect();
    let rows = || names.iter().map(String::as_str).zip(&status.workers);
    page.counter(
        "esplane_worker_batches_total",
        "Batches of packets the data thread worked on",
        &["worker"],
        rows().map(|(name, worker)| (vec![name], worker.batches)),
    )?;
    page.counter(
        "esplane_worker_packets_total",
        "Packets the data thread carried",
        &["worker", "direction"],
        rows().flat_map(|(name, worker)| {
            [
                (vec![name, "outbound"], worker.sent.packets),
                (vec![name, "inbound"], worker.received.packets),
            ]
        }),
    )
}

/// One scrape's metrics. `rows` are label values and a value each.
struct Page(Registry);

impl Page {
    fn counter<'a>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        rows: impl IntoIterator<Item = (Vec<&'a str>, u64)>,
    ) -> Result<(), prometheus::Error> {
        let family = IntCounterVec::new(Opts::new(name, help), labels)?;
        for (values, value) in rows {
            family.get_metric_with_label_values(&values)?.inc_by(value);
        }
        self.register(family)
    }

    fn gauge<'a>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        rows: impl IntoIterator<Item = (Vec<&'a str>, u64)>,
    ) -> Result<(), prometheus::Error> {
        let family = IntGaugeVec::new(Opts::new(name, help), labels)?;
        for (values, value) in rows {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            family.get_metric_with_label_values(&values)?.set(value);
        }
        self.register(family)
    }

    fn register(&self, family: impl Collector + 'static) -> Result<(), prometheus::Error> {
        self.0.register(Box::new(family))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{HandshakeTotals, RouteRow, SaRow, StrongswanRow, WorkerRow};
    use std::collections::{BTreeMap, BTreeSet};

    fn busy() -> Status {
        let traffic = |packets| Traffic {
            packets,
            bytes: packets * 100,
            authentication_failures: 4,
            replays: 5,
        };
        Status {
            node: "berlin \"the\\node\"\n".to_owned(),
            version: "1.2.3".to_owned(),
            ready: true,
            interface: "esp0".to_owned(),
            mtu: 1400,
            peers: vec![
                PeerRow {
                    name: "paris".to_owned(),
                    up: true,
                    last_handshake_seconds_ago: Some(12),
                    rekeys: 2,
                    sent: traffic(10),
                    received: traffic(20),
                    ..PeerRow::default()
                },
                PeerRow {
                    name: "rome".to_owned(),
                    ..PeerRow::default()
                },
            ],
            sas: vec![
                SaRow {
                    peer: "paris".to_owned(),
                    direction: "inbound".to_owned(),
                    spi: "0x1".to_owned(),
                    ..SaRow::default()
                },
                SaRow {
                    peer: "paris".to_owned(),
                    direction: "inbound".to_owned(),
                    spi: "0x2".to_owned(),
                    ..SaRow::default()
                },
            ],
            routes: vec![RouteRow::default()],
            drops: BTreeMap::from([("no_policy".to_owned(), 7)]),
            workers: vec![WorkerRow {
                index: 0,
                batches: 3,
                sent: traffic(10),
                ..WorkerRow::default()
            }],
            handshakes: HandshakeTotals {
                completed: 3,
                rekeys: 2,
                failed: 1,
            },
            ..Status::default()
        }
    }

    /// The samples by name and labels. Strict: HELP and TYPE before a family's samples, names and
    /// units as Prometheus wants them, every label quoted, every value a number, nothing twice.
    fn samples(text: &str) -> BTreeMap<String, f64> {
        let mut samples = BTreeMap::new();
        let (mut family, mut kind) = (String::new(), String::new());
        let mut families = BTreeSet::new();
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, sentence) = help.split_once(' ').expect(line);
                assert!(
                    !sentence.is_empty() && families.insert(name.to_owned()),
                    "{line}"
                );
                family = name.to_owned();
            } else if let Some(typed) = line.strip_prefix("# TYPE ") {
                let (name, of) = typed.split_once(' ').expect(line);
                assert_eq!(name, family, "{line}");
                assert!(name.starts_with("esplane_"), "{line}");
                assert_eq!(name.ends_with("_total"), of == "counter", "{line}");
                kind = of.to_owned();
            } else {
                let (name, value) = line.rsplit_once(' ').expect(line);
                let (bare, labels) = name.split_once('{').unwrap_or((name, "}"));
                assert!(bare == family && !kind.is_empty(), "{line}");
                assert!(
                    bare.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
                    "{line}"
                );
                assert!(labels == "}" || labels.ends_with("\"}"), "{line}");
                let value: f64 = value.parse().expect(line);
                assert!(value.is_finite() && value >= 0.0, "{line}");
                assert!(
                    samples.insert(name.to_owned(), value).is_none(),
                    "twice: {line}"
                );
            }
        }
        samples
    }

    #[test]
    fn names_of_swanctl_are_joined_by_the_tunnels_name() {
        let child = ChildRow {
            name: "gw/net".to_owned(),
            connection: "gw".to_owned(),
            child: "net".to_owned(),
            problems: vec!["it is in transport mode".to_owned()],
            ..ChildRow::default()
        };
        let peer = |name: &str, keyed_by: &str| PeerRow {
            name: name.to_owned(),
            keyed_by: keyed_by.to_owned(),
            ..PeerRow::default()
        };
        let status = Status {
            peers: vec![peer("gw/net", "strongswan"), peer("paris", "noise")],
            strongswan: Some(StrongswanRow {
                charon_answers: true,
                children: vec![child],
                ..StrongswanRow::default()
            }),
            ..Status::default()
        };
        let text = render(&status).unwrap();
        for line in [
            r#"esplane_tunnel_info{child="net",connection="gw",keyed_by="strongswan",peer="gw/net"} 1"#,
            r#"esplane_tunnel_info{child="",connection="",keyed_by="noise",peer="paris"} 1"#,
            r#"esplane_strongswan_problems{peer="gw/net"} 1"#,
            "esplane_strongswan_up 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(
            !render(&Status::default())
                .unwrap()
                .contains("esplane_strongswan")
        );
    }

    #[test]
    fn a_busy_gateways_page_is_well_formed_and_says_what_happened() {
        let page = samples(&render(&busy()).unwrap());
        for (name, value) in [
            ("esplane_ready", 1.0),
            ("esplane_peer_up{peer=\"paris\"}", 1.0),
            ("esplane_peer_up{peer=\"rome\"}", 0.0),
            ("esplane_peer_last_handshake_seconds{peer=\"paris\"}", 12.0),
            ("esplane_handshakes_total{result=\"completed\"}", 3.0),
            ("esplane_handshakes_total{result=\"failed\"}", 1.0),
            ("esplane_rekeys_total", 2.0),
            ("esplane_sas{direction=\"inbound\",peer=\"paris\"}", 2.0),
            ("esplane_sas{direction=\"outbound\",peer=\"paris\"}", 0.0),
            (
                "esplane_sa_packets_total{direction=\"outbound\",peer=\"paris\"}",
                10.0,
            ),
            (
                "esplane_sa_bytes_total{direction=\"inbound\",peer=\"paris\"}",
                2000.0,
            ),
            ("esplane_sa_replays_total{peer=\"paris\"}", 5.0),
            (
                "esplane_worker_packets_total{direction=\"outbound\",worker=\"0\"}",
                10.0,
            ),
            ("esplane_routes_missing", 1.0),
            (
                "esplane_drops_total{reason=\"no_policy\",stage=\"outbound\"}",
                7.0,
            ),
        ] {
            assert_eq!(page.get(name), Some(&value), "{name} in {page:#?}");
        }
        let never = "esplane_peer_last_handshake_seconds{peer=\"rome\"}";
        assert!(
            !page.contains_key(never),
            "no handshake is not one at second 0"
        );
    }

    #[test]
    fn every_drop_reason_is_there_from_the_start() {
        let page = samples(&render(&Status::default()).unwrap());
        for reason in DropReason::ALL {
            let name = format!(
                "esplane_drops_total{{reason=\"{reason}\",stage=\"{}\"}}",
                stage(reason.stage())
            );
            assert_eq!(page.get(&name), Some(&0.0), "{name}");
        }
    }

    #[test]
    fn a_rekey_adds_no_time_series() {
        let before = busy();
        let mut after = before.clone();
        for (index, sa) in after.sas.iter_mut().enumerate() {
            sa.spi = format!("0xabc{index}");
        }
        let names = |status: &Status| {
            samples(&render(status).unwrap())
                .into_keys()
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&before), names(&after));
    }
}
