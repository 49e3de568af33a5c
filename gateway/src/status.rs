//! What the daemon tells about itself: plain rows of texts and numbers, the same in JSON, in
//! `esplane show` and behind `/metrics`. Nothing here is secret.

use esplane_api::{DropCounters, DropReason, SaId, SaStatus, TunnelId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Everything at one moment; the body of `GET /v1/status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The node's name.
    pub node: String,
    /// This program's version.
    pub version: String,
    /// The AEAD implementation chosen at start.
    pub aead: String,
    /// Since the daemon started.
    pub uptime_seconds: u64,
    /// Whether packets can flow.
    pub ready: bool,
    /// Why not, if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready_because: Option<String>,
    /// The inner interface's name.
    pub interface: String,
    /// Its MTU.
    pub mtu: u32,
    /// Every tunnel, whatever keys it.
    pub peers: Vec<PeerRow>,
    /// The strongSwan whose tunnels we carry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strongswan: Option<StrongswanRow>,
    /// Every SA installed now.
    pub sas: Vec<SaRow>,
    /// Every protected network.
    pub routes: Vec<RouteRow>,
    /// Packets dropped, by the name of the reason. A missing reason is 0.
    pub drops: BTreeMap<String, u64>,
    /// The data threads.
    pub workers: Vec<WorkerRow>,
    /// Over all peers, past ones included.
    pub handshakes: HandshakeTotals,
    /// How often the configuration was read again, and how often that failed.
    #[serde(default)]
    pub reloads: ReloadTotals,
}

/// One tunnel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerRow {
    /// Its name.
    pub name: String,
    /// Its number within this process.
    pub tunnel: u32,
    /// What keys it: `noise`, `static` or `strongswan`.
    pub keyed_by: String,
    /// The peer's public key, where Noise keys it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    /// Where we send to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// From which ports of their own our workers send to it; empty if all send from the port that we listen on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub worker_ports: Vec<u16>,
    /// The key exchange's state in a word.
    pub state: String,
    /// Whether an SA can carry traffic now.
    pub up: bool,
    /// Since the last handshake was completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handshake_seconds_ago: Option<u64>,
    /// The AEAD in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// The post-quantum half in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kem: Option<String>,
    /// Completed, since the peer is known.
    pub handshakes: u64,
    /// Of these, those that replaced working SAs.
    pub rekeys: u64,
    /// Given up.
    pub handshake_failures: u64,
    /// Sent, over all its SAs, past ones included.
    pub sent: Traffic,
    /// Received, over all its SAs, past ones included.
    pub received: Traffic,
}

/// A strongSwan and its children, in the words of swanctl.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StrongswanRow {
    /// Where its keys come from: `kernel` or `preload`.
    pub mode: String,
    /// charon's socket.
    pub vici: String,
    /// Whether charon answers there now.
    pub charon_answers: bool,
    /// Its children, up or to be negotiated on demand.
    pub children: Vec<ChildRow>,
}

/// One child of a connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChildRow {
    /// The name of its tunnel, as in `peers` and `sas`.
    pub name: String,
    /// Its connection's name.
    pub connection: String,
    /// Its own.
    pub child: String,
    /// charon's number of the IKE_SA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ike_unique_id: Option<u32>,
    /// charon's numbers of its CHILD_SAs, oldest first.
    pub unique_ids: Vec<u32>,
    /// The kernel's number of its policy.
    pub reqid: u32,
    /// `INSTALLED` and the like; `ON DEMAND` where packets are to ask for it.
    pub state: String,
    /// Whether packets can ask for it (`start_action = trap`).
    pub on_demand: bool,
    /// Our identity and address.
    pub local_id: String,
    /// Our end, with the port of IKE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<String>,
    /// The peer's identity.
    pub remote_id: String,
    /// The peer's end, with the port of IKE.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<String>,
    /// Our networks.
    pub local_ts: Vec<String>,
    /// The peer's networks.
    pub remote_ts: Vec<String>,
    /// Why what of it is not carried, if anything is not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// Packets and inner bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Packets carried.
    pub packets: u64,
    /// Inner bytes carried.
    pub bytes: u64,
    /// Received packets that failed authentication.
    #[serde(default)]
    pub authentication_failures: u64,
    /// Received packets refused by the replay window.
    #[serde(default)]
    pub replays: u64,
}

/// One SA.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SaRow {
    /// Its tunnel's name.
    pub peer: String,
    /// `inbound` or `outbound`.
    pub direction: String,
    /// Its name on the wire.
    pub spi: String,
    /// Its AEAD.
    pub suite: String,
    /// Whether its numbers have 64 bits.
    pub esn: bool,
    /// Whether it is the one that sends (inbound: always).
    pub active: bool,
    /// The one worker that sends with it, if it is one's alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<u16>,
    /// Our address.
    pub local: String,
    /// The peer's address.
    pub remote: String,
    /// `esp` or `udp`.
    pub encapsulation: String,
    /// The last number sent, or the highest received.
    pub sequence: u64,
    /// What it carried.
    pub traffic: Traffic,
}

/// One protected network.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    /// The network.
    pub destination: String,
    /// The tunnel it belongs to.
    pub peer: String,
    /// Its metric.
    pub metric: u32,
    /// Whether the kernel has it.
    pub installed: bool,
    /// Why not, if not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// One data thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRow {
    /// From 0.
    pub index: usize,
    /// The core it is pinned to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub core: Option<usize>,
    /// Batches worked on.
    pub batches: u64,
    /// From the private network into tunnels.
    pub sent: Traffic,
    /// From tunnels into the private network.
    pub received: Traffic,
}

/// Key exchange over all peers since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandshakeTotals {
    /// Completed.
    pub completed: u64,
    /// Of these, those that replaced working SAs.
    pub rekeys: u64,
    /// Given up.
    pub failed: u64,
}

/// Reading the configuration again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadTotals {
    /// The new configuration is in force.
    pub succeeded: u64,
    /// The new configuration was wrong; the old one stayed in force.
    pub failed: u64,
}

impl Status {
    /// Adds counters by reason.
    pub fn add_drops(&mut self, counters: &DropCounters) {
        for (reason, count) in counters.iter().filter(|(_, count)| *count > 0) {
            *self.drops.entry(reason.name().to_owned()).or_default() += count;
        }
    }

    /// The count of one reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get(reason.name()).copied().unwrap_or(0)
    }
}

impl SaRow {
    /// As the dataplane has it, with its tunnel's name.
    pub fn new(sa: &SaStatus, peer: &str) -> Self {
        let path = &sa.path;
        Self {
            peer: peer.to_owned(),
            direction: sa.id.direction.to_string(),
            spi: sa.id.spi.to_string(),
            suite: sa.suite.to_string(),
            esn: sa.esn == esplane_api::Esn::On,
            active: sa.active,
            worker: sa.worker,
            local: match path.encap() {
                Some(encap) => {
                    std::net::SocketAddr::new(path.local(), encap.local_port).to_string()
                }
                None => path.local().to_string(),
            },
            remote: match path.encap() {
                Some(_) => path.remote_socket().to_string(),
                None => path.remote().to_string(),
            },
            encapsulation: if path.encap().is_some() { "udp" } else { "esp" }.to_owned(),
            sequence: sa.sequence,
            traffic: Traffic::of(sa),
        }
    }
}

impl Traffic {
    fn of(sa: &SaStatus) -> Self {
        let statistics = sa.statistics;
        Self {
            packets: statistics.packets,
            bytes: statistics.bytes,
            authentication_failures: statistics.authentication_failures,
            replays: statistics.replays,
        }
    }

    /// Adds what `now` has more than `before`; a counter that went back belongs to a new SA.
    fn add_progress(&mut self, before: Self, now: Self) {
        let progress = |before: u64, now: u64| if now >= before { now - before } else { now };
        self.packets += progress(before.packets, now.packets);
        self.bytes += progress(before.bytes, now.bytes);
        self.authentication_failures +=
            progress(before.authentication_failures, now.authentication_failures);
        self.replays += progress(before.replays, now.replays);
    }
}

/// Totals of each tunnel over SAs that come and go, so that its counters never go backwards.
///
/// Observed regularly (once a second) and before SAs are removed.
#[derive(Clone, Debug, Default)]
pub struct TrafficLedger {
    seen: BTreeMap<SaId, Traffic>,
    totals: BTreeMap<TunnelId, (Traffic, Traffic)>,
}

impl TrafficLedger {
    /// Takes the state of all SAs that are installed now.
    pub fn observe(&mut self, sas: &[SaStatus]) {
        let mut seen = BTreeMap::new();
        for sa in sas {
            let now = Traffic::of(sa);
            let before = self.seen.get(&sa.id).copied().unwrap_or_default();
            let (sent, received) = self.totals.entry(sa.id.tunnel).or_default();
            match sa.id.direction {
                esplane_api::Direction::Outbound => sent.add_progress(before, now),
                esplane_api::Direction::Inbound => received.add_progress(before, now),
            }
            seen.insert(sa.id, now);
        }
        self.seen = seen;
    }

    /// Forgets tunnels that are gone.
    pub fn retain(&mut self, keep: impl Fn(TunnelId) -> bool) {
        self.totals.retain(|tunnel, _| keep(*tunnel));
    }

    /// What a tunnel has sent and received so far.
    pub fn totals(&self, tunnel: TunnelId) -> (Traffic, Traffic) {
        self.totals.get(&tunnel).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use esplane_api::{AeadSuite, Direction, Esn, OuterPath, SaStatistics, Spi, UdpEncap};

    fn sa(tunnel: u32, direction: Direction, spi: u32, packets: u64) -> SaStatus {
        let encap = UdpEncap {
            local_port: 4500,
            remote_port: 4501,
        };
        let (local, remote) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        SaStatus {
            id: SaId {
                tunnel: TunnelId(tunnel),
                direction,
                spi: Spi::new(spi).unwrap(),
            },
            suite: AeadSuite::Aes128Gcm16,
            esn: Esn::On,
            path: OuterPath::new(local, remote, Some(encap)).unwrap(),
            active: true,
            worker: None,
            sequence: packets,
            statistics: SaStatistics {
                packets,
                bytes: packets * 100,
                ..SaStatistics::default()
            },
        }
    }

    #[test]
    fn a_tunnels_totals_go_on_when_its_sas_are_replaced() {
        use Direction::{Inbound, Outbound};
        let mut ledger = TrafficLedger::default();
        let sent = |ledger: &TrafficLedger| ledger.totals(TunnelId(1)).0.packets;
        ledger.observe(&[
            sa(1, Outbound, 300, 10),
            sa(1, Inbound, 400, 3),
            sa(2, Outbound, 300, 99),
        ]);
        assert_eq!(sent(&ledger), 10);
        // Rekeying: the new SA beside the old one.
        ledger.observe(&[sa(1, Outbound, 300, 12), sa(1, Outbound, 301, 5)]);
        assert_eq!(sent(&ledger), 17);
        // The old one is gone, the new one goes on; then a long silence.
        ledger.observe(&[sa(1, Outbound, 301, 6)]);
        ledger.observe(&[]);
        assert_eq!(sent(&ledger), 18);
        // The same SPI again is another SA.
        ledger.observe(&[sa(1, Outbound, 301, 2)]);
        assert_eq!(sent(&ledger), 20);
        assert_eq!(
            ledger.totals(TunnelId(1)).1,
            Traffic {
                packets: 3,
                bytes: 300,
                ..Traffic::default()
            }
        );
        assert_eq!(ledger.totals(TunnelId(2)).0.packets, 99);
        ledger.retain(|tunnel| tunnel == TunnelId(1));
        assert_eq!(ledger.totals(TunnelId(2)).0.packets, 0);
    }

    #[test]
    fn a_counter_that_starts_again_in_between_is_not_subtracted() {
        let mut ledger = TrafficLedger::default();
        ledger.observe(&[sa(1, Direction::Outbound, 300, 10)]);
        ledger.observe(&[sa(1, Direction::Outbound, 300, 4)]);
        assert_eq!(ledger.totals(TunnelId(1)).0.packets, 14);
    }

    #[test]
    fn a_status_survives_its_way_through_json() {
        let mut drops = DropCounters::default();
        drops.add(DropReason::NoPolicy, 3);
        let mut status = Status {
            node: "n".to_owned(),
            sas: vec![SaRow::new(&sa(1, Direction::Inbound, 300, 7), "paris")],
            peers: vec![PeerRow {
                endpoint: Some("[::1]:1".to_owned()),
                ..PeerRow::default()
            }],
            ..Status::default()
        };
        status.add_drops(&drops);
        status.add_drops(&drops);
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
        assert_eq!(
            (
                status.dropped(DropReason::NoPolicy),
                status.dropped(DropReason::UnknownSpi)
            ),
            (6, 0)
        );
        let row = &status.sas[0];
        assert_eq!(
            (row.local.as_str(), row.remote.as_str()),
            ("192.0.2.1:4500", "192.0.2.2:4501")
        );
        assert_eq!(
            (row.spi.as_str(), row.encapsulation.as_str()),
            ("0x0000012c", "udp")
        );
    }
}
