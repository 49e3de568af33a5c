//! Outbound: clear packets in, ESP out.
use crate::{Batch, Report, Tables, Verdict};
use esplane_api::{DropReason, TunnelId};

/// One worker's outbound side.
pub struct Outbound {}

impl Outbound {
    /// For batches of up to `capacity` packets.
    pub fn new(_capacity: usize) -> Self {
        Self {}
    }

    /// Sets every packet's verdict.
    pub fn process(&mut self, _tables: &Tables, batch: &mut Batch, report: &mut Report) {
        for packet in batch.packets_mut() {
            packet.verdict = Verdict::Drop(DropReason::NoPolicy);
            report.count_drop(DropReason::NoPolicy);
        }
    }

    /// Pushes one sealed dummy packet (next header 59).
    pub fn dummy(
        &mut self,
        _tables: &Tables,
        _tunnel: TunnelId,
        _batch: &mut Batch,
        _report: &mut Report,
    ) -> bool {
        false
    }
}
