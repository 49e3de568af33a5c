//! Frames of a batch that are not handed out one behind the other but come and go, because a driver shares them with the kernel.
//!
//! ```text
//!              lend: to be filled by the kernel
//!        ┌─────────────────────────────────────────┐
//!        │     give_back: the kernel has sent it   ▼
//!      stock ◀─────────────────────────────────── away
//!       │ ▲                                       │ ▲
//!       │ └── put_back: dropped, or sent ──┐      │ │
//!       │     by a copy                    │      │ │
//!       └── take: written by us ──▶ a packet's ◀──┘ │   arrive: the kernel has filled it
//!                                          └────────┘   leave: to be sent by the kernel
//! ```
//!
//! A frame is in one of the three places, and goes only along the arrows: one that is told twice, or never was this batch's, is
//! refused, whoever tells it.

use std::ops::Range;

/// The frames of one batch, numbered from the start of the arena.
pub(super) struct Stock {
    frame_bytes: usize,
    /// The number of the batch's first frame: others of the arena are others'.
    first: usize,
    /// Where each frame is, from the first on.
    places: Box<[Place]>,
    /// Those in the stock.
    spare: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Stock,
    Packet,
    Away,
}

impl Stock {
    /// Of these frames, all of them spare.
    pub fn new(frames: Range<usize>, frame_bytes: usize) -> Self {
        Self {
            frame_bytes,
            first: frames.start,
            places: vec![Place::Stock; frames.len()].into_boxed_slice(),
            spare: frames.rev().map(|frame| frame as u32).collect(),
        }
    }

    /// Where the spare frame lies that comes next, or will once `later` others have been taken.
    pub fn peek(&self, later: usize) -> Option<Range<usize>> {
        let at = self.spare.len().checked_sub(later + 1)?;
        Some(self.range(self.spare[at] as usize))
    }

    /// The next spare frame becomes a packet's.
    pub fn take(&mut self) -> Option<Range<usize>> {
        self.take_to(Place::Packet)
    }

    /// The next spare frame goes away.
    pub fn lend(&mut self) -> Option<Range<usize>> {
        self.take_to(Place::Away)
    }

    /// The frame around this byte comes back and is a packet's. `None` if it was not away.
    pub fn arrive(&mut self, byte: usize) -> Option<Range<usize>> {
        let frame = byte / self.frame_bytes;
        self.pass(frame, Place::Away, Place::Packet)
            .then(|| self.range(frame))
    }

    /// The frame around this byte goes away. `false` if it was no packet's.
    pub fn leave(&mut self, byte: usize) -> bool {
        self.pass(byte / self.frame_bytes, Place::Packet, Place::Away)
    }

    /// The frame around this byte comes back to the stock. `false` if it was not away.
    pub fn give_back(&mut self, byte: usize) -> bool {
        self.put(byte / self.frame_bytes, Place::Away)
    }

    /// The frame around this byte, a packet's until now, is spare again. `false` if it was no packet's.
    pub fn put_back(&mut self, byte: usize) -> bool {
        self.put(byte / self.frame_bytes, Place::Packet)
    }

    fn take_to(&mut self, place: Place) -> Option<Range<usize>> {
        let frame = self.spare.pop()? as usize;
        let _always = self.pass(frame, Place::Stock, place);
        Some(self.range(frame))
    }

    fn put(&mut self, frame: usize, from: Place) -> bool {
        let was_there = self.pass(frame, from, Place::Stock);
        if was_there {
            self.spare.push(frame as u32); // there is room for all: no allocation
        }
        was_there
    }

    fn pass(&mut self, frame: usize, from: Place, to: Place) -> bool {
        let place = (frame.checked_sub(self.first)).and_then(|index| self.places.get_mut(index));
        match place {
            Some(place) if *place == from => {
                *place = to;
                true
            }
            _ => false,
        }
    }

    fn range(&self, frame: usize) -> Range<usize> {
        let start = frame * self.frame_bytes;
        start..start + self.frame_bytes
    }
}
