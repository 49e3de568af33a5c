//! Where a network's value is not a decision but rules to be asked one by one.

use super::{
    Decision,
    fib::Address,
    rules::{Ends, PackedRule},
    value::{Kind, Value},
};
use std::{array, ops::Range, sync::Arc};

/// Chains in one piece of the store.
const PIECE: usize = 64;

/// The rules of one network.
#[derive(Clone)]
pub(super) struct Chain<A> {
    /// Most networks have one rule only: it lies here.
    first: Option<PackedRule<A>>,
    more: Box<[PackedRule<A>]>,
    /// The value of the next shorter network of the same level.
    pub shorter: Value,
}

impl<A: Address> Chain<A> {
    pub fn new(rules: impl IntoIterator<Item = PackedRule<A>>, shorter: Value) -> Self {
        let mut rules = rules.into_iter();
        Self {
            first: rules.next(),
            more: rules.collect(),
            shorter,
        }
    }

    fn decide(&self, ends: &Ends<A>) -> Option<Decision> {
        let mut all = self.first.iter().chain(&*self.more);
        all.find(|rule| rule.selectors.fits_outbound(ends))
            .map(|rule| rule.decision)
    }
}

/// Chains by number. Persistent: a change copies one piece, a snapshot the list of pieces.
#[derive(Clone)]
pub(super) struct Chains<A> {
    pieces: Vec<Arc<[Chain<A>; PIECE]>>,
}

impl<A> Default for Chains<A> {
    fn default() -> Self {
        Self { pieces: Vec::new() }
    }
}

impl<A: Address> Chains<A> {
    /// What `value` and the shorter networks of its level say about a packet.
    #[inline]
    pub fn settle(&self, mut value: Value, ends: &Ends<A>) -> Option<Decision> {
        loop {
            let chain = match value.kind() {
                Kind::None => return None,
                Kind::Decided(decision) => return Some(decision),
                Kind::Chain(number) => self.get(number)?,
            };
            if let Some(decision) = chain.decide(ends) {
                return Some(decision);
            }
            value = chain.shorter;
        }
    }

    fn get(&self, number: u32) -> Option<&Chain<A>> {
        let piece = self.pieces.get(number as usize / PIECE)?;
        piece.get(number as usize % PIECE)
    }

    /// Makes room for more chains, and answers for which.
    pub fn grow(&mut self) -> Range<u32> {
        let first = (self.pieces.len() * PIECE) as u32;
        let empty: [Chain<A>; PIECE] = array::from_fn(|_| Chain::new([], Value::NONE));
        self.pieces.push(Arc::new(empty));
        first..first + PIECE as u32
    }

    pub fn set(&mut self, number: u32, chain: Chain<A>) {
        if let Some(piece) = self.pieces.get_mut(number as usize / PIECE) {
            Arc::make_mut(piece)[number as usize % PIECE] = chain;
        }
    }
}
