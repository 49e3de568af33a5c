//! The private side over AF_XDP, with the TUN for whatever is better left to the kernel.

use super::{
    HopsReader, Leftovers, XdpSocket,
    beside::Beside,
    ethernet::{ETHERNET_BYTES, destination, may_pass, open_inner, write_inner},
    in_turn,
};
use crate::io::{Descriptors, Driver, Traffic};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer, Verdict};
use std::{io, os::fd::AsFd};

/// One worker's queues of the private interface, and its queue of the TUN.
///
/// Between the two interfaces it is the router that the kernel would be. To the TUN goes what is for this machine, what has no
/// known next hop on this interface, and what the kernel must answer for (a TTL that is used up, a packet too large).
pub struct XdpInner {
    queues: Vec<XdpSocket>,
    kernel: Beside,
    hops: HopsReader,
    /// Packets for the kernel.
    left: Option<Box<Batch>>,
    turn: usize,
}

impl XdpInner {
    /// Over these queues, at least one, and this TUN.
    pub fn new(queues: Vec<XdpSocket>, kernel: Box<dyn Driver>, hops: HopsReader) -> Self {
        Self {
            queues,
            kernel: Beside::new(kernel),
            hops,
            left: None,
            turn: 0,
        }
    }
}

impl Driver for XdpInner {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        let queues = in_turn(&mut self.queues, &mut self.turn);
        self.kernel.receive(batch, drops, |batch, drops| {
            for queue in queues {
                receive_frames(queue, batch, drops);
            }
        })
    }

    fn transmit(&mut self, batch: &Batch, drops: &mut DropCounters) -> Traffic {
        let mut sent = Traffic::default();
        let Some(queue) = self.queues.first_mut() else {
            return self.kernel.transmit(batch, drops);
        };
        let mut hops = self.hops.now();
        let mut left = Leftovers::new(&mut self.left, batch);
        for (index, packet) in batch.packets().iter().enumerate() {
            if packet.verdict != Verdict::Forward {
                continue;
            }
            let data = batch.data(index);
            let hop = destination(data)
                .filter(|_| may_pass(data))
                .and_then(|to| hops.find(to))
                .filter(|hop| data.len() <= hop.mtu.min(queue.mtu()));
            let Some(hop) = hop else {
                left.push(data, batch.outer_of(packet), drops);
                continue;
            };
            let write = |frame: &mut [u8]| {
                let _written = write_inner(frame, &hop, data);
                debug_assert!(_written, "its TTL was looked at above");
            };
            if queue.send(ETHERNET_BYTES + data.len(), write) {
                sent.add(data.len());
            } else {
                drops.add(DropReason::DeliverFailed, 1);
            }
        }
        queue.flush();
        if let Some(left) = left.batch() {
            sent += self.kernel.transmit(left, drops);
        }
        sent
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        for queue in &mut self.queues {
            let lost = queue.take_lost();
            drops.add(DropReason::InnerOverrun, lost.arriving);
            drops.add(DropReason::DeliverFailed, lost.leaving);
        }
        self.kernel.count_lost(drops);
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        let mut all = self.kernel.poll_descriptors();
        for queue in &self.queues {
            let _ = all.try_push(queue.as_fd()); // `nic.rs` gives no worker more queues than fit
        }
        all
    }
}

fn receive_frames(queue: &mut XdpSocket, batch: &mut Batch, drops: &mut DropCounters) {
    queue.receive(batch.capacity() - batch.len(), |frame| {
        match open_inner(frame) {
            None => drops.add(DropReason::InnerMalformed, 1),
            Some(packet) => {
                if !batch.push(packet, Outer::NONE) {
                    drops.add(DropReason::InnerTooBig, 1);
                }
            }
        }
    });
}
