//! What both drivers have in common: one worker's queues of one interface, and the kernel's driver beside them.

use super::{
    HopsReader, XdpSocket,
    beside::Beside,
    next_hops::{HopsNow, NextHop},
};
use crate::io::{Descriptors, Driver, Traffic};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer, PacketBuf, Verdict};
use std::{io, ops::Range, os::fd::AsFd};

/// The queues, at least one, and what is beside them.
pub(super) struct Side {
    queues: Vec<XdpSocket>,
    kernel: Beside,
    hops: HopsReader,
    reasons: Reasons,
    turn: usize,
}

/// Why packets are lost here.
pub(super) struct Reasons {
    /// A frame holds no packet for us.
    pub malformed: DropReason,
    /// The kernel had no room for it.
    pub overrun: DropReason,
    /// There is no room for it on the way out.
    pub full: DropReason,
    /// The kernel did not take it.
    pub refused: DropReason,
}

/// How a packet leaves as a frame.
pub(super) struct Departure {
    /// Bytes that its headers take, before its data.
    pub header_bytes: usize,
    /// Where to.
    pub hop: NextHop,
    /// Its outer side.
    pub outer: Outer,
}

impl Side {
    pub(super) fn new(
        queues: Vec<XdpSocket>,
        kernel: Box<dyn Driver>,
        hops: HopsReader,
        reasons: Reasons,
    ) -> Self {
        Self {
            queues,
            kernel: Beside::new(kernel),
            hops,
            reasons,
            turn: 0,
        }
    }

    /// Fills the batch from all queues and the kernel. `read` looks at a frame and says where its packet lies.
    pub(super) fn receive(
        &mut self,
        batch: &mut Batch,
        drops: &mut DropCounters,
        read: impl Fn(&mut [u8]) -> Option<(Range<usize>, Outer)>,
    ) -> io::Result<()> {
        // Each time beginning with another queue, so that a busy one cannot starve the rest.
        self.turn = self.turn.wrapping_add(1);
        let start = self.turn % self.queues.len().max(1);
        let (last, first) = self.queues.split_at_mut(start);
        let malformed = self.reasons.malformed;
        self.kernel.receive(batch, drops, |batch, drops| {
            for queue in first.iter_mut().chain(last) {
                let refused = queue.receive(batch, &read);
                drops.add(malformed, refused as u64);
            }
        })
    }

    /// Sends by the first queue what `find` knows a way for, with the headers that `write` puts before it; by the kernel all
    /// else. `find` is told the largest IP packet that the queue takes.
    pub(super) fn transmit(
        &mut self,
        batch: &mut Batch,
        drops: &mut DropCounters,
        find: impl Fn(&mut HopsNow<'_>, &Batch, &PacketBuf, usize) -> Option<Departure>,
        write: impl Fn(&mut [u8], &Departure) -> bool,
    ) -> Traffic {
        let mut sent = Traffic::default();
        let queue = self.queues.first_mut();
        let Some(queue) = queue.filter(|_| batch.is_lent()) else {
            return self.kernel.transmit(batch, drops);
        };
        let mut hops = self.hops.now();
        let mut is_any_left = false;
        for index in 0..batch.len() {
            let packet = batch.packets()[index];
            if packet.verdict != Verdict::Forward {
                continue;
            }
            let departure = find(&mut hops, batch, &packet, queue.mtu())
                .filter(|it| packet.headroom() >= it.header_bytes);
            let Some(departure) = departure else {
                is_any_left = true;
                continue;
            };
            let grown = batch.packets_mut()[index].grow(departure.header_bytes as i32, 0);
            let written = grown && write(batch.data_mut(index), &departure);
            debug_assert!(written, "room and address families were looked at");
            if written && queue.has_room(batch) && queue.send(batch, index) {
                sent.add(packet.data_bytes());
            } else {
                batch.packets_mut()[index].verdict = Verdict::Drop(self.reasons.full);
                drops.add(self.reasons.full, 1);
            }
        }
        queue.flush(batch);
        if is_any_left {
            sent += self.kernel.transmit(batch, drops);
        }
        sent
    }

    pub(super) fn reclaim(&mut self, batch: &mut Batch) {
        if let Some(queue) = self.queues.first_mut() {
            queue.reclaim(batch);
        }
    }

    pub(super) fn count_lost(&mut self, drops: &mut DropCounters) {
        for queue in &mut self.queues {
            let lost = queue.take_lost();
            drops.add(self.reasons.overrun, lost.arriving);
            drops.add(self.reasons.refused, lost.leaving);
        }
        self.kernel.count_lost(drops);
    }

    pub(super) fn poll_descriptors(&self) -> Descriptors<'_> {
        let mut all = self.kernel.poll_descriptors();
        for queue in &self.queues {
            let _ = all.try_push(queue.as_fd()); // `nic/mod.rs` gives no worker more queues than fit
        }
        all
    }
}
