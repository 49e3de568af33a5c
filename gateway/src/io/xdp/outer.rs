//! The public side over AF_XDP, with the kernel's sockets for whatever is better left to them.

use super::{
    HopsReader, XdpSocket,
    ethernet::{ETHERNET_BYTES, open_outer, outer_bytes, write_outer},
    next_hops::HopsNow,
    side::{Departure, Headers, Reasons, Side},
};
use crate::io::Driver;
use esplane_api::DropReason;
use esplane_dataplane::batch::{Batch, Outer, PacketBuf};
use std::ops::Range;

/// One worker's queues of the public interface, and its sockets.
///
/// Data that arrives as a frame is handed on as a socket would: it starts at the ESP header. What leaves goes by the
/// first queue; by the sockets goes what has no known next hop on this interface, and what is larger than its MTU, which the
/// kernel fragments.
pub type XdpOuter = Side<Outside>;

/// Ethernet, IP, and UDP where there is.
pub struct Outside {
    /// Our UDP port, where a packet does not say.
    port: u16,
}

impl XdpOuter {
    /// Over these queues, at least one, and these sockets.
    pub fn new(
        queues: Vec<XdpSocket>,
        kernel: Box<dyn Driver>,
        hops: HopsReader,
        port: u16,
    ) -> Self {
        Self::over(queues, kernel, hops, Outside { port })
    }
}

impl Headers for Outside {
    const REASONS: Reasons = Reasons {
        malformed: DropReason::OuterMalformed,
        overrun: DropReason::OuterOverrun,
        full: DropReason::TransmitQueueFull,
        refused: DropReason::TransmitFailed,
    };

    fn open(&self, frame: &mut [u8]) -> Option<(Range<usize>, Outer)> {
        open_outer(frame).map(|(outer, at)| (at, outer))
    }

    fn find(
        &self,
        hops: &mut HopsNow<'_>,
        batch: &Batch,
        packet: &PacketBuf,
        mtu: usize,
    ) -> Option<Departure> {
        let outer = batch.outer_of(packet);
        let header_bytes = outer_bytes(&outer);
        let bytes = header_bytes + packet.data_bytes();
        let hop = hops
            .find(outer.remote.ip())
            .filter(|hop| bytes <= hop.mtu.min(mtu))?;
        let is_of_one_family = outer.local.is_unspecified()
            && hop.source.is_ipv4() == outer.remote.is_ipv4()
            || outer.local.is_ipv4() == outer.remote.is_ipv4();
        is_of_one_family.then_some(Departure {
            header_bytes: ETHERNET_BYTES + header_bytes,
            hop,
            outer,
        })
    }

    fn write(&self, frame: &mut [u8], departure: &Departure) -> bool {
        let port = match departure.outer.local_port {
            0 => self.port,
            port => port,
        };
        write_outer(frame, &departure.hop, &departure.outer, port)
    }
}
