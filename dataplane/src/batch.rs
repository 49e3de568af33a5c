//! Packets in their buffers: one arena, many frames, each sealed and opened where it lies.

use crate::{Arena, arena::Memory};
use esplane_api::{DropReason, TunnelId};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
};

/// Bytes a driver leaves free before an inner packet, for outer IPv6, UDP, ESP header and IV
/// (40 + 8 + 8 + 8), rounded up to a cache line multiple.
pub const HEADROOM_BYTES: usize = 128;
/// Bytes a driver leaves free behind an inner packet, for padding, pad length, next header and ICV
/// (3 + 2 + 16), rounded up.
pub const TAILROOM_BYTES: usize = 64;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not decided yet.
    Pending,
    /// On to the driver of the other side.
    Forward,
    /// Outbound: belongs to a tunnel that has no SA yet; hold it, bounded.
    Hold(TunnelId),
    /// Outbound: a policy lets it pass in clear.
    Bypass,
    /// Inbound: not ESP but a control message; its data starts behind the non-ESP marker.
    Control,
    /// No further.
    Drop(DropReason),
}

/// The outer side of a packet: where it came from, or where it shall go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// Our address; unspecified where the kernel chooses.
    pub local: IpAddr,
    /// The peer's address and UDP port (0 for plain ESP).
    pub remote: SocketAddr,
    /// Our UDP port, by which a driver of several sockets knows which one sends; what arrives may leave
    /// it at 0. 0 for plain ESP.
    pub local_port: u16,
    /// Whether it travels in UDP.
    pub udp: bool,
    /// DSCP (six bits) and ECN (two bits): the Type of Service or Traffic Class byte.
    pub tos: u8,
    /// Whether an outer IPv4 header has the Don't Fragment bit.
    pub df: bool,
}

impl Outer {
    /// Of a packet from the private network, before a tunnel is found for it.
    pub const NONE: Self = Self {
        local: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        remote: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        local_port: 0,
        udp: false,
        tos: 0,
        df: false,
    };

    /// Whether all is the same but what differs between packets of one path.
    #[inline]
    fn same_ends(&self, other: &Self) -> bool {
        self.remote == other.remote
            && self.local == other.local
            && (self.local_port, self.udp) == (other.local_port, other.udp)
    }
}

/// One packet: its place in the arena and what is known of it. Two of them share a cache line, so most of the outer side,
/// which packets in a row have in common, lies in a slot of the batch ([`Batch::outer_of`]).
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct PacketBuf {
    frame_start: u32,
    frame_end: u32,
    start: u32,
    end: u32,
    /// What becomes of it.
    pub verdict: Verdict,
    /// The slot of its outer side.
    pub(crate) outer_at: u16,
    /// [`Outer::tos`].
    pub(crate) outer_tos: u8,
    /// [`Outer::df`].
    pub(crate) outer_df: bool,
}

const _: () = assert!(size_of::<PacketBuf>() == 32);

