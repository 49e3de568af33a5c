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
//! `commit` changes exactly one slot by compare-and-swap:
//!
//! | the slot holds | then |
//! |---|---|
//! | an older block | (our block, our bit) replaces it |
//! | our block | our bit is added; already there: duplicate |
//! | a newer block | too old: the window has moved past us |
//!
//! **Exact under any number of workers.** The block in a slot only gets newer and its bits only grow,
//! so of all commits of one number exactly one finds its bit unset: accepted once, never twice,
//! whatever `head` shows meanwhile. All that is decided lives in one word, hence relaxed ordering.
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

use esplane_api::{DropReason, WindowSize};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
        self.check_edge(number)?;
        let (block, bit) = place(number);
        merge(self.slot(number).load(Relaxed), block, bit).map(|_| ())
    }

    /// After authentication: takes the number, once. `true` if it is the highest so far.
    #[inline]
    pub fn commit(&self, number: u64) -> Result<bool, DropReason> {
        self.check_edge(number)?;
        let (block, bit) = place(number);
        let slot = self.slot(number);
        let mut current = slot.load(Relaxed);
        loop {
            let wanted = merge(current, block, bit)?;
            match slot.compare_exchange_weak(current, wanted, Relaxed, Relaxed) {
                Ok(_) => return Ok(self.head.fetch_max(number, Relaxed) < number),
                Err(newer) => current = newer,
            }
        }
    }

    fn check_edge(&self, number: u64) -> Result<(), DropReason> {
        let behind = self.head().saturating_sub(number);
        if number <= self.floor || behind >= u64::from(self.window_packets) {
            return Err(DropReason::ReplayTooOld);
        }
        Ok(())
    }

    fn slot(&self, number: u64) -> &AtomicU64 {
        // The number of slots is a power of two.
        &self.slots[(number / BLOCK_BITS) as usize & (self.slots.len() - 1)]
    }
}

/// What a slot shall hold once `bit` of `block` has come, or why it cannot.
fn merge(current: u64, block: u32, bit: u32) -> Result<u64, DropReason> {
    let (held, bits) = ((current >> 32) as u32, current as u32);
    match block.wrapping_sub(held) as i32 {
        0 if bits & bit != 0 => Err(DropReason::ReplayDuplicate),
        0 => Ok(word(block, bits | bit)),
        1.. => Ok(word(block, bit)),
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
