//! The anti-replay window (RFC 4303 §3.4.3), after RFC 6479: blocks instead of one shifted bitmap, so that moving on costs the
//! same however far the head jumps.
//!
//! RFC 6479 clears the blocks between the old head and the new one; that needs a lock. Here each block carries its own number,
//! and one that has come round is recognised instead of cleared. The newest block has a word of its own, all others a ring:
//!
//! ```text
//!   number = block · 32 + bit
//!
//!   a word:   │ low 32 bits of the block │ 32 bits: which of its numbers have come │
//!
//!   newest    one word: the block of the highest number
//!   slots     a word each: blocks behind it, block mod slots
//! ```
//!
//! `commit_run` changes a word for all numbers of one block at once, by compare-and-swap:
//!
//! | `newest` holds | then |
//! |---|---|
//! | our block | our bits are added; one already there: a duplicate |
//! | an older block | its bits go into their slot, then (our block, our bits) replaces it |
//! | a newer block | our slot decides in the same way, or that we are too old: it holds a newer block |
//!
//! Most packets come in order and so change one word, beside what a check has read: one cache line, one locked instruction.
//!
//! **Exact under any number of workers.** At any time one word decides over a block: `newest` while it holds that block, its
//! slot from then on. The slot has all bits before `newest` lets go of them: whoever replaces a word has first put just this
//! word's bits there, or else fails and begins again. In both, blocks only get newer and bits only grow, so of all commits of
//! one number exactly one finds its bit unset: accepted once, never twice. Who sees that `newest` has moved on
//! (acquire) sees in the slot what was put there before (release). `tests/loom.rs` tries every order of two workers.
//!
//! **The whole window is covered.** A block is displaced by the one `slots` blocks later, at the earliest when the head moves
//! on to the block behind that. Its own last number then lies `32 · slots + 1` behind, which is beyond the window if
//! `slots ≥ window / 32`.
//!
//! **32 bits of block number suffice.** Blocks are compared as a difference of 32 bits, right as long as two
//! blocks that meet in a word are less than 2^31 blocks = 2^36 numbers apart. Inference and
//! resynchronisation never move the head by more than 5 · 2^32 at once. Only a peer that skips 2^36
//! numbers in such jumps and never hits a slot on the way could make it look newer than it is, and
//! all it gains is that its packets in this slot are refused. The head's upper bits follow from `near` in the same way.

use crate::{
    aead::prefetch,
    atomic::{AtomicU64, Ordering, Relaxed},
};
use esplane_api::{DropReason, WindowSize};

/// Numbers of a block.
const BLOCK_BITS: u64 = 32;
/// Blocks that the head goes before `near` follows: seldom, and far below what 32 bits can tell apart.
const NEAR_BLOCKS: u64 = 1 << 20;

/// Which numbers of one inbound key have been received.
///
/// What packets in order need is one cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct ReplayWindow {
    /// The block of the highest number committed, or of the floor; never without a bit.
    newest: AtomicU64,
    /// A block, whole, near to the newest.
    near: AtomicU64,
    /// Numbers up to here were never ours to accept. At least 0: a sender's first number is 1 (RFC
    /// 4303 §2.2), so 0 is too old from the start.
    floor: u64,
    window_packets: u32,
    slots: Box<[AtomicU64]>,
}

/// What a word had and now has for one block.
struct Taken {
    /// The bits that nobody had set before.
    fresh: u32,
    /// The highest number before, as far as this block tells.
    head: u64,
}

impl ReplayWindow {
    /// A window above `floor`: 0 for a fresh key.
    pub fn new(window: WindowSize, floor: u64) -> Self {
        let slots = (window.packets() as usize).div_ceil(BLOCK_BITS as usize);
        let slots = slots.next_power_of_two();
        let (block, bit) = place(floor);
        // Older than every block that may come, and empty.
        let ancient = block.wrapping_sub(slots as u32);
        Self {
            newest: AtomicU64::new(word(block, bit | (bit - 1))),
            near: AtomicU64::new(floor / BLOCK_BITS),
            floor,
            window_packets: window.packets(),
            slots: (0..slots)
                .map(|_| AtomicU64::new(word(ancient, 0)))
                .collect(),
        }
    }

