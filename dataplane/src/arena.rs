//! The memory that packets lie in.
//!
//! ```text
//!   arena   │ frame │ frame │ frame │ frame │ …       nobody holds it as a whole: the kernel, or another batch, may write
//!             ours    kernel  ours    ours            into frames that are not ours at this very moment
//!             └──────────┬──────────────┘
//!                  get, get_mut: one packet's bytes, for as long as the arena is borrowed
//! ```
//!
//! It is no `&mut [u8]`, for that would claim every byte. Whoever asks for bytes asks for those of a packet's frame, and a
//! frame becomes a packet's only if it is ours ([`Memory::lent`]). Frames may lie in any order, and even overlap: bytes are
//! handed out for one packet at a time.
#![allow(unsafe_code)]

use arrayvec::ArrayVec;
use std::{fmt, marker::PhantomData, ops::Range, ptr::NonNull};

/// Packets whose bytes may be changed at once.
const DISJOINT_MAX: usize = 128;

/// Bytes of many packets, reached by ranges that are checked.
pub struct Arena<'m> {
    start: NonNull<u8>,
    bytes: usize,
    memory: PhantomData<&'m mut [u8]>,
}

// SAFETY: like a `&mut [u8]`, of which it hands out parts under the same rules; lent memory is promised to be so.
unsafe impl Send for Arena<'_> {}
// SAFETY: as above; a shared arena only reads.
unsafe impl Sync for Arena<'_> {}

impl<'m> Arena<'m> {
    /// Over memory that is ours alone.
    pub fn over(memory: &'m mut [u8]) -> Self {
        Self {
            bytes: memory.len(),
            start: NonNull::from(memory).cast(),
            memory: PhantomData,
        }
    }

    /// Its length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no byte at all.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes of a packet. `None` if they do not lie within.
    #[inline]
    pub fn get(&self, range: Range<usize>) -> Option<&[u8]> {
        let bytes = self.check(&range)?;
        // SAFETY: within the memory, by the check; nobody else writes there, by `over`'s borrow or the promise to
        // `Memory::lent`, and we do not while `self` is borrowed.
        Some(unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(range.start), bytes) })
    }

    /// Bytes of a packet, to be changed. `None` if they do not lie within.
    #[inline]
    pub fn get_mut(&mut self, range: Range<usize>) -> Option<&mut [u8]> {
        let bytes = self.check(&range)?;
        // SAFETY: as above, and nobody reads there either; `self` is borrowed alone.
        Some(unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(range.start), bytes) })
    }

    /// Bytes of several packets at once, to be changed, as far as the ranges lie within and none overlaps one before it. At
    /// most `DISJOINT_MAX`.
    pub fn get_disjoint_mut(
        &mut self,
        ranges: impl Iterator<Item = Range<usize>>,
    ) -> impl Iterator<Item = &mut [u8]> {
        let mut apart: ArrayVec<Range<usize>, DISJOINT_MAX> = ArrayVec::new();
        let mut highest = 0;
        for range in ranges.take(DISJOINT_MAX) {
            let overlaps =
                |other: &Range<usize>| range.start < other.end && other.start < range.end;
            let is_behind_all = highest <= range.start;
            if self.check(&range).is_none() || !is_behind_all && apart.iter().any(overlaps) {
                break;
            }
            highest = highest.max(range.end);
            apart.push(range);
        }
        let start = self.start;
        apart.into_iter().map(move |range| {
            // SAFETY: as above for each; no two overlap, and `self` stays borrowed as long as any of them.
            unsafe { std::slice::from_raw_parts_mut(start.as_ptr().add(range.start), range.len()) }
        })
    }

    /// Where it starts, for kernels that check ranges themselves.
    #[inline]
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    #[inline]
    fn check(&self, range: &Range<usize>) -> Option<usize> {
        let bytes = range.end.checked_sub(range.start)?;
        (range.end <= self.bytes).then_some(bytes)
    }
}

/// An arena and what keeps its memory: what a batch holds.
pub struct Memory {
    // Before its keeper: dropped first.
    arena: Arena<'static>,
    _keeper: Box<dyn Send + Sync>,
}