impl PacketBuf {
    /// Where its data lies in the arena.
    #[inline]
    pub fn data_range(&self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// Length of its data in bytes.
    #[inline]
    pub fn data_bytes(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Free bytes before its data.
    #[inline]
    pub fn headroom(&self) -> usize {
        (self.start - self.frame_start) as usize
    }

    /// Free bytes behind its data.
    #[inline]
    pub fn tailroom(&self) -> usize {
        (self.frame_end - self.end) as usize
    }

    /// Moves the edges of the data to places that are known to lie within the frame: a check of the room comes first, for
    /// headers and trailer together.
    #[inline]
    pub(crate) fn set_edges(&mut self, start: u32, end: u32) {
        debug_assert!(self.frame_start <= start && start <= end && end <= self.frame_end);
        (self.start, self.end) = (start, end);
    }

    /// Moves the edges of the data within the frame: `front` and `back` bytes more (or, negative,
    /// fewer). `false`, and nothing changed, if the frame or the data would not allow it.
    #[must_use]
    pub fn grow(&mut self, front: i32, back: i32) -> bool {
        let start = i64::from(self.start) - i64::from(front);
        let end = i64::from(self.end) + i64::from(back);
        let fits = i64::from(self.frame_start) <= start
            && start <= end
            && end <= i64::from(self.frame_end);
        if fits {
            (self.start, self.end) = (start as u32, end as u32);
        }
        fits
    }
}

const OUTSIDE: &str = "a bug: bytes outside of the arena";

/// A bounded run of packets over one arena. Allocates when made, never again.
///
/// The arena is handed out from its start on. A driver either copies packets in ([`Batch::push`]), or lets the
/// kernel write into the [spare frames](Batch::spare_frames) and then says what has arrived
/// ([`Batch::push_received`]), or writes many packets into the [spare room](Batch::spare_room) and says where each lies
/// ([`Batch::push_placed`]).
pub struct Batch {
    memory: Memory,
    /// Bytes of the arena handed out.
    used: usize,
    packets: Vec<PacketBuf>,
    /// Two slots for each packet, by its number: one that whoever fills the batch may write, one that the dataplane may.
    /// A packet whose outer side is the one before's uses that one's slot.
    outers: Box<[Outer]>,
    frame_bytes: usize,
    capacity: usize,
}

impl Batch {
    /// Room for `capacity` packets in frames of `frame_bytes`, headroom and tailroom included.
    pub fn new(capacity: usize, frame_bytes: usize) -> Self {
        Self::with_arena(capacity, frame_bytes, 0)
    }

    /// The same with an arena of at least `arena_bytes`, for a driver that places packets itself.
    pub fn with_arena(capacity: usize, frame_bytes: usize, arena_bytes: usize) -> Self {
        let arena_bytes = capacity.saturating_mul(frame_bytes).max(arena_bytes);
        assert!(
            arena_bytes <= u32::MAX as usize,
            "a batch's arena is addressed with 32 bits"
        );
        assert!(
            capacity <= usize::from(u16::MAX) / 2,
            "a batch's outer sides are numbered with 16 bits"
        );
        Self {
            memory: Memory::new(arena_bytes),
            used: 0,
            packets: Vec::with_capacity(capacity),
            outers: vec![Outer::NONE; 2 * capacity].into_boxed_slice(),
            frame_bytes,
            capacity,
        }
    }

    /// Forgets all packets; the arena keeps its bytes.
    pub fn clear(&mut self) {
        self.packets.clear();
        self.used = 0;
    }

    /// How many packets it holds.
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Whether no frame is left.
    pub fn is_full(&self) -> bool {
        self.packets.len() == self.capacity
            || self.memory.arena().len() - self.used < self.frame_bytes
    }

    /// How many packets it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes of each frame, headroom and tailroom included.
    pub fn frame_bytes(&self) -> usize {
        self.frame_bytes
    }

    /// Its packets.
    pub fn packets(&self) -> &[PacketBuf] {
        &self.packets
    }

    /// Its packets, to be changed.
    pub fn packets_mut(&mut self) -> &mut [PacketBuf] {
        &mut self.packets
    }

    /// The bytes of one packet.
    pub fn data(&self, index: usize) -> &[u8] {
        self.bytes(self.packets[index].data_range())
    }

    /// The bytes of one packet, to be changed.
    pub fn data_mut(&mut self, index: usize) -> &mut [u8] {
        let range = self.packets[index].data_range();
        self.bytes_mut(range)
    }

    /// The outer side of one of its packets.
    #[inline]
    pub fn outer_of(&self, packet: &PacketBuf) -> Outer {
        Outer {
            tos: packet.outer_tos,
            df: packet.outer_df,
            ..self.outers[usize::from(packet.outer_at)]
        }
    }

    /// Whether two of its packets have the same outer side.
    #[inline]
    pub fn same_outer(&self, one: &PacketBuf, other: &PacketBuf) -> bool {
        let alike = |packet: &PacketBuf| (packet.outer_at, packet.outer_tos, packet.outer_df);
        alike(one) == alike(other) || self.outer_of(one) == self.outer_of(other)
    }

    /// Gives a packet another outer side.
    pub fn set_outer(&mut self, index: usize, outer: Outer) {
        let at = self.place_outer(index, &outer);
        let packet = &mut self.packets[index];
        packet.outer_at = at;
        (packet.outer_tos, packet.outer_df) = (outer.tos, outer.df);
    }

    /// The slot for packet number `index`: the one before's if it is the same, else its own.
    #[inline]
    fn place_outer(&mut self, index: usize, outer: &Outer) -> u16 {
        if let Some(before) = index.checked_sub(1)
            && let at = self.packets[before].outer_at
            && self.outers[usize::from(at)].same_ends(outer)
        {
            return at;
        }
        // Packets behind it that use its slot keep what they have.
        let own = index as u16;
        let behind = self.packets.iter_mut().skip(index + 1);
        for packet in behind.take_while(|packet| packet.outer_at == own) {
            packet.outer_at = own + 1;
            self.outers[index + 1] = self.outers[index];
        }
        self.outers[index] = *outer;
        own
    }

    /// Bytes of the arena, for a driver that has received into its [spare room](Batch::spare_room).
    ///
    /// # Panics
    /// If they do not lie within.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        match self.memory.arena().get(range) {
            Some(bytes) => bytes,
            None => panic!("{OUTSIDE}"),
        }
    }

