//! Receiving many datagrams as one message (`UDP_GRO`).
//!
//! ```text
//!   recvmmsg ─▶ buffer 0 │ESP 1400│ESP 1400│ESP 1400│ESP 900│   control: TOS, local address, size 1400
//!               buffer 1 │handshake│                            from someone else, alone
//!                   │
//!                   ▼ unpack: each datagram into a frame of its own; what the batch
//!                     has no room for waits here for the next one
//! ```
//!
//! One message holds datagrams of one sender, of one length (but for the last) and with one TOS.
//! More they need not have in common: SPIs, keepalives and handshake messages may be mixed.

use super::mmsg::Messages;
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::Batch;
use std::{io, os::fd::BorrowedFd};

/// Messages per system call.
const MESSAGES_MAX: usize = 32;
/// More than any UDP datagram, or what the kernel makes of several, can have.
const BUFFER_BYTES: usize = 1 << 16;

/// Buffers for messages of many datagrams, and what is still in them.
pub(super) struct GroReceiver {
    messages: Messages,
    /// Memory that no message has reached yet is not backed by pages.
    buffers: Box<[u8]>,
    /// How many messages the last receipt brought…
    arrived: usize,
    /// … which of them is unpacked next…
    next: usize,
    /// … and from which byte on.
    offset: usize,
    /// Datagrams unpacked since the last receipt.
    unpacked: usize,
    /// Datagrams in a message lately: tells how many messages fill a batch.
    usual: usize,
}

impl GroReceiver {
    pub(super) fn new() -> Self {
        Self {
            messages: Messages::new(),
            buffers: vec![0; MESSAGES_MAX * BUFFER_BYTES].into_boxed_slice(),
            arrived: 0,
            next: 0,
            offset: 0,
            unpacked: 0,
            usual: 1,
        }
    }

    /// Asks for about as many messages as the batch has room for; answers how many that was and how many came.
    /// Only once all before are [unpacked](Self::unpack).
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        batch: &Batch,
    ) -> (usize, io::Result<usize>) {
        let free = batch.capacity() - batch.len();
        let asked = free.div_ceil(self.usual).min(MESSAGES_MAX);
        let buffers = self.buffers.chunks_exact_mut(BUFFER_BYTES).take(asked);
        let result = self.messages.receive_into(socket, buffers);
        (self.arrived, self.next, self.unpacked) = (*result.as_ref().unwrap_or(&0), 0, 0);
        (asked, result)
    }

    /// Copies datagrams into the batch until none is left or the batch is full.
    pub(super) fn unpack(&mut self, batch: &mut Batch, drops: &mut DropCounters) {
        while self.next < self.arrived {
            let (message, bytes) = (self.next, self.messages.received_bytes(self.next));
            let (outer, segment) = self.messages.outer_of(message, true);
            let segment = segment.unwrap_or(bytes).max(1);
            let buffer = &self.buffers[message * BUFFER_BYTES..][..bytes.min(BUFFER_BYTES)];
            let whole = !self.messages.is_truncated(message);
            // At least one: a datagram may be empty.
            loop {
                if batch.is_full() {
                    return;
                }
                let end = buffer.len().min(self.offset + segment);
                if !whole || !batch.push(&buffer[self.offset..end], outer) {
                    drops.add(DropReason::ReceiveTruncated, 1);
                }
                self.offset = end;
                self.unpacked += 1;
                if end == buffer.len() {
                    break;
                }
            }
            (self.next, self.offset) = (self.next + 1, 0);
            if self.next == self.arrived {
                self.usual = (self.unpacked / self.arrived).max(1);
            }
        }
    }
}