impl Memory {
    /// So many zeros of its own.
    pub fn new(bytes: usize) -> Self {
        let memory = NonNull::from(Box::leak(vec![0; bytes].into_boxed_slice()));
        // SAFETY: initialised, freed by the keeper alone, and known to nobody else.
        unsafe { Self::lent(memory, Box::new(Heap(memory))) }
    }

    /// Bytes of which others, such as the kernel, use parts.
    ///
    /// # Safety
    /// They must be initialised, and stay readable and writable as long as `keeper` lives. A range that is asked for, be it as
    /// the frame of a packet ([`crate::Batch::push_placed`]) or of the arena itself, must be owned by who asks: until the
    /// batch has let go of the packet, neither the kernel nor anybody else touches the bytes within.
    pub unsafe fn lent(memory: NonNull<[u8]>, keeper: Box<dyn Send + Sync>) -> Self {
        Self {
            arena: Arena {
                start: memory.cast(),
                bytes: memory.len(),
                memory: PhantomData,
            },
            _keeper: keeper,
        }
    }

    /// To be read.
    #[inline]
    pub fn arena(&self) -> &Arena<'_> {
        &self.arena
    }

    /// To be changed.
    #[inline]
    pub fn arena_mut(&mut self) -> &mut Arena<'static> {
        &mut self.arena
    }
}

/// Memory of the allocator's, given back on drop.
struct Heap(NonNull<[u8]>);

// SAFETY: plain bytes, which it only frees.
unsafe impl Send for Heap {}
// SAFETY: as above.
unsafe impl Sync for Heap {}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: leaked by `Memory::new`, whose arena is gone by now.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

impl fmt::Debug for Arena<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena of {} bytes", self.bytes) // packets are nobody's business
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    #[expect(
        clippy::reversed_empty_ranges,
        reason = "what foreign lengths might add up to"
    )]
    fn only_ranges_within_are_handed_out() {
        let mut memory = [1, 2, 3, 4];
        let mut arena = Arena::over(&mut memory);
        assert_eq!(arena.get(1..3), Some(&[2, 3][..]));
        assert_eq!(arena.get(4..4), Some(&[][..]));
        for wrong in [3..5, 5..5, 3..2, usize::MAX..2, 0..usize::MAX] {
            assert_eq!(arena.get(wrong.clone()), None);
            assert_eq!(arena.get_mut(wrong), None);
        }
        arena.get_mut(2..4).unwrap().fill(9);
        assert_eq!((arena.len(), memory), (4, [1, 2, 9, 9]));
    }

    #[test]
    fn several_at_once_are_handed_out_as_long_as_they_do_not_overlap() {
        let mut memory = [0; 16];
        let mut arena = Arena::over(&mut memory);
        let ranges = [8..12, 0..4, 4..8, 3..5, 12..16];
        let parts: Vec<_> = arena.get_disjoint_mut(ranges.into_iter()).collect();
        assert_eq!(parts.len(), 3, "up to the overlap");
        for (number, part) in (1..).zip(parts) {
            part.fill(number);
        }
        assert_eq!(arena.get_disjoint_mut(std::iter::once(8..17)).count(), 0);
        assert_eq!(memory, [2, 2, 2, 2, 3, 3, 3, 3, 1, 1, 1, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn lent_memory_is_read_and_written_in_place() {
        let memory = NonNull::from(Box::leak(vec![0; 64].into_boxed_slice()));
        let keeper = Arc::new(Heap(memory));
        let lent = |keeper: &Arc<Heap>| {
            // SAFETY: the keeper frees it with its last clone; each is asked for bytes of its own half alone.
            unsafe { Memory::lent(memory, Box::new(Arc::clone(keeper))) }
        };
        let (mut one, mut other) = (lent(&keeper), lent(&keeper));
        drop(keeper);
        let left = one.arena_mut().get_mut(0..32).unwrap();
        let right = other.arena_mut().get_mut(32..64).unwrap();
        left.fill(1);
        right.fill(2);
        left[0] = right[0];
        drop(other);
        let left = one.arena().get(0..32).unwrap();
        assert_eq!((left[0], left[31]), (2, 1));
    }
}
