//! Packets that wait for an SA: bounded, in order, and not for long.
//!
//! A tunnel's first packets come before its first SA. They are held while the handshake runs, and
//! leave, once the tables have changed, before any newer packet of the same tunnel. Pure: time is an argument.

use esplane_api::{DropCounters, DropReason, TunnelId};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

/// How much may wait, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimits {
    /// Packets of one tunnel.
    pub packets_per_tunnel: usize,
    /// Bytes over all tunnels, with [`OVERHEAD_BYTES`] for each packet.
    pub bytes: usize,
    /// How long one packet may wait.
    pub age: Duration,
}

/// What a held packet costs besides its own bytes, about.
pub const OVERHEAD_BYTES: usize = 128;

impl Default for HoldLimits {
    fn default() -> Self {
        Self {
            packets_per_tunnel: 64,
            bytes: 4 << 20,
            age: Duration::from_secs(5),
        }
    }
}

/// A packet that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldPacket {
    /// Since when.
    pub since: Duration,
    /// The inner packet.
    pub data: Box<[u8]>,
}

/// The packets of one worker that wait.
#[derive(Debug)]
pub struct HoldQueue {
    limits: HoldLimits,
    /// All packets, by number of arrival: the first is the oldest.
    packets: BTreeMap<u64, (TunnelId, HeldPacket)>,
    /// The same numbers by tunnel, oldest first.
    by_tunnel: HashMap<TunnelId, VecDeque<u64>>,
    bytes: usize,
    arrivals: u64,
}

impl HoldQueue {
    /// An empty one.
    pub fn new(limits: HoldLimits) -> Self {
        Self {
            limits,
            packets: BTreeMap::new(),
            by_tunnel: HashMap::new(),
            bytes: 0,
            arrivals: 0,
        }
    }

    /// How many packets wait.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Lets one packet wait. Where a limit is reached the oldest goes: of the tunnel, or of all.
    ///
    /// `since` never goes back from one call to the next.
    pub fn push(
        &mut self,
        since: Duration,
        tunnel: TunnelId,
        data: &[u8],
        drops: &mut DropCounters,
    ) {
        if data.len() + OVERHEAD_BYTES > self.limits.bytes || self.limits.packets_per_tunnel == 0 {
            drops.add(DropReason::HoldQueueFull, 1);
            return;
        }
        let of_tunnel = self.by_tunnel.get(&tunnel);
        if let Some(numbers) = of_tunnel
            && numbers.len() >= self.limits.packets_per_tunnel
            && let Some(oldest) = numbers.front().copied()
        {
            self.drop_one(oldest, DropReason::HoldQueueFull, drops);
        }
        while self.bytes + data.len() + OVERHEAD_BYTES > self.limits.bytes
            && let Some(oldest) = self.packets.keys().next().copied()
        {
            self.drop_one(oldest, DropReason::HoldQueueFull, drops);
        }
        self.bytes += data.len() + OVERHEAD_BYTES;
        self.arrivals += 1;
        self.by_tunnel
            .entry(tunnel)
            .or_default()
            .push_back(self.arrivals);
        let packet = HeldPacket {
            since,
            data: data.into(),
        };
        self.packets.insert(self.arrivals, (tunnel, packet));
    }

    /// Drops what has waited too long.
    pub fn expire(&mut self, now: Duration, drops: &mut DropCounters) {
        while let Some((number, (_, packet))) = self.packets.first_key_value()
            && now >= packet.since + self.limits.age
        {
            let number = *number;
            self.drop_one(number, DropReason::HoldTimeout, drops);
        }
    }

