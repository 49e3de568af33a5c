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
    aead::{prefetch, set_of},
    atomic::{AtomicU64, Ordering, Relaxed},
};
use esplane_api::{DropReason, WindowSize};

/// Packets of one run, at most.
pub const RUN_MAX: usize = 64;
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

/// What became of a run's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    taken: u64,
    too_old: u64,
    /// The packet with the highest number so far, if one of them has it.
    pub newest: Option<usize>,
}

impl Committed {
    /// Whether a packet's number is taken.
    #[inline]
    pub fn of(&self, packet: usize) -> Result<(), DropReason> {
        let is_in = |set: u64| packet < RUN_MAX && set >> packet & 1 == 1;
        if is_in(self.taken) {
            Ok(())
        } else if packet >= RUN_MAX || is_in(self.too_old) {
            Err(DropReason::ReplayTooOld)
        } else {
            Err(DropReason::ReplayDuplicate)
        }
    }
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
    pub fn check(&self, number: u64) -> Result<(), DropReason> {
        let head = self.head();
        if number > head {
            return Ok(());
        }
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
        let committed = self.commit_run(&[number], |number| *number);
        committed.of(0).map(|()| committed.newest == Some(0))
    }

    /// The same for a run of up to [`RUN_MAX`] packets, as if one after the other; none is taken of those beyond.
    ///
    /// Numbers in a row share a block, and so one compare-and-swap.
    #[inline]
    pub fn commit_run<P>(&self, packets: &[P], number: impl Fn(&P) -> u64) -> Committed {
        match packets {
            [only] if self.take_next(number(only)) => Committed {
                taken: 1,
                too_old: 0,
                newest: Some(0),
            },
            _ => self.commit_several(packets, number),
        }
    }

    /// Takes a number above all others, as nearly every packet's is; `false`, and nothing changed, if it is none.
    #[inline]
    fn take_next(&self, number: u64) -> bool {
        let (block, bit) = place(number);
        let mut newest = self.newest.load(Ordering::Acquire);
        loop {
            let ahead = block.wrapping_sub(block_of(newest)) as i32;
            let held = if ahead > 0 { 0 } else { newest as u32 };
            if ahead < 0 || held >= bit {
                return false;
            }
            match self.replace(newest, number / BLOCK_BITS, held | bit) {
                Ok(()) => return true,
                Err(newer) => newest = newer,
            }
        }
    }

    #[inline(never)]
    fn commit_several<P>(&self, packets: &[P], number: impl Fn(&P) -> u64) -> Committed {
        let packets = packets.get(..RUN_MAX).unwrap_or(packets);
        let (mut head, mut newest) = (self.head(), (0..0, true));
        let (mut taken, mut too_old) = (0, 0);
        let mut begin = 0;
        while let Some(first) = packets.get(begin) {
            let block = number(first) / BLOCK_BITS;
            // A window is no smaller than a block, so none of a block's numbers makes another of them too old.
            let oldest = self.oldest(head);
            let open = if block * BLOCK_BITS >= oldest {
                u32::MAX // as nearly always
            } else {
                open_bits(block, oldest)
            };
            let (mut wanted, mut twice, mut end) = (0, 0, begin);
            for packet in &packets[begin..] {
                let number = number(packet);
                if number / BLOCK_BITS != block {
                    break;
                }
                let bit = place(number).1;
                twice |= wanted & bit;
                wanted |= bit;
                end += 1;
            }
            let before = self.take(block, wanted & open);
            if let Ok(taken) = &before {
                head = head.max(taken.head);
            }
            let mut fresh = before.map(|taken| taken.fresh);
            if let Ok(fresh) = fresh
                && fresh != 0
                && highest(block, fresh) > head
            {
                (head, newest) = (highest(block, fresh), (begin..end, twice == 0));
            }
            if twice == 0 && fresh == Ok(wanted) {
                // As nearly always all of them are taken, and need no further look.
                taken |= set_of(begin..end);
            } else {
                for (at, packet) in packets.iter().enumerate().take(end).skip(begin) {
                    match one_of(number(packet), oldest, &mut fresh) {
                        Ok(()) => taken |= 1 << at,
                        Err(DropReason::ReplayDuplicate) => {}
                        Err(_) => too_old |= 1 << at,
                    }
                }
            }
            begin = end;
        }
        let is_newest = |at: &usize| number(&packets[*at]) == head;
        let newest = match newest {
            (mut of_block, true) => of_block.rfind(is_newest),
            (mut of_block, false) => of_block.find(is_newest), // of several copies the first was taken
        };
        Committed {
            taken,
            too_old,
            newest,
        }
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
            match self.replace(newest, block, held | wanted) {
                Ok(()) => return Ok(Taken { fresh, head }),
                Err(newer) => newest = newer,
            }
        }
    }

    /// Puts this block and its bits in the place of `newest`, which holds it or an older one; or answers what is there by now.
    #[inline]
    fn replace(&self, newest: u64, block: u64, bits: u32) -> Result<(), u64> {
        let moves_on = block_of(newest) != block as u32;
        if moves_on {
            let _displaced = self.add_to_slot(block_of(newest), newest as u32);
        }
        let (release, acquire) = (Ordering::Release, Ordering::Acquire);
        let ours = word(block as u32, bits);
        self.newest
            .compare_exchange_weak(newest, ours, release, acquire)?;
        if moves_on && block > self.near.load(Relaxed) + NEAR_BLOCKS {
            self.near.fetch_max(block, Relaxed);
        }
        Ok(())
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

/// Which numbers of a block are no lower than `oldest`, which is above its first.
#[cold]
fn open_bits(block: u64, oldest: u64) -> u32 {
    let closed = (oldest - block * BLOCK_BITS).min(BLOCK_BITS);
    u32::MAX.checked_shl(closed as u32).unwrap_or(0)
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
