use crate::{SaId, SaParams, Spi, TunnelId, TunnelParams};
use std::net::SocketAddr;

/// What a control plane asks of the dataplane.
///
/// A list of commands is carried out as a whole or not at all; workers see all of it or nothing.
#[derive(Clone, Debug)]
pub enum SaCommand {
    /// Define a tunnel, or replace its policies and settings; its SAs stay.
    DefineTunnel(TunnelParams),
    /// Remove a tunnel, its policies and its SAs. Packets for it then meet no policy.
    RemoveTunnel(TunnelId),
    /// Install one SA. An inbound SA receives from now on. An outbound SA sends if the tunnel has
    /// none that does for its worker ([`SaParams::worker`]), else it stands by.
    Install(SaParams),
    /// Send with this installed outbound SA from now on; the one that sent so far, for the same worker, stands by.
    Activate {
        /// The tunnel.
        tunnel: TunnelId,
        /// The outbound SA's SPI.
        spi: Spi,
    },
    /// Never send with this outbound SA again, but keep its counters; the oldest one standing by takes over.
    Retire {
        /// The tunnel.
        tunnel: TunnelId,
        /// The outbound SA's SPI.
        spi: Spi,
    },
    /// Remove one SA. If it was the one that sends, the oldest one standing by takes over.
    Remove(SaId),
    /// The peer has moved: all outbound SAs of the tunnel send there from now on.
    MoveEndpoint {
        /// The tunnel.
        tunnel: TunnelId,
        /// Where the peer is now; the port matters for ESP in UDP only.
        remote: SocketAddr,
    },
    /// Numbers up to `reserved_until` have been stored durably and may be used; answers
    /// [`crate::SaEvent::SequenceLow`].
    ExtendSequence {
        /// The outbound SA.
        sa: SaId,
        /// The last number that may be sent.
        reserved_until: u64,
    },
}
