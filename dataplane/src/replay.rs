//! The anti-replay window (RFC 4303 §3.4.3), after RFC 6479: a ring of blocks instead of one
//! shifted bitmap, so that moving on costs the same however far the head jumps.
//!
//! RFC 6479 clears the blocks between the old head and the new one; that needs a lock. Here each
//! block carries its own number, and one that has come round is recognised instead of cleared:
//!
//! ```text
//!   number = block · 32 + bit          slot = block mod slots
//!
//!   one slot, one AtomicU64:   │ low 32 bits of the block │ 32 bits: which numbers have come │
//! ```
//!
//! `commit_run` changes a slot for all numbers of one block at once, by compare-and-swap:
//!
//! | the slot holds | then |
//! |---|---|
//! | an older block | (our block, our bits) replaces it |
//! | our block | our bits are added; one already there: a duplicate |
//! | a newer block | too old: the window has moved past us |
//!
//! **Exact under any number of workers.** The block in a slot only gets newer and its bits only grow,
//! so of all commits of one number exactly one finds its bit unset: accepted once, never twice,
//! whatever `head` shows meanwhile. All that is decided lives in one word, hence relaxed ordering. `tests/loom.rs` tries
//! every order of two workers.
//!
//! **The whole window is covered.** A block is displaced by the one `slots` blocks later, at the earliest when
//! the head is that block's first number. Its own last number then lies `32 · slots - 31` behind,
//! which is at least the window's size if `slots ≥ window / 32 + 1`.
//!
//! **32 bits of block number suffice.** Blocks are compared as a difference of 32 bits, right as long as two
//! blocks that meet in a slot are less than 2^31 blocks = 2^36 numbers apart. Inference and
//! resynchronisation never move the head by more than 5 · 2^32 at once. Only a peer that skips 2^36
//! numbers in such jumps and never hits a slot on the way could make it look newer than it is, and
//! all it gains is that its packets in this slot are refused.

use crate::{
    aead::prefetch,
    atomic::{AtomicU64, Relaxed},
};
use esplane_api::{DropReason, WindowSize};

/// Numbers per slot.
const BLOCK_BITS: u64 = 32;

/// Which numbers of one inbound key have been received.
#[derive(Debug)]
pub struct ReplayWindow {
    /// The highest number committed, or the floor.
    head: AtomicU64,
    /// Numbers up to here were never ours to accept. At least 0: a sender's first number is 1 (RFC
    /// 4303 §2.2), so 0 is too old from the start.
    floor: u64,
    window_packets: u32,
    slots: Box<[AtomicU64]>,
}

impl ReplayWindow {
    /// A window above `floor`: 0 for a fresh key.
    pub fn new(window: WindowSize, floor: u64) -> Self {
        let slots = (window.packets() as usize / BLOCK_BITS as usize + 1).next_power_of_two();
        // Older than every block that may come, and empty.
        let ancient = (floor / BLOCK_BITS).wrapping_sub(slots as u64) as u32;
        Self {
            head: AtomicU64::new(floor),
            floor,
            window_packets: window.packets(),
            slots: (0..slots)
                .map(|_| AtomicU64::new(word(ancient, 0)))
                .collect(),
        }
    }

    /// Asks for its head, which the next call reads first.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(self);
    }

    /// Asks for where a number will be marked.
    #[inline]
    pub fn prefetch_slot(&self, number: u64) {
        prefetch(self.slot(number));
    }

    /// The highest number received, or the floor.
    pub fn head(&self) -> u64 {
        self.head.load(Relaxed)
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
        if number < self.oldest(head) {
            return Err(DropReason::ReplayTooOld);
        }
        let (block, bit) = place(number);
        match held_bits(self.slot(number).load(Relaxed), block)? & bit {
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
        let head_before = self.head();
        let (mut head, mut newest) = (head_before, None);
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
            let mut fresh = self.take(block, wanted);
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
        // Only what moves the head writes it: it is read by every worker.
        if head > head_before && self.head.fetch_max(head, Relaxed) >= head {
            newest = None;
        }
        newest
    }

    /// Sets these bits of a block, and answers which of them nobody had set before.
    #[inline]
    fn take(&self, block: u64, bits: u32) -> Result<u32, DropReason> {
        let slot = self.slot(block * BLOCK_BITS);
        let mut current = slot.load(Relaxed);
        loop {
            let held = held_bits(current, block as u32)?;
            if bits & !held == 0 {
                return Ok(0);
            }
            let wanted = word(block as u32, held | bits);
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
    fn slot(&self, number: u64) -> &AtomicU64 {
        // The number of slots is a power of two.
        &self.slots[(number / BLOCK_BITS) as usize & (self.slots.len() - 1)]
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
    let (held, bits) = ((current >> 32) as u32, current as u32);
    match block.wrapping_sub(held) as i32 {
        0 => Ok(bits),
        1.. => Ok(0),
        _ => Err(DropReason::ReplayTooOld),
    }
}

fn place(number: u64) -> (u32, u32) {
    ((number / BLOCK_BITS) as u32, 1 << (number % BLOCK_BITS))
}

fn word(block: u32, bits: u32) -> u64 {
    u64::from(block) << 32 | u64::from(bits)
}

#[cfg(test)]
mod tests;