    /// Asks for what the next call reads first.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(self);
    }

    /// Asks for the slot that taking a number needs, if it needs one.
    #[inline]
    pub fn prefetch_slot(&self, number: u64) {
        let (block, newest) = (place(number).0, block_of(self.newest.load(Relaxed)));
        if block != newest {
            let behind = (block.wrapping_sub(newest) as i32) < 0;
            prefetch(self.slot(if behind { block } else { newest }));
        }
    }

    /// The highest number received, or the floor.
    #[inline]
    pub fn head(&self) -> u64 {
        let (newest, near) = (self.newest.load(Relaxed), self.near.load(Relaxed));
        let ahead = block_of(newest).wrapping_sub(near as u32) as i32;
        highest(near.wrapping_add_signed(ahead.into()), newest as u32)
    }

    /// Its size.
    pub fn window_packets(&self) -> u32 {
        self.window_packets
    }

    /// Before authentication: whether a packet with this number can still be accepted. Changes
    /// nothing, so a forged packet leaves no trace.
    #[inline]
    pub fn check(&self, number: u64) -> Result<(), DropReason> {
        self.check_below(self.head(), number)
    }

    /// The same, by a head that was read already.
    #[inline]
    pub fn check_below(&self, head: u64, number: u64) -> Result<(), DropReason> {
        if number > head {
            return Ok(()); // as nearly always: nothing so high has come
        }
        self.check_behind(head, number)
    }

    fn check_behind(&self, head: u64, number: u64) -> Result<(), DropReason> {
        if number < self.oldest(head) {
            return Err(DropReason::ReplayTooOld);
        }
        let (block, bit) = place(number);
        let newest = self.newest.load(Ordering::Acquire);
        let held = if block == block_of(newest) {
            newest as u32
        } else {
            held_bits(self.slot(block).load(Relaxed), block)?
        };
        match held & bit {
            0 => Ok(()),
            _ => Err(DropReason::ReplayDuplicate),
        }
    }

    /// After authentication: takes the number, once. `true` if it is the highest so far.
    #[inline]
    pub fn commit(&self, number: u64) -> Result<bool, DropReason> {
        let mut taken = Err(DropReason::ReplayTooOld);
        let number = [number];
        let newest = self.commit_run(&number, |number| *number, |_, result| taken = result);
        let newest = newest.is_some();
        taken.map(|()| newest)
    }

    /// The same for a run of packets, as if one after the other: tells for each whether its `number` is taken.
    /// Answers which one has the highest so far, if one of them has.
    ///
    /// Numbers in a row share a block, and so one compare-and-swap.
    #[inline]
    pub fn commit_run<'p, P>(
        &self,
        packets: &'p [P],
        number: impl Fn(&P) -> u64,
        mut tell: impl FnMut(&P, Result<(), DropReason>),
    ) -> Option<&'p P> {
        let (mut head, mut newest) = (self.head(), None);
        let mut rest = packets;
        while let Some(first) = rest.first() {
            let block = number(first) / BLOCK_BITS;
            // A window is no smaller than a block, so none of a block's numbers makes another of them too old.
            let oldest = self.oldest(head);
            let (mut wanted, mut count, mut clean) = (0, 0, true);
            let mut highest = (0, None);
            for packet in rest {
                let number = number(packet);
                if number / BLOCK_BITS != block {
                    break;
                }
                let bit = place(number).1;
                clean &= number >= oldest && wanted & bit == 0;
                wanted |= if number >= oldest { bit } else { 0 };
                if number > highest.0 {
                    highest = (number, Some(packet));
                }
                count += 1;
            }
            let (of_block, others) = rest.split_at(count);
            rest = others;
            let taken = self.take(block, wanted);
            if let Ok(taken) = &taken {
                head = head.max(taken.head);
            }
            let mut fresh = taken.map(|taken| taken.fresh);
            // As nearly always all of them are taken, and need no further look.
            let all = clean && fresh == Ok(wanted);
            if all && highest.0 > head {
                (head, newest) = highest;
            }
            for packet in of_block {
                let taken = if all {
                    Ok(())
                } else {
                    let number = number(packet);
                    let taken = one_of(number, oldest, &mut fresh);
                    if taken.is_ok() && number > head {
                        (head, newest) = (number, Some(packet));
                    }
                    taken
                };
                tell(packet, taken);
            }
        }
        newest
    }

    /// Sets these bits of a block.
    #[inline]
    fn take(&self, block: u64, wanted: u32) -> Result<Taken, DropReason> {
        let mut newest = self.newest.load(Ordering::Acquire);
        loop {
            let ahead = (block as u32).wrapping_sub(block_of(newest)) as i32;
            let (held, head) = match ahead {
                0 => (newest as u32, highest(block, newest as u32)),
                1.. => (0, 0),
                _ => return self.take_behind(block, wanted),
            };
            let fresh = wanted & !held;
            if fresh == 0 {
                return Ok(Taken { fresh, head });
            }
            if ahead > 0 {
                let _displaced = self.add_to_slot(block_of(newest), newest as u32);
            }
            let ours = word(block as u32, held | wanted);
            let (release, acquire) = (Ordering::Release, Ordering::Acquire);
            match self
                .newest
                .compare_exchange_weak(newest, ours, release, acquire)
            {
                Ok(_) => {
                    if block > self.near.load(Relaxed) + NEAR_BLOCKS {
                        self.near.fetch_max(block, Relaxed);
                    }
                    return Ok(Taken { fresh, head });
                }
                Err(newer) => newest = newer,
            }
        }
    }

    /// The same for a block that is no longer the newest.
    fn take_behind(&self, block: u64, wanted: u32) -> Result<Taken, DropReason> {
        Ok(Taken {
            fresh: self.add_to_slot(block as u32, wanted)?,
            head: highest(block, u32::MAX),
        })
    }

    /// Sets these bits of a block in its slot, and answers which of them nobody had set before.
    fn add_to_slot(&self, block: u32, bits: u32) -> Result<u32, DropReason> {
        let slot = self.slot(block);
        let mut current = slot.load(Relaxed);
        loop {
            let held = held_bits(current, block)?;
            if bits & !held == 0 {
                return Ok(0);
            }
            let wanted = word(block, held | bits);
            match slot.compare_exchange_weak(current, wanted, Relaxed, Relaxed) {
                Ok(_) => return Ok(bits & !held),
                Err(newer) => current = newer,
            }
        }
    }

    /// The lowest number that is not too old.
    #[inline]
    fn oldest(&self, head: u64) -> u64 {
        let bottom = head.saturating_sub(u64::from(self.window_packets) - 1);
        bottom.max(self.floor + 1)
    }

    #[inline]
    fn slot(&self, block: u32) -> &AtomicU64 {
        // The number of slots is a power of two.
        &self.slots[block as usize & (self.slots.len() - 1)]
    }
}

