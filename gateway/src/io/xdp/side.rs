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

/// The queues, at least one, and what is beside them: a driver, for `headers` says what is special to the side.
pub struct Side<H> {
    queues: Vec<XdpSocket>,
    kernel: Beside,
    hops: HopsReader,
    headers: H,
    turn: usize,
}

/// What is special to a side: the headers of its packets, and what its losses are called.
pub(super) trait Headers: Send {
    /// Why packets are lost here.
    const REASONS: Reasons;

    /// Looks at a frame that has arrived and says where its packet lies.
    fn open(&self, frame: &mut [u8]) -> Option<(Range<usize>, Outer)>;

    /// How a packet leaves, if a way is known for it. `mtu`: the largest IP packet that the queue takes.
    fn find(
        &self,
        hops: &mut HopsNow<'_>,
        batch: &Batch,
        packet: &PacketBuf,
        mtu: usize,
    ) -> Option<Departure>;

    /// Writes the headers to the start of the frame, for which there is room.
    fn write(&self, frame: &mut [u8], departure: &Departure) -> bool;
}

/// Why packets are lost.
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

impl<H> Side<H> {
    pub(super) fn over(
        queues: Vec<XdpSocket>,
        kernel: Box<dyn Driver>,
        hops: HopsReader,
        headers: H,
    ) -> Self {
        Self {
            queues,
            kernel: Beside::new(kernel),
            hops,
            headers,
            turn: 0,
        }
    }
}

impl<H: Headers> Driver for Side<H> {
    /// Fills the batch from all queues and the kernel.
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        // Each time beginning with another queue, so that a busy one cannot starve the rest.
        self.turn = self.turn.wrapping_add(1);
        let start = self.turn % self.queues.len().max(1);
        let (last, first) = self.queues.split_at_mut(start);
        self.kernel.receive(batch, drops, |batch, drops| {
            for queue in first.iter_mut().chain(last) {
                let refused = queue.receive(batch, |frame| self.headers.open(frame));
                drops.add(H::REASONS.malformed, refused as u64);
            }
        })
    }

    /// Sends by the first queue what a way is known for; by the kernel all else.
    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
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
            let departure = (self.headers.find(&mut hops, batch, &packet, queue.mtu()))
                .filter(|it| packet.headroom() >= it.header_bytes);
            let Some(departure) = departure else {
                is_any_left = true;
                continue;
            };
            let grown = batch.packets_mut()[index].grow(departure.header_bytes as i32, 0);
            let written = grown && self.headers.write(batch.data_mut(index), &departure);
            debug_assert!(written, "room and address families were looked at");
            if written && queue.has_room(batch) && queue.send(batch, index) {
                sent.add(packet.data_bytes());
            } else {
                batch.packets_mut()[index].verdict = Verdict::Drop(H::REASONS.full);
                drops.add(H::REASONS.full, 1);
            }
        }
        queue.flush(batch);
        if is_any_left {
            sent += self.kernel.transmit(batch, drops);
        }
        sent
    }

    fn reclaim(&mut self, batch: &mut Batch) {
        if let Some(queue) = self.queues.first_mut() {
            queue.reclaim(batch);
        }
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        for queue in &mut self.queues {
            let lost = queue.take_lost();
            drops.add(H::REASONS.overrun, lost.arriving);
            drops.add(H::REASONS.refused, lost.leaving);
        }
        self.kernel.count_lost(drops);
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        let mut all = self.kernel.poll_descriptors();
        for queue in &self.queues {
            let _ = all.try_push(queue.as_fd()); // `nic/mod.rs` gives no worker more queues than fit
        }
        all
    }
}
