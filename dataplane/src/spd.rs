//! Step 4, outbound: which policy decides over a packet (RFC 4301 §4.4.1).
//!
//! Of all policies that fit, the one with the longest remote network decides; among equals the lowest priority, then the one
//! that came first. So policies hang at the networks of their remote selectors, in one trie per family, and a look-up climbs
//! from the longest network that holds the destination to shorter ones until a policy fits:
//!
//! ```text
//!   destination ──fib.rs, block.rs──▶ 10.1.2.0/24 ──▶ 10.0.0.0/8 ──▶ 0.0.0.0/0
//!                 three levels         a decision, or a chain of rules, chains.rs, rules.rs
//! ```
//!
//! Most policies ask for nothing but the remote network; then the trie holds the decision itself, and a look-up is three or
//! four loads.
//!
//! # Changes
//!
//! A [`Spd`] never changes, so workers need no lock. The control side's `SpdWriter` keeps every rule at its network, builds the
//! pieces anew that a change has touched, and shares all others with the snapshots before. One route more among a million
//! takes less than a millisecond through `TableWriter` (most of it copies the list of tunnels), and no worker notices.
//!
//! # Why our own
//!
//! The crate `poptrie` (0.2) finds as fast, but moves all of its nodes at each insertion (6 ms at a million routes) and
//! cannot share them between snapshots; `prefix-trie` (0.10) took twice the time when hot. Neither knows that a network's
//! policies may not fit and a shorter one's may, which here is the second value of the same look-up.
//!

mod block;
mod chains;
mod fib;
mod rules;
#[cfg(test)]
mod tests;
mod value;
mod writer;

pub use rules::Selectors;
pub(crate) use rules::{AnyEnds, Networks};
pub(crate) use writer::{RulePlace, SpdWriter};

use crate::wire::Flow;
use chains::Chains;
use esplane_api::SelectorPair;
use fib::{Address, Fib};
use rules::Ends;

/// A tunnel's place in [`crate::Tables`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TunnelSlot(pub(crate) u32);

/// What becomes of a packet by policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Into this tunnel.
    Protect(TunnelSlot),
    /// In clear.
    Bypass,
    /// Nowhere.
    Discard,
}

/// One policy as the SPD wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which packets.
    pub selectors: SelectorPair,
    /// Lower decides first among policies of the same network.
    pub priority: u32,
    /// What becomes of them.
    pub decision: Decision,
}

/// The Security Policy Database, immutable.
#[derive(Clone, Default)]
pub struct Spd {
    v4: Family<u32>,
    v6: Family<u128>,
}

#[derive(Clone)]
struct Family<A> {
    fib: Fib,
    chains: Chains<A>,
}

impl<A> Default for Family<A> {
    fn default() -> Self {
        Self {
            fib: Fib::default(),
            chains: Chains::default(),
        }
    }
}

impl Spd {
    /// From all rules, in the order in which they came.
    pub fn new(rules: impl IntoIterator<Item = Rule>) -> Self {
        let mut writer = SpdWriter::default();
        let placed = rules.into_iter().zip(0..);
        writer.change([], placed.map(|(rule, place)| ((place, 0), rule)));
        writer.spd()
    }

    /// The decision over an outbound packet: its source is on our side. `None` if no policy fits.
    #[inline]
    pub fn decide(&self, flow: &Flow) -> Option<Decision> {
        self.decide_ends(&AnyEnds::of_flow(flow)?)
    }

    /// The tunnel of a packet to `destination`, where nothing else about the packet matters. `None` where it does, and for all
    /// other decisions: [`Spd::decide_ends`] knows.
    #[inline(always)]
    pub(crate) fn protects_v4(&self, destination: u32) -> Option<TunnelSlot> {
        self.v4.fib.longest(destination).protects()
    }

    /// The same for IPv6.
    #[inline(always)]
    pub(crate) fn protects_v6(&self, destination: u128) -> Option<TunnelSlot> {
        self.v6.fib.longest(destination).protects()
    }

    #[inline]
    pub(crate) fn decide_ends(&self, ends: &AnyEnds) -> Option<Decision> {
        match ends {
            AnyEnds::V4(ends) => self.v4.decide(ends),
            AnyEnds::V6(ends) => self.v6.decide(ends),
        }
    }
}

impl<A: Address> Family<A> {
    #[inline]
    fn decide(&self, ends: &Ends<A>) -> Option<Decision> {
        let settle = |value| self.chains.settle(value, ends);
        self.fib.find(ends.destination, settle)
    }
}
