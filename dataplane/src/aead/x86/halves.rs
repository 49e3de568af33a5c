//! Sums of the two halves of the powers of H, which Karatsuba's third multiplication wants beside the powers. Two
//! instructions each, but every block of a run under one key wants them again; in the keys they would take the room of
//! thousands of SAs. So a run keeps those of its last two keys: the packet before is still being hashed with its own.

use super::{
    super::key::{POWERS, Schedule},
    *,
};
use core::{
    cell::{Cell, UnsafeCell},
    mem::MaybeUninit,
    ptr,
};

/// As many as [`Schedule::powers`] has lanes.
const SUMS: usize = POWERS + 3;
const _: () = assert!(SUMS.is_multiple_of(LANES));

pub(super) struct Halves {
    tables: [Table; 2],
    last: Cell<usize>,
}

#[repr(C, align(64))]
struct Table {
    /// In the place of each power: its halves' sum, in both halves.
    sums: UnsafeCell<MaybeUninit<[__m128i; SUMS]>>,
    /// Those from here on are there.
    from: Cell<usize>,
    key: Cell<*const Schedule>,
}

impl Halves {
    /// None of any key.
    pub(super) fn new() -> Self {
        let table = || Table {
            sums: UnsafeCell::new(MaybeUninit::uninit()),
            from: Cell::new(SUMS),
            key: Cell::new(ptr::null()),
        };
        Self {
            tables: [table(), table()],
            last: Cell::new(0),
        }
    }
}

with_features! {
    /// Where the sums of a key begin, in the order of [`Schedule::powers`]: ready are those of the powers up to the given
    /// one. They stay as they are while one more key is prepared.
    pub(super) fn prepared(halves: &Halves, key: &Schedule, power: usize) -> *const __m128i {
        let [a, b] = &halves.tables;
        let (last, other) = if halves.last.get() == 0 { (a, b) } else { (b, a) };
        let table = if ptr::eq(last.key.get(), key) { last } else {
            halves.last.set(halves.last.get() ^ 1);
            if !ptr::eq(other.key.get(), key) {
                other.key.set(key);
                other.from.set(SUMS);
            }
            other
        };
        let sums: *mut __m128i = table.sums.get().cast();
        while table.from.get() > POWERS - power {
            let from = table.from.get() - LANES;
            // SAFETY: both have SUMS lanes, a multiple of LANES: from there on, there are LANES at least. Nobody holds a
            // reference to sums.
            unsafe {
                let powers = load(key.powers.as_ptr().add(from).cast());
                store(sums.add(from).cast(), add(powers, halves_swapped(powers)));
            }
            table.from.set(from);
        }
        sums
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let sums = self.sums.get_mut().as_mut_ptr().cast::<[u128; LANES]>();
        for vector in self.from.get() / LANES..SUMS / LANES {
            // SAFETY: within the table, and its own. Volatile, so that it happens though nobody looks again.
            unsafe { sums.add(vector).write_volatile([0; LANES]) };
        }
    }
}
