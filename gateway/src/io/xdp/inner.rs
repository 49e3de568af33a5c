//! The private side over AF_XDP, with the TUN for whatever is better left to the kernel.

use super::{
    HopsReader, XdpSocket,
    ethernet::{ETHERNET_BYTES, destination, may_pass, open_inner, write_inner},
    next_hops::HopsNow,
    side::{Departure, Headers, Reasons, Side},
};
use crate::io::Driver;
use esplane_api::DropReason;
use esplane_dataplane::batch::{Batch, Outer, PacketBuf};
use std::ops::Range;

/// One worker's queues of the private interface, and its queue of the TUN.
///
/// Between the two interfaces it is the router that the kernel would be. To the TUN goes what is for this machine, what has no
/// known next hop on this interface, and what the kernel must answer for (a TTL that is used up, a packet too large).
pub type XdpInner = Side<Inner>;

/// Ethernet alone.
pub struct Inner;

impl XdpInner {
    /// Over these queues, at least one, and this TUN.
    pub fn new(queues: Vec<XdpSocket>, kernel: Box<dyn Driver>, hops: HopsReader) -> Self {
        Self::over(queues, kernel, hops, Inner)
    }
}

impl Headers for Inner {
    const REASONS: Reasons = Reasons {
        malformed: DropReason::InnerMalformed,
        overrun: DropReason::InnerOverrun,
        full: DropReason::DeliverFailed,
        refused: DropReason::DeliverFailed,
    };

    fn open(&self, frame: &mut [u8]) -> Option<(Range<usize>, Outer)> {
        open_inner(frame).map(|at| (at, Outer::NONE))
    }

    fn find(
        &self,
        hops: &mut HopsNow<'_>,
        batch: &Batch,
        packet: &PacketBuf,
        mtu: usize,
    ) -> Option<Departure> {
        let data = batch.bytes(packet.data_range());
        let hop = destination(data)
            .filter(|_| may_pass(data))
            .and_then(|to| hops.find(to))
            .filter(|hop| data.len() <= hop.mtu.min(mtu))?;
        Some(Departure {
            header_bytes: ETHERNET_BYTES,
            hop,
            outer: Outer::NONE,
        })
    }

    fn write(&self, frame: &mut [u8], departure: &Departure) -> bool {
        write_inner(frame, &departure.hop)
    }
}
