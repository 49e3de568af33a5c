//! The public side over AF_XDP, with the kernel's sockets for whatever is better left to them.

use super::{
    HopsReader, Leftovers, XdpSocket,
    beside::Beside,
    ethernet::{ETHERNET_BYTES, open_outer, outer_bytes, write_outer},
    in_turn,
};
use crate::io::{Descriptors, Driver, Traffic};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Verdict};
use std::{io, os::fd::AsFd};

/// One worker's queues of the public interface, and its sockets.
///
/// Data that arrives as a frame is handed on as a socket would: it starts at the ESP header. What leaves goes by the
/// first queue; by the sockets goes what has no known next hop on this interface, and what is larger than its MTU, which the
/// kernel fragments.
pub struct XdpOuter {
    queues: Vec<XdpSocket>,
    kernel: Beside,
    hops: HopsReader,
    /// Our UDP port, where a packet does not say.
    port: u16,
    /// Packets for the kernel: few.
    left: Option<Box<Batch>>,
    turn: usize,
}

impl XdpOuter {
    /// Over these queues, at least one, and these sockets.
    pub fn new(
        queues: Vec<XdpSocket>,
        kernel: Box<dyn Driver>,
        hops: HopsReader,
        port: u16,
    ) -> Self {
        Self {
            queues,
            kernel: Beside::new(kernel),
            hops,
            port,
            left: None,
            turn: 0,
        }
    }
}

impl Driver for XdpOuter {
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
            let (outer, data) = (batch.outer_of(packet), batch.data(index));
            let bytes = outer_bytes(&outer) + data.len();
            let hop = hops
                .find(outer.remote.ip())
                .filter(|hop| bytes <= hop.mtu.min(queue.mtu()));
            let ours = hop.filter(|hop| {
                outer.local.is_unspecified() && hop.source.is_ipv4() == outer.remote.is_ipv4()
                    || outer.local.is_ipv4() == outer.remote.is_ipv4()
            });
            let Some(hop) = ours else {
                left.push(data, outer, drops);
                continue;
            };
            let port = match outer.local_port {
                0 => self.port,
                port => port,
            };
            let write = |frame: &mut [u8]| {
                let _written = write_outer(frame, &hop, &outer, port, data);
                debug_assert!(_written, "families were compared above");
            };
            if queue.send(ETHERNET_BYTES + bytes, write) {
                sent.add(data.len());
            } else {
                drops.add(DropReason::TransmitQueueFull, 1);
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
            drops.add(DropReason::OuterOverrun, lost.arriving);
            drops.add(DropReason::TransmitFailed, lost.leaving);
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
        match open_outer(frame) {
            None => drops.add(DropReason::OuterMalformed, 1),
            Some((outer, at)) => {
                if !batch.push(&frame[at], outer) {
                    drops.add(DropReason::ReceiveTruncated, 1);
                }
            }
        }
    });
}
