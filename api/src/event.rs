use crate::{LifetimeUnit, SaId, TunnelId};
use serde::Serialize;
use std::net::SocketAddr;

/// What the dataplane tells the control planes.
///
/// Events are hints with bounded delivery: one may be lost under pressure, and each is raised again
/// while its cause lasts or can be read from the statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum SaEvent {
    /// A packet belongs to this tunnel and no SA can carry it: negotiate one.
    SaNeeded {
        /// The tunnel.
        tunnel: TunnelId,
    },
    /// A soft limit is reached: negotiate a successor.
    SoftExpired {
        /// The SA.
        sa: SaId,
        /// Which limit.
        unit: LifetimeUnit,
    },
    /// A hard limit is reached: the SA carries nothing any more.
    HardExpired {
        /// The SA.
        sa: SaId,
        /// Which limit.
        unit: LifetimeUnit,
    },
    /// More than half of the reserved numbers are used: store a further reservation, then
    /// [`crate::SaCommand::ExtendSequence`].
    SequenceLow {
        /// The outbound SA.
        sa: SaId,
        /// The next number it will send.
        next: u64,
    },
    /// All numbers are used (RFC 4303 §3.3.3): the SA sends nothing any more.
    SequenceExhausted {
        /// The outbound SA.
        sa: SaId,
    },
    /// The first authentic packet has arrived on an inbound SA: the peer sends with it, so it
    /// has both keys.
    FirstReceived {
        /// The inbound SA.
        sa: SaId,
    },
    /// The newest authentic packet of a roaming tunnel came from another address than we send to.
    EndpointMoved {
        /// The tunnel.
        tunnel: TunnelId,
        /// Where it came from.
        remote: SocketAddr,
    },
}

impl SaEvent {
    /// The tunnel it is about.
    pub fn tunnel(&self) -> TunnelId {
        match self {
            Self::SaNeeded { tunnel } | Self::EndpointMoved { tunnel, .. } => *tunnel,
            Self::SoftExpired { sa, .. }
            | Self::HardExpired { sa, .. }
            | Self::SequenceLow { sa, .. }
            | Self::SequenceExhausted { sa }
            | Self::FirstReceived { sa } => sa.tunnel,
        }
    }
}
