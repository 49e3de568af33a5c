//! What one worker counts: written by it alone, read by the control side.

use crate::io::Traffic;
use esplane_api::{DropCounters, DropReason};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Live counters of one worker. Aligned so that no two workers share a cache line.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerCounters {
    inner_received: LiveTraffic,
    inner_sent: LiveTraffic,
    outer_received: LiveTraffic,
    outer_sent: LiveTraffic,
    outbound_batches: AtomicU64,
    inbound_batches: AtomicU64,
    sleeps: AtomicU64,
    held_packets: AtomicU64,
    drops: [AtomicU64; DropReason::COUNT],
}

/// The counters of one worker at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerSnapshot {
    /// Clear packets from the private network.
    pub inner_received: Traffic,
    /// Clear packets into the private network.
    pub inner_sent: Traffic,
    /// ESP and control packets from the public network; bytes without outer headers.
    pub outer_received: Traffic,
    /// ESP packets into the public network; bytes without outer headers.
    pub outer_sent: Traffic,
    /// Batches that were not empty, from clear to ESP.
    pub outbound_batches: u64,
    /// Batches that were not empty, from ESP to clear.
    pub inbound_batches: u64,
    /// How often it had nothing to do.
    pub sleeps: u64,
    /// Packets that wait for an SA now.
    pub held_packets: u64,
    /// Packets dropped, by reason.
    pub drops: DropCounters,
}

#[derive(Debug, Default)]
struct LiveTraffic {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Default for WorkerCounters {
    fn default() -> Self {
        Self {
            inner_received: LiveTraffic::default(),
            inner_sent: LiveTraffic::default(),
            outer_received: LiveTraffic::default(),
            outer_sent: LiveTraffic::default(),
            outbound_batches: AtomicU64::new(0),
            inbound_batches: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
            held_packets: AtomicU64::new(0),
            drops: [const { AtomicU64::new(0) }; DropReason::COUNT],
        }
    }
}

impl WorkerCounters {
    /// All zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// What they say now. Each by itself is exact; together they may be some packets apart.
    pub fn snapshot(&self) -> WorkerSnapshot {
        let mut drops = DropCounters::default();
        for (reason, count) in DropReason::ALL.iter().zip(&self.drops) {
            drops.add(*reason, count.load(Relaxed));
        }
        WorkerSnapshot {
            inner_received: self.inner_received.load(),
            inner_sent: self.inner_sent.load(),
            outer_received: self.outer_received.load(),
            outer_sent: self.outer_sent.load(),
            outbound_batches: self.outbound_batches.load(Relaxed),
            inbound_batches: self.inbound_batches.load(Relaxed),
            sleeps: self.sleeps.load(Relaxed),
            held_packets: self.held_packets.load(Relaxed),
            drops,
        }
    }

    pub(super) fn received_inner(&self, traffic: Traffic) {
        self.inner_received.add(traffic);
        add(&self.outbound_batches, 1);
    }

    pub(super) fn received_outer(&self, traffic: Traffic) {
        self.outer_received.add(traffic);
        add(&self.inbound_batches, 1);
    }

    pub(super) fn sent_inner(&self, traffic: Traffic) {
        self.inner_sent.add(traffic);
    }

    pub(super) fn sent_outer(&self, traffic: Traffic) {
        self.outer_sent.add(traffic);
    }

    pub(super) fn slept(&self) {
        add(&self.sleeps, 1);
    }

    pub(super) fn holding(&self, packets: usize) {
        self.held_packets.store(packets as u64, Relaxed);
    }

    pub(super) fn dropped(&self, drops: &DropCounters) {
        for (reason, count) in drops.iter().filter(|(_, count)| *count > 0) {
            add(&self.drops[reason as usize], count);
        }
    }
}

impl LiveTraffic {
    fn add(&self, more: Traffic) {
        add(&self.packets, more.packets);
        add(&self.bytes, more.bytes);
    }

    fn load(&self) -> Traffic {
        Traffic {
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
        }
    }
}

/// One writer, so no atomic read-modify-write is needed.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}
