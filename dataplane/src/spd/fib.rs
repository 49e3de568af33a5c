//! One family's trie, as workers read it: persistent, so that a change copies what lies on its way and shares the rest.
//!
//! ```text
//!   address │ 9 bits │ 9 bits │ the rest
//!           │        │        └▶ Block: networks of more than 18 bits within one slot     block.rs
//!           │        └▶ Page: 512 slots, each with the value of networks of 10 to 18 bits
//!           └▶ 512 tops, each with the value of networks of up to 9 bits
//! ```
//!
//! Each level knows its own networks only, so that a default route touches the tops and no page, and a host route one
//! block. A look-up asks the longest level first.

use super::{block::Block, value::Value};
use std::sync::Arc;

/// Bits that choose a top, and then a slot of its page.
pub(super) const TOP_BITS: u8 = 9;
/// Bits of the address above a slot's block.
pub(super) const SLOT_BITS: u8 = 18;
/// Tops, and slots of a page.
pub(super) const PLACES: usize = 1 << TOP_BITS;

/// An address as a number.
pub(crate) trait Address: Copy + Ord + Default {
    /// Its length.
    const BITS: u8;
    /// `count` bits, from the one numbered `from` on; zeros behind the last.
    fn bits(self, from: u8, count: u8) -> usize;
    /// The first or the last address that shares its leading `length` bits.
    fn edge(self, length: u8, last: bool) -> Self;
    /// `self - other`, modulo the number of addresses.
    fn minus(self, other: Self) -> Self;
}

impl Address for u32 {
    const BITS: u8 = 32;

    #[inline]
    fn bits(self, from: u8, count: u8) -> usize {
        (u64::from(self) << 32 << from >> (64 - count)) as usize
    }

    fn edge(self, length: u8, last: bool) -> Self {
        let host = u32::MAX.checked_shr(u32::from(length)).unwrap_or(0);
        if last { self | host } else { self & !host }
    }

    #[inline]
    fn minus(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }
}

impl Address for u128 {
    const BITS: u8 = 128;

    #[inline]
    fn bits(self, from: u8, count: u8) -> usize {
        (self << from >> (128 - count)) as usize
    }

    fn edge(self, length: u8, last: bool) -> Self {
        let host = u128::MAX.checked_shr(u32::from(length)).unwrap_or(0);
        if last { self | host } else { self & !host }
    }

    #[inline]
    fn minus(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }
}

/// One network and its value.
#[derive(Clone, Copy)]
pub(super) struct Entry<A> {
    pub address: A,
    pub length: u8,
    pub value: Value,
}

/// Cloning it copies the tops and shares all below.
#[derive(Clone)]
pub(super) struct Fib {
    tops: Box<[Top; PLACES]>,
}

#[derive(Clone)]
struct Top {
    short: Value,
    page: Option<Arc<Page>>,
}

#[derive(Clone)]
struct Page {
    slots: [Slot; PLACES],
}

#[derive(Clone)]
struct Slot {
    middle: Value,
    block: Option<Block>,
}

const EMPTY_SLOT: Slot = Slot {
    middle: Value::NONE,
    block: None,
};

impl Default for Fib {
    fn default() -> Self {
        const EMPTY: Top = Top {
            short: Value::NONE,
            page: None,
        };
        Self {
            tops: Box::new([EMPTY; PLACES]),
        }
    }
}

impl Fib {
    /// Offers the values of the networks that hold `address`, the longest level's first, until one settles the matter.
    #[inline]
    pub fn find<A: Address, T>(
        &self,
        address: A,
        mut settle: impl FnMut(Value) -> Option<T>,
    ) -> Option<T> {
        let top = &self.tops[address.bits(0, TOP_BITS)];
        if let Some(page) = &top.page {
            let slot = &page.slots[address.bits(TOP_BITS, TOP_BITS)];
            if let Some(block) = &slot.block
                && let Some(settled) = settle(block.find(address))
            {
                return Some(settled);
            }
            if let Some(settled) = settle(slot.middle) {
                return Some(settled);
            }
        }
        settle(top.short)
    }

    /// The value of the longest network that holds `address`; none also where a longer one has nothing to say but a shorter
    /// one of its level.
    #[inline(always)]
    pub fn longest<A: Address>(&self, address: A) -> Value {
        let top = &self.tops[address.bits(0, TOP_BITS)];
        let Some(page) = &top.page else {
            return top.short;
        };
        let slot = &page.slots[address.bits(TOP_BITS, TOP_BITS)];
        if let Some(block) = &slot.block {
            let value = block.find(address);
            if value != Value::NONE {
                return value;
            }
        }
        if slot.middle == Value::NONE {
            top.short
        } else {
            slot.middle
        }
    }

    /// Whether it says nothing at all.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        let empty = |top: &Top| top.page.is_none() && top.short == Value::NONE;
        self.tops.iter().all(empty)
    }

    /// Replaces what networks of up to [`TOP_BITS`] bits say.
    pub fn set_short(&mut self, values: &[Value; PLACES]) {
        for (top, value) in self.tops.iter_mut().zip(values) {
            top.short = *value;
        }
    }

    /// Replaces what networks of up to [`SLOT_BITS`] bits say below one top.
    pub fn set_middle(&mut self, top: usize, values: &[Value; PLACES]) {
        self.change_page(top, true, |page| {
            for (slot, value) in page.slots.iter_mut().zip(values) {
                slot.middle = *value;
            }
        });
    }

    /// Replaces one slot's block.
    pub fn set_block(&mut self, top: usize, slot: usize, block: Option<Block>) {
        let less = block.is_none();
        self.change_page(top, less, |page| page.slots[slot].block = block);
    }

    /// Changes a page that is ours alone, or a copy of it. One that has become empty, where it may have got `less`, goes.
    fn change_page(&mut self, top: usize, less: bool, change: impl FnOnce(&mut Page)) {
        let place = &mut self.tops[top].page;
        let page = place.get_or_insert_with(|| {
            Arc::new(Page {
                slots: [EMPTY_SLOT; PLACES],
            })
        });
        let page = Arc::make_mut(page);
        change(page);
        let empty = |slot: &Slot| slot.block.is_none() && slot.middle == Value::NONE;
        if less && page.slots.iter().all(empty) {
            *place = None;
        }
    }
}