    /// When the oldest packet will have waited too long.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.packets
            .first_key_value()
            .map(|(_, (_, packet))| packet.since + self.limits.age)
    }

    /// Takes all packets out, oldest first: the tables have changed, try each again. One that must
    /// wait on is pushed again with its old `since`, before any newer packet is.
    pub fn take_all(&mut self) -> impl Iterator<Item = HeldPacket> + use<> {
        self.by_tunnel.clear();
        self.bytes = 0;
        std::mem::take(&mut self.packets)
            .into_values()
            .map(|(_, packet)| packet)
    }

    /// Takes out the oldest packet of its tunnel.
    fn drop_one(&mut self, number: u64, reason: DropReason, drops: &mut DropCounters) {
        let Some((tunnel, packet)) = self.packets.remove(&number) else {
            return;
        };
        self.bytes -= packet.data.len() + OVERHEAD_BYTES;
        drops.add(reason, 1);
        // The oldest of all is the oldest of its tunnel too, so it is always the front one.
        if let Some(numbers) = self.by_tunnel.get_mut(&tunnel) {
            numbers.pop_front();
            if numbers.is_empty() {
                self.by_tunnel.remove(&tunnel);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TunnelId = TunnelId(1);
    const B: TunnelId = TunnelId(2);

    fn second(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn limits(packets_per_tunnel: usize, bytes: usize) -> HoldLimits {
        HoldLimits {
            packets_per_tunnel,
            bytes,
            age: second(5),
        }
    }

    fn contents(queue: &mut HoldQueue) -> Vec<u8> {
        queue.take_all().map(|packet| packet.data[0]).collect()
    }

    #[test]
    fn packets_come_out_in_the_order_in_which_they_came() {
        let (mut queue, mut drops) = (
            HoldQueue::new(HoldLimits::default()),
            DropCounters::default(),
        );
        for (number, tunnel) in [(1, A), (2, B), (3, A), (4, B)] {
            queue.push(second(number), tunnel, &[number as u8], &mut drops);
        }
        assert_eq!(contents(&mut queue), [1, 2, 3, 4]);
        assert!(queue.is_empty() && queue.next_expiry().is_none());
        assert_eq!(drops.unexpected(), 0);
    }

    #[test]
    fn a_packet_that_must_wait_on_keeps_its_age_and_its_place() {
        let (mut queue, mut drops) = (
            HoldQueue::new(HoldLimits::default()),
            DropCounters::default(),
        );
        queue.push(second(1), A, &[1], &mut drops);
        queue.push(second(2), B, &[2], &mut drops);
        let released: Vec<_> = queue.take_all().collect();
        queue.push(released[0].since, A, &released[0].data, &mut drops);
        queue.push(second(3), A, &[3], &mut drops);
        assert_eq!(queue.next_expiry(), Some(second(6)));
        assert_eq!(contents(&mut queue), [1, 3]);
    }

    #[test]
    fn a_full_tunnel_loses_its_oldest_and_no_other_tunnel_does() {
        let (mut queue, mut drops) = (HoldQueue::new(limits(2, 1 << 20)), DropCounters::default());
        queue.push(second(0), B, &[0], &mut drops);
        for number in 1..=4 {
            queue.push(second(1), A, &[number], &mut drops);
        }
        assert_eq!(drops[DropReason::HoldQueueFull], 2);
        assert_eq!(contents(&mut queue), [0, 3, 4]);
    }

    #[test]
    fn all_tunnels_together_stay_within_the_bytes_allowed() {
        let three = 3 * (100 + OVERHEAD_BYTES);
        let (mut queue, mut drops) = (HoldQueue::new(limits(64, three)), DropCounters::default());
        for number in 0..10 {
            queue.push(
                second(1),
                TunnelId(number),
                &[number as u8; 100],
                &mut drops,
            );
            assert!(queue.len() <= 3);
        }
        // One that could never fit changes nothing for the others.
        queue.push(second(1), A, &vec![99; three], &mut drops);
        assert_eq!(drops[DropReason::HoldQueueFull], 7 + 1);
        assert_eq!(contents(&mut queue), [7, 8, 9]);
    }

    #[test]
    fn nothing_waits_longer_than_allowed() {
        let (mut queue, mut drops) = (
            HoldQueue::new(HoldLimits::default()),
            DropCounters::default(),
        );
        queue.push(second(1), A, &[1], &mut drops);
        queue.push(second(3), A, &[3], &mut drops);
        queue.expire(second(6) - Duration::from_nanos(1), &mut drops);
        assert_eq!(queue.len(), 2);
        queue.expire(second(6), &mut drops);
        assert_eq!((queue.len(), drops[DropReason::HoldTimeout]), (1, 1));
        assert_eq!(queue.next_expiry(), Some(second(8)));
        assert_eq!(contents(&mut queue), [3]);
    }
}
