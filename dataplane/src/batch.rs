//! Packets in their buffers: one arena, many frames, each sealed and opened where it lies.

mod lent;
mod stock;
#[cfg(test)]
mod tests;

use crate::{Arena, arena::Memory};
use esplane_api::{DropReason, TunnelId};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::Range,
};
use stock::Stock;

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
    /// Its frame is with a driver that sends it without a copy ([`Batch::take`]); the batch has its bytes no longer.
    Taken,
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
///
/// Or it lies over frames that drivers share with the kernel ([`Batch::lent`]): then these are handed out in any order, and
/// come and go, with packets in them or without (`batch/stock.rs` draws how).
pub struct Batch {
    memory: Memory,
    /// Bytes of the arena handed out: of one that is handed out from its start on.
    used: usize,
    /// The frames, where they come and go.
    stock: Option<Stock>,
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
        Self::over(capacity, frame_bytes, Memory::new(arena_bytes), None)
    }

    fn over(capacity: usize, frame_bytes: usize, memory: Memory, stock: Option<Stock>) -> Self {
        assert!(
            memory.arena().len() <= u32::MAX as usize,
            "a batch's arena is addressed with 32 bits"
        );
        assert!(
            capacity <= usize::from(u16::MAX) / 2,
            "a batch's outer sides are numbered with 16 bits"
        );
        Self {
            memory,
            used: 0,
            stock,
            packets: Vec::with_capacity(capacity),
            outers: vec![Outer::NONE; 2 * capacity].into_boxed_slice(),
            frame_bytes,
            capacity,
        }
    }

    /// Forgets all packets; the arena keeps its bytes.
    pub fn clear(&mut self) {
        if let Some(stock) = &mut self.stock {
            for packet in &self.packets {
                let _taken = stock.put_back(packet.frame_start as usize);
            }
        }
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
        self.spare_frame(0).is_none()
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

    /// Bytes of the arena: of a packet, or what a driver has received into its [spare room](Batch::spare_room).
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
        let Some(frame) = self.spare_frame(0).filter(|_| data.len() <= room) else {
            return false;
        };
        let at = frame.start + HEADROOM_BYTES;
        self.bytes_mut(at..at + data.len()).copy_from_slice(data);
        self.push_received(data.len(), outer);
        true
    }

    /// The frames not yet used, at most 128 of them, each without its headroom and tailroom, in the order in which
    /// [`Batch::push_received`] takes them.
    pub fn spare_frames(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let arena = self.memory.arena_mut();
        let (stock, frame_bytes) = (self.stock.as_ref(), self.frame_bytes);
        let (room, left) = (self.used..arena.len(), self.capacity - self.packets.len());
        let frames =
            (0..left).map_while(move |later| spare_frame(stock, &room, frame_bytes, later));
        arena.get_disjoint_mut(frames.map(|frame| room_of(&frame)))
    }

    /// The first of the [spare frames](Batch::spare_frames), for whoever writes one packet at a time.
    pub fn next_frame(&mut self) -> Option<&mut [u8]> {
        let room = room_of(&self.spare_frame(0)?);
        self.memory.arena_mut().get_mut(room)
    }

    /// Moves what was written into a spare frame to the next one, which `later` others are before.
    ///
    /// # Panics
    /// If there are not so many, or `bytes` exceeds a frame's room.
    pub fn move_up(&mut self, later: usize, bytes: usize) {
        let place = |frame: Option<Range<usize>>| {
            let room = frame.map(|frame| room_of(&frame));
            let room = room.filter(|room| bytes <= room.len());
            room.map(|room| room.start..room.start + bytes)
        };
        let places = [place(self.spare_frame(0)), place(self.spare_frame(later))];
        let places = places.into_iter().flatten();
        let mut places = self.memory.arena_mut().get_disjoint_mut(places);
        match (places.next(), places.next()) {
            (Some(to), Some(from)) => to.copy_from_slice(from),
            _ => panic!("{OUTSIDE}"),
        }
    }

    /// Where the spare frame lies that comes next, or will once `later` others have been taken.
    #[inline]
    fn spare_frame(&self, later: usize) -> Option<Range<usize>> {
        let room = self.used..self.memory.arena().len();
        (self.packets.len() + later < self.capacity)
            .then(|| spare_frame(self.stock.as_ref(), &room, self.frame_bytes, later))
            .flatten()
    }

    /// All of the arena that is not yet used.
    pub fn spare_room(&mut self) -> &mut [u8] {
        let bytes = match self.stock {
            Some(_) => 0,
            None => self.memory.arena().len(),
        };
        self.bytes_mut(self.used.min(bytes)..bytes)
    }

    /// Takes the next spare frame, into which `bytes` have been written.
    ///
    /// # Panics
    /// If no frame is left or `bytes` exceeds a frame's room.
    pub fn push_received(&mut self, bytes: usize, outer: Outer) {
        let frame = self.spare_frame(0);
        let Some(frame) = frame.filter(|frame| bytes <= room_of(frame).len()) else {
            panic!("the packet exceeds its frame")
        };
        match &mut self.stock {
            Some(stock) => drop(stock.take()),
            None => self.used = frame.end,
        }
        let start = frame.start + HEADROOM_BYTES;
        self.add(frame, start..start + bytes, outer);
    }

    /// Adds a packet at a place of the driver's choosing within the [spare room](Batch::spare_room), such as one segment of
    /// a buffer that leaves as a whole. What lies before it and is in no frame stays unused.
    ///
    /// # Panics
    /// If no packet more can be held, or the ranges do not nest within the spare room.
    pub fn push_placed(&mut self, frame: Range<usize>, data: Range<usize>, outer: Outer) {
        assert!(
            self.stock.is_none()
                && self.packets.len() < self.capacity
                && self.used <= frame.start
                && frame.start <= data.start
                && data.start <= data.end
                && data.end <= frame.end
                && frame.end <= self.memory.arena().len(),
            "frame {frame:?} and data {data:?} must nest within the spare room"
        );
        self.used = frame.end;
        self.add(frame, data, outer);
    }

    fn add(&mut self, frame: Range<usize>, data: Range<usize>, outer: Outer) {
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

/// Of frames that follow each other in `room`, or lie in a stock.
#[inline]
fn spare_frame(
    stock: Option<&Stock>,
    room: &Range<usize>,
    frame_bytes: usize,
    later: usize,
) -> Option<Range<usize>> {
    match stock {
        Some(stock) => stock.peek(later),
        None => {
            let start = room.start + later * frame_bytes;
            (start + frame_bytes <= room.end).then(|| start..start + frame_bytes)
        }
    }
}

/// Room for data in a frame.
fn room_of(frame: &Range<usize>) -> Range<usize> {
    frame.start + HEADROOM_BYTES..frame.end - TAILROOM_BYTES
}
