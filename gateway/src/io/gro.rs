//! Receiving many datagrams as one message (`UDP_GRO`).
//!
//! ```text
//!   recvmmsg ─▶ the batch's arena │ESP 1400│ESP 1400│ESP 1400│ESP 900│    control: TOS, local address, size 1400
//!                                 │handshake│                             from someone else, alone
//!                   │
//!                   ▼ each datagram is a packet of the batch where it lies: opening needs no room around it. Small
//!                     messages move up first, so that many of them fit
//!
//!   what the batch has no room for waits in `store`, and is copied into the next one
//! ```
//!
//! One message holds datagrams of one sender, of one length (but for the last) and with one TOS.
//! More they need not have in common: SPIs, keepalives and handshake messages may be mixed.

use super::{mmsg::Messages, room_bytes};
use arrayvec::ArrayVec;
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer};
use std::{io, ops::Range, os::fd::BorrowedFd};

/// Messages per system call.
pub(super) const MESSAGES_MAX: usize = 32;
/// More than any UDP datagram, or what the kernel makes of several, can have.
const BUFFER_BYTES: usize = 1 << 16;
/// From one buffer to the next: not a power of two, or the starts of all would share few sets of the caches.
pub(super) const STRIDE_BYTES: usize = BUFFER_BYTES + 192;
/// Messages of so few bytes are moved to the end of what is used, or few of them would fill the batch's arena.
const SMALL_BYTES: usize = BUFFER_BYTES / 8;
/// Where packets may start: cache lines.
const ALIGNMENT: usize = 64;

/// Receives such messages into a batch.
pub(super) struct GroReceiver {
    messages: Messages,
    /// For what the batch has no room for. Memory that no message has reached yet is not backed by pages.
    store: Box<[u8]>,
    /// What waits there.
    waiting: ArrayVec<Datagrams, MESSAGES_MAX>,
    /// Datagrams in a message lately: tells how many messages fill a batch.
    usual: usize,
}

/// Datagrams of one message.
struct Datagrams {
    outer: Outer,
    /// Where they lie.
    at: Range<usize>,
    /// Length of each but the last, and at least 1.
    segment: usize,
}

impl GroReceiver {
    pub(super) fn new() -> Self {
        Self {
            messages: Messages::new(),
            store: vec![0; MESSAGES_MAX * STRIDE_BYTES].into_boxed_slice(),
            waiting: ArrayVec::new(),
            usual: 1,
        }
    }

    /// Asks for about as many messages as the batch has room for, and puts their datagrams into the batch; answers how many
    /// that was and how many came. Only while the batch is not full after [`GroReceiver::unpack`].
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        batch: &mut Batch,
        drops: &mut DropCounters,
    ) -> (usize, io::Result<usize>) {
        let free = batch.capacity() - batch.len();
        let wanted = free.div_ceil(self.usual).min(MESSAGES_MAX);
        let start = batch.used_bytes().next_multiple_of(ALIGNMENT);
        let room = batch.spare_room().len();
        let skipped = (start - batch.used_bytes()).min(room);
        let in_place = (room - skipped) / STRIDE_BYTES;
        let (asked, result) = if in_place > 0 {
            let room = &mut batch.spare_room()[skipped..];
            self.call(socket, wanted.min(in_place), Some(room))
        } else {
            self.call(socket, wanted, None)
        };
        if let Ok(arrived) = result {
            self.take(arrived, (in_place > 0).then_some(start), batch, drops);
        }
        (asked, result)
    }

    /// One system call, into this room or into the store, which is empty.
    fn call(
        &mut self,
        socket: BorrowedFd<'_>,
        asked: usize,
        room: Option<&mut [u8]>,
    ) -> (usize, io::Result<usize>) {
        let room = room.unwrap_or(&mut self.store);
        let buffers = room.chunks_exact_mut(STRIDE_BYTES).take(asked);
        let buffers = buffers.map(|chunk| &mut chunk[..BUFFER_BYTES]);
        (asked, self.messages.receive_into(socket, buffers))
    }

    /// Puts the datagrams of the messages that arrived into the batch: where they lie, if that is its arena from `start` on.
    fn take(
        &mut self,
        arrived: usize,
        start: Option<usize>,
        batch: &mut Batch,
        drops: &mut DropCounters,
    ) {
        let mut packets = 0;
        for index in 0..arrived {
            let bytes = self.messages.received_bytes(index).min(BUFFER_BYTES);
            let (outer, segment) = self.messages.outer_of(index, true);
            let segment = segment.unwrap_or(bytes).max(1);
            packets += bytes.div_ceil(segment);
            if self.messages.is_truncated(index) {
                drops.add(DropReason::ReceiveTruncated, bytes.div_ceil(segment) as u64);
                continue;
            }
            let here = index * STRIDE_BYTES;
            let mut at = start.unwrap_or(0) + here;
            let end = batch.used_bytes().next_multiple_of(ALIGNMENT);
            if start.is_some() && bytes <= SMALL_BYTES && end < at {
                batch.move_bytes(at..at + bytes, end);
                at = end;
            }
            let mut datagrams = Datagrams {
                outer,
                at: at..at + bytes,
                segment,
            };
            if start.is_some() {
                if datagrams.place(batch, drops) {
                    continue;
                }
                let left = datagrams.at.clone();
                let stored = here..here + left.len();
                self.store[stored.clone()].copy_from_slice(batch.bytes(left));
                datagrams.at = stored;
            }
            self.waiting.push(datagrams); // as many as there are messages
        }
        if let Some(usual) = packets.checked_div(arrived) {
            self.usual = usual.max(1);
        }
        self.unpack(batch, drops);
    }

    /// Copies what waits into the batch until nothing is left or the batch is full.
    pub(super) fn unpack(&mut self, batch: &mut Batch, drops: &mut DropCounters) {
        let mut done = 0;
        for datagrams in &mut self.waiting {
            if !datagrams.copy(&self.store, batch, drops) {
                break;
            }
            done += 1;
        }
        self.waiting.drain(..done);
    }
}

impl Datagrams {
    /// Makes them packets of the batch in whose arena they lie. `false` if it cannot hold all; the others stay.
    fn place(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> bool {
        let room = room_bytes(batch);
        // At least one: a datagram may be empty.
        while batch.len() < batch.capacity() {
            let next = self.next();
            if next.len() > room {
                drops.add(DropReason::ReceiveTruncated, 1);
            } else {
                batch.push_placed(next.clone(), next, self.outer);
            }
            if self.at.is_empty() {
                return true;
            }
        }
        false
    }

    /// Copies them from the store into the batch. `false` if it cannot hold all; the others stay.
    fn copy(&mut self, store: &[u8], batch: &mut Batch, drops: &mut DropCounters) -> bool {
        while !batch.is_full() {
            if !batch.push(&store[self.next()], self.outer) {
                drops.add(DropReason::ReceiveTruncated, 1);
            }
            if self.at.is_empty() {
                return true;
            }
        }
        false
    }

    /// Where the next one lies.
    fn next(&mut self) -> Range<usize> {
        let end = self.at.end.min(self.at.start + self.segment);
        let next = self.at.start..end;
        self.at.start = end;
        next
    }
}
