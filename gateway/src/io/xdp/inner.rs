//! The private side over AF_XDP, with the TUN for whatever is better left to the kernel.

use super::{
    HopsReader, XdpSocket,
    ethernet::{ETHERNET_BYTES, destination, may_pass, open_inner, write_inner},
    next_hops::HopsNow,
    side::{Departure, Reasons, Side},
};
use crate::io::{Descriptors, Driver, Traffic};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer, PacketBuf};
use std::io;

/// One worker's queues of the private interface, and its queue of the TUN.
///
/// Between the two interfaces it is the router that the kernel would be. To the TUN goes what is for this machine, what has no
/// known next hop on this interface, and what the kernel must answer for (a TTL that is used up, a packet too large).
pub struct XdpInner(Side);

impl XdpInner {
    /// Over these queues, at least one, and this TUN.
    pub fn new(queues: Vec<XdpSocket>, kernel: Box<dyn Driver>, hops: HopsReader) -> Self {
        let reasons = Reasons {
            malformed: DropReason::InnerMalformed,
            overrun: DropReason::InnerOverrun,
            full: DropReason::DeliverFailed,
            refused: DropReason::DeliverFailed,
        };
        Self(Side::new(queues, kernel, hops, reasons))
    }
}

impl Driver for XdpInner {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        self.0.receive(batch, drops, |frame| {
            open_inner(frame).map(|at| (at, Outer::NONE))
        })
    }

    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        let write = |frame: &mut [u8], departure: &Departure| write_inner(frame, &departure.hop);
        self.0.transmit(batch, drops, find, write)
    }

    fn reclaim(&mut self, batch: &mut Batch) {
        self.0.reclaim(batch);
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        self.0.count_lost(drops);
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        self.0.poll_descriptors()
    }
}

fn find(
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