    /// Moves what a driver has received to its place.
    ///
    /// # Panics
    /// If either does not lie within the arena.
    pub fn move_bytes(&mut self, from: Range<usize>, to: usize) {
        let whole = from.start.min(to)..from.end.max(to + from.len());
        let (from, to) = (
            from.start - whole.start..from.end - whole.start,
            to - whole.start,
        );
        self.bytes_mut(whole).copy_within(from, to);
    }

    fn bytes_mut(&mut self, range: Range<usize>) -> &mut [u8] {
        match self.memory.arena_mut().get_mut(range) {
            Some(bytes) => bytes,
            None => panic!("{OUTSIDE}"),
        }
    }

    /// Bytes of the arena that are handed out: where the next frame starts.
    pub fn used_bytes(&self) -> usize {
        self.used
    }

    /// All parts at once, for code that works on many packets in place: arena, packets, slots of outer sides, and the number
    /// of the slot that is the dataplane's to write for the first packet.
    pub(crate) fn parts_mut(
        &mut self,
    ) -> (&mut Arena<'static>, &mut [PacketBuf], &mut [Outer], usize) {
        (
            self.memory.arena_mut(),
            &mut self.packets,
            &mut self.outers,
            self.capacity,
        )
    }

    /// Copies one packet in. `false` if no frame is left or it does not fit into one.
    #[must_use]
    pub fn push(&mut self, data: &[u8], outer: Outer) -> bool {
        let room = self
            .frame_bytes
            .saturating_sub(HEADROOM_BYTES + TAILROOM_BYTES);
        if self.is_full() || data.len() > room {
            return false;
        }
        let at = self.used + HEADROOM_BYTES;
        self.bytes_mut(at..at + data.len()).copy_from_slice(data);
        self.push_received(data.len(), outer);
        true
    }

    /// The frames not yet used, each without its headroom and tailroom, in the order in which
    /// [`Batch::push_received`] takes them.
    pub fn spare_frames(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let room = HEADROOM_BYTES..self.frame_bytes - TAILROOM_BYTES;
        let (frame_bytes, left) = (self.frame_bytes, self.capacity - self.packets.len());
        self.spare_room()
            .chunks_exact_mut(frame_bytes)
            .take(left)
            .map(move |frame| &mut frame[room.clone()])
    }

    /// All of the arena that is not yet used.
    pub fn spare_room(&mut self) -> &mut [u8] {
        let spare = self.used..self.memory.arena().len();
        self.bytes_mut(spare)
    }

    /// Takes the next spare frame, into which `bytes` have been written.
    ///
    /// # Panics
    /// If no frame is left or `bytes` exceeds a frame's room.
    pub fn push_received(&mut self, bytes: usize, outer: Outer) {
        let frame_start = self.used;
        let frame_end = frame_start + self.frame_bytes;
        let start = frame_start + HEADROOM_BYTES;
        assert!(
            !self.is_full() && start + bytes + TAILROOM_BYTES <= frame_end,
            "the packet exceeds its frame"
        );
        self.push_placed(frame_start..frame_end, start..start + bytes, outer);
    }

