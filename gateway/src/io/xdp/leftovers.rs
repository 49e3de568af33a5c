//! Packets of a batch that go by the kernel after all, copied into a batch of their own: few, but for the first moments.

use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::{Batch, Outer, Verdict};

/// Made when the first packet needs it, and kept by the driver.
pub(super) struct Leftovers<'a> {
    kept: &'a mut Option<Box<Batch>>,
    like: (usize, usize),
    any: bool,
}

impl<'a> Leftovers<'a> {
    /// Of `batch`; `kept` is where the memory stays.
    pub(super) fn new(kept: &'a mut Option<Box<Batch>>, batch: &Batch) -> Self {
        let like = (batch.capacity(), batch.frame_bytes());
        Self {
            kept,
            like,
            any: false,
        }
    }

    /// Adds one packet of the batch.
    pub(super) fn push(&mut self, data: &[u8], outer: Outer, drops: &mut DropCounters) {
        let (packets, frame_bytes) = self.like;
        // Sealed packets have grown into headroom and tailroom.
        let frame_bytes =
            frame_bytes + esplane_dataplane::HEADROOM_BYTES + esplane_dataplane::TAILROOM_BYTES;
        let batch = self
            .kept
            .get_or_insert_with(|| Box::new(Batch::new(packets, frame_bytes)));
        if !std::mem::replace(&mut self.any, true) {
            batch.clear();
        }
        if !batch.push(data, outer) {
            drops.add(DropReason::TransmitQueueFull, 1); // cannot be: it holds as many, and as large ones
            return;
        }
        if let Some(packet) = batch.packets_mut().last_mut() {
            packet.verdict = Verdict::Forward;
        }
    }

    /// Them, if there are any.
    pub(super) fn batch(self) -> Option<&'a Batch> {
        self.kept.as_deref().filter(|_| self.any)
    }
}