/// Whether a number is taken, of a block whose `fresh` bits have just been; once, so that its copy is not.
#[cold]
fn one_of(number: u64, oldest: u64, fresh: &mut Result<u32, DropReason>) -> Result<(), DropReason> {
    let bit = place(number).1;
    match fresh {
        _ if number < oldest => Err(DropReason::ReplayTooOld),
        Err(reason) => Err(*reason),
        Ok(fresh) if *fresh & bit == 0 => Err(DropReason::ReplayDuplicate),
        Ok(fresh) => {
            *fresh &= !bit;
            Ok(())
        }
    }
}

/// Which numbers of `block` have come, by what its slot holds: none if that is an older block.
#[inline]
fn held_bits(current: u64, block: u32) -> Result<u32, DropReason> {
    let (held, bits) = (block_of(current), current as u32);
    match block.wrapping_sub(held) as i32 {
        0 => Ok(bits),
        1.. => Ok(0),
        _ => Err(DropReason::ReplayTooOld),
    }
}

#[inline]
fn place(number: u64) -> (u32, u32) {
    ((number / BLOCK_BITS) as u32, 1 << (number % BLOCK_BITS))
}

/// The highest of these numbers of a block.
#[inline]
fn highest(block: u64, bits: u32) -> u64 {
    block.wrapping_mul(BLOCK_BITS) + u64::from(bits.checked_ilog2().unwrap_or(0))
}

#[inline]
fn word(block: u32, bits: u32) -> u64 {
    u64::from(block) << 32 | u64::from(bits)
}

#[inline]
fn block_of(word: u64) -> u32 {
    (word >> 32) as u32
}

#[cfg(test)]
mod tests;