    /// Adds a packet at a place of the driver's choosing within the [spare room](Batch::spare_room), such as one segment of
    /// a buffer that leaves as a whole. What lies before it and is in no frame stays unused.
    ///
    /// # Panics
    /// If no packet more can be held, or the ranges do not nest within the spare room.
    pub fn push_placed(&mut self, frame: Range<usize>, data: Range<usize>, outer: Outer) {
        assert!(
            self.packets.len() < self.capacity
                && self.used <= frame.start
                && frame.start <= data.start
                && data.start <= data.end
                && data.end <= frame.end
                && frame.end <= self.memory.arena().len(),
            "frame {frame:?} and data {data:?} must nest within the spare room"
        );
        self.used = frame.end;
        let outer_at = self.place_outer(self.packets.len(), &outer);
        self.packets.push(PacketBuf {
            frame_start: frame.start as u32,
            frame_end: frame.end as u32,
            start: data.start as u32,
            end: data.end as u32,
            verdict: Verdict::Pending,
            outer_at,
            outer_tos: outer.tos,
            outer_df: outer.df,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_lie_in_their_frames_with_room_on_both_sides() {
        let mut batch = Batch::new(2, 2048);
        assert!(batch.push(&[1, 2, 3], Outer::NONE) && batch.push(&[4], Outer::NONE));
        assert!(batch.is_full() && !batch.push(&[5], Outer::NONE));
        assert_eq!((batch.data(0), batch.data(1)), (&[1, 2, 3][..], &[4][..]));
        let packet = batch.packets()[1];
        assert_eq!(
            (packet.headroom(), packet.tailroom()),
            (128, 2048 - 128 - 1)
        );
    }

    #[test]
    fn a_packet_that_does_not_fit_is_refused() {
        let mut batch = Batch::new(1, 256);
        assert!(!batch.push(&[0; 256 - 128 - 64 + 1], Outer::NONE));
        assert!(batch.push(&[0; 256 - 128 - 64], Outer::NONE));
    }

    #[test]
    fn edges_move_only_within_the_frame() {
        let mut batch = Batch::new(1, 256);
        assert!(batch.push(&[7; 10], Outer::NONE));
        let packet = &mut batch.packets_mut()[0];
        assert!(packet.grow(128, 0) && !packet.grow(1, 0));
        assert!(packet.grow(-128, -10) && packet.data_bytes() == 0 && !packet.grow(-1, 0));
    }

    #[test]
    fn each_packet_keeps_its_outer_side_whatever_happens_to_its_neighbours() {
        let outer = |port, tos| Outer {
            remote: ([192, 0, 2, 1], port).into(),
            tos,
            ..Outer::NONE
        };
        let mut expected = [
            outer(1, 0),
            outer(1, 3),
            outer(2, 0),
            outer(1, 0),
            outer(1, 0),
        ];
        let mut batch = Batch::new(5, 256);
        for outer in expected {
            assert!(batch.push(&[0], outer));
        }
        for (number, index) in (2..).zip([0, 3, 1, 4, 2, 0]) {
            for changed in [outer(number, 1), outer(1, 0)] {
                batch.set_outer(index, changed);
                expected[index] = changed;
                let got: Vec<_> = batch.packets().iter().map(|p| batch.outer_of(p)).collect();
                assert_eq!(got, expected);
            }
        }
        let [first, second, ..] = batch.packets() else {
            panic!("five were put in")
        };
        assert!(batch.same_outer(first, second));
    }

    #[test]
    fn placed_packets_and_frames_follow_each_other() {
        let mut batch = Batch::with_arena(4, 256, 1100);
        batch.spare_room()[..4].copy_from_slice(&[1, 2, 3, 4]);
        batch.push_placed(0..2, 0..2, Outer::NONE);
        batch.push_placed(2..6, 2..4, Outer::NONE);
        assert!(batch.push(&[5], Outer::NONE));
        let used = 6 + 256;
        assert_eq!(
            (batch.used_bytes(), batch.spare_room().len()),
            (used, 1100 - used)
        );
        batch.push_placed(800..900, 850..850, Outer::NONE);
        let data: Vec<_> = (0..4).map(|index| batch.data(index)).collect();
        assert_eq!(data, [&[1, 2][..], &[3, 4], &[5], &[]]);
        batch.clear();
        assert!(batch.used_bytes() == 0 && batch.spare_frames().count() == 4);
    }

    #[test]
    fn an_arena_without_a_frame_left_is_full() {
        let mut batch = Batch::new(4, 256);
        batch.push_placed(0..769, 0..769, Outer::NONE);
        assert!(batch.is_full() && !batch.push(&[1], Outer::NONE));
    }

    #[test]
    #[should_panic(expected = "spare room")]
    fn frames_do_not_overlap() {
        let mut batch = Batch::new(2, 256);
        assert!(batch.push(&[1], Outer::NONE));
        batch.push_placed(255..300, 256..300, Outer::NONE);
    }

    #[test]
    fn spare_frames_are_taken_in_order() {
        let mut batch = Batch::new(3, 256);
        assert!(batch.push(&[1], Outer::NONE));
        for (value, frame) in (8..).zip(batch.spare_frames()) {
            frame[0] = value;
        }
        batch.push_received(1, Outer::NONE);
        batch.push_received(1, Outer::NONE);
        assert_eq!(
            (batch.data(0), batch.data(1), batch.data(2)),
            (&[1][..], &[8][..], &[9][..])
        );
    }
}
