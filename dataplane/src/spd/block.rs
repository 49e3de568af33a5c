//! The networks longer than a slot, as a poptrie (Asai and Ohara, SIGCOMM 2015): six bits of the address a step, and
//! for each step two bitmaps instead of 64 pointers.
//!
//! ```text
//!   words  │ node 0: children │ leaf starts │ bases │ node 1 … │ leaves, two to a word …
//!
//!   next six bits of the address = i
//!     bit i of children is set:  on to node   base + (children below i)
//!     else:                      the leaf     base + (leaf starts up to i) - 1
//! ```
//!
//! Neighbours with the same value share a leaf. All of it is one allocation, so a step is one or two cache lines.

use super::{
    fib::{Address, Entry, SLOT_BITS},
    value::Value,
};
use std::{ops::Range, sync::Arc};

/// Bits of the address that one step looks at.
const STEP_BITS: u8 = 6;
/// Words of one node.
const NODE_WORDS: usize = 3;

/// Immutable, and shared by all snapshots since it was built.
#[derive(Clone)]
pub(super) struct Block(Arc<[u64]>);

impl Block {
    /// From the networks within one slot, all longer than it, sorted by address, then length.
    pub fn new<A: Address>(entries: &[Entry<A>]) -> Self {
        let mut builder = Builder::default();
        builder.pending.push(Pending {
            entries: 0..entries.len(),
            depth: SLOT_BITS,
            inherited: Value::NONE,
        });
        // Nodes are built in the order in which they were asked for, so that siblings lie side by side.
        while let Some(pending) = builder.pending.get(builder.nodes.len()).cloned() {
            builder.node(entries, pending);
        }
        builder.finish()
    }

    /// The value of the longest network here that holds `address`, or none.
    #[inline(always)]
    pub fn find<A: Address>(&self, address: A) -> Value {
        let words = &*self.0;
        let (mut node, mut depth) = (0, SLOT_BITS);
        while let Some(&[children, leaf_starts, bases]) = words
            .get(node * NODE_WORDS..)
            .and_then(<[u64]>::first_chunk::<NODE_WORDS>)
        {
            let bit = 1_u64 << address.bits(depth, STEP_BITS);
            if children & bit == 0 {
                let before = (leaf_starts & (bit | (bit - 1))).count_ones() as usize;
                let leaf = (bases >> 32) as usize + before - 1;
                let pair = words.get(leaf / 2).copied().unwrap_or_default();
                return Value::from_bits((pair >> (leaf % 2 * 32)) as u32);
            }
            node = bases as u32 as usize + (children & (bit - 1)).count_ones() as usize;
            depth += STEP_BITS;
        }
        Value::NONE // cannot be: every child has been built
    }
}

/// A node still to be built.
#[derive(Clone)]
struct Pending {
    entries: Range<usize>,
    depth: u8,
    /// What holds where none of the entries does.
    inherited: Value,
}

#[derive(Default)]
struct Builder {
    pending: Vec<Pending>,
    nodes: Vec<[u64; NODE_WORDS]>,
    leaves: Vec<u32>,
}

impl Builder {
    fn node<A: Address>(&mut self, all: &[Entry<A>], node: Pending) {
        let end = node.depth + STEP_BITS;
        let mut values = [node.inherited; 1 << STEP_BITS];
        let (mut children, first_child) = (0_u64, self.pending.len());
        // Sorted: a network comes before all it holds, so the longer one paints last.
        paint(&mut values, &all[node.entries.clone()], node.depth);
        let mut at = node.entries.start;
        while at < node.entries.end {
            let place = all[at].address.bits(node.depth, STEP_BITS);
            let longer = all[at..node.entries.end].iter().take_while(|entry| {
                entry.length > end && entry.address.bits(node.depth, STEP_BITS) == place
            });
            let group = at..at + longer.count();
            at = group.end.max(at + 1);
            if !group.is_empty() {
                children |= 1 << place;
                self.pending.push(Pending {
                    entries: group,
                    depth: end,
                    inherited: values[place],
                });
            }
        }
        let (mut leaf_starts, first_leaf, mut last) = (0_u64, self.leaves.len(), None);
        for (place, value) in values.into_iter().enumerate() {
            if children & 1 << place == 0 && last != Some(value) {
                leaf_starts |= 1 << place;
                self.leaves.push(value.bits());
                last = Some(value);
            }
        }
        let bases = (first_leaf as u64) << 32 | first_child as u64;
        self.nodes.push([children, leaf_starts, bases]);
    }

    fn finish(self) -> Block {
        let before_leaves = (2 * NODE_WORDS * self.nodes.len()) as u64;
        let nodes = self
            .nodes
            .into_iter()
            .flat_map(|[children, starts, bases]| {
                [children, starts, bases + (before_leaves << 32)]
            });
        let pair = |pair: &[u32]| {
            let second = pair.get(1).copied().unwrap_or_default();
            u64::from(second) << 32 | u64::from(pair[0])
        };
        Block(nodes.chain(self.leaves.chunks(2).map(pair)).collect())
    }
}

/// Gives each place below `depth` the value of the longest of the sorted `entries` that holds it and is no longer than a
/// place.
pub(super) fn paint<A: Address>(values: &mut [Value], entries: &[Entry<A>], depth: u8) {
    let step = values.len().trailing_zeros() as u8;
    for entry in entries.iter().filter(|entry| entry.length <= depth + step) {
        let first = entry.address.bits(depth, step);
        let places = 1 << (depth + step - entry.length);
        values[first..first + places].fill(entry.value);
    }
}
