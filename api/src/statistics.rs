use crate::{AeadSuite, Esn, OuterPath, Policy, SaId, TunnelId};
use serde::Serialize;

/// What one SA has carried so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SaStatistics {
    /// Packets carried (inbound: delivered; dummies included).
    pub packets: u64,
    /// Inner bytes carried.
    pub bytes: u64,
    /// Inbound packets that failed authentication.
    pub authentication_failures: u64,
    /// Inbound packets refused by the replay window.
    pub replays: u64,
}

/// One SA as a person wants to see it. Holds no secret.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SaStatus {
    /// Its name.
    pub id: SaId,
    /// Its AEAD.
    pub suite: AeadSuite,
    /// Its numbers' width.
    pub esn: Esn,
    /// Where its packets travel.
    pub path: OuterPath,
    /// Outbound: whether it is the one that sends, of those with the same `worker`. Inbound: always true.
    pub active: bool,
    /// Outbound: the one worker that sends with it, if it is one's alone.
    pub worker: Option<u16>,
    /// Outbound: the last number sent. Inbound: the highest received.
    pub sequence: u64,
    /// What it has carried.
    pub statistics: SaStatistics,
}

/// One tunnel as a person wants to see it.
#[derive(Clone, Debug, PartialEq)]
pub struct TunnelStatus {
    /// Its number.
    pub id: TunnelId,
    /// Its name.
    pub name: String,
    /// Its policies.
    pub policies: Vec<Policy>,
}

/// What a tunnel has carried over all its SAs, past ones included; a control plane reads liveness from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TunnelActivity {
    /// The tunnel.
    pub tunnel: TunnelId,
    /// Packets sent with payload (dummies not counted).
    pub sent_data_packets: u64,
    /// Authentic packets received with payload.
    pub received_data_packets: u64,
    /// Authentic packets received, dummies included.
    pub received_packets: u64,
}
