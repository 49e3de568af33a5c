//! Inbound: ESP in, clear packets out.
use crate::{Batch, Report, Tables, Verdict};
use esplane_api::DropReason;

/// One worker's inbound side.
pub struct Inbound {}

impl Inbound {
    /// For batches of up to `capacity` packets.
    pub fn new(_capacity: usize) -> Self {
        Self {}
    }

    /// Sets every packet's verdict.
    pub fn process(&mut self, _tables: &Tables, batch: &mut Batch, report: &mut Report) {
        for packet in batch.packets_mut() {
            packet.verdict = Verdict::Drop(DropReason::UnknownSpi);
            report.count_drop(DropReason::UnknownSpi);
        }
    }
}
