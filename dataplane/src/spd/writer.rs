//! The control side's copy: every rule at its networks, from which the pieces that a change has touched are built anew.
//!
//! A change costs what lies around it: a host route one block, a network of up to 18 bits one page of 512 values. What it does not
//! touch is shared with all earlier snapshots.

use super::{
    Decision, Family, Rule, Spd,
    block::{Block, paint},
    chains::{Chain, Chains},
    fib::{Address, Entry, PLACES, SLOT_BITS, TOP_BITS},
    rules::{self, PackedRule},
    value::Value,
};
use esplane_api::SelectorPair;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// A rule's place among all: by definition, then by place in it. Among rules of equal network and priority the lowest
/// decides.
pub(crate) type RulePlace = (u64, u32);

/// All rules, and the newest snapshot of them.
#[derive(Default)]
pub(crate) struct SpdWriter {
    v4: Networks<u32>,
    v6: Networks<u128>,
}

impl SpdWriter {
    /// The newest snapshot: a copy of some pointers.
    pub fn spd(&self) -> Spd {
        Spd {
            v4: self.v4.family.clone(),
            v6: self.v6.family.clone(),
        }
    }

    /// Takes rules out and puts others in; the snapshot is the new one afterwards.
    pub fn change(
        &mut self,
        removed: impl IntoIterator<Item = (RulePlace, Rule)>,
        added: impl IntoIterator<Item = (RulePlace, Rule)>,
    ) {
        for (place, rule) in removed {
            self.v4.remove(place, &rule, rules::v4);
            self.v6.remove(place, &rule, rules::v6);
        }
        for (place, rule) in added {
            self.v4.add(place, &rule, rules::v4);
            self.v6.add(place, &rule, rules::v6);
        }
        self.v4.rebuild();
        self.v6.rebuild();
    }

    /// Definitions that have a rule with exactly these selectors and this priority.
    pub fn claimed_by(&self, selectors: &SelectorPair, priority: u32) -> Vec<u64> {
        let mut definitions = self.v4.claimed_by(selectors, priority, rules::v4);
        definitions.extend(self.v6.claimed_by(selectors, priority, rules::v6));
        definitions
    }
}

/// Networks of one family: those of up to 9 bits, of up to 18, and longer ones.
struct Networks<A> {
    levels: [BTreeMap<(A, u8), Network<A>>; 3],
    /// Level and first address of what has changed: everything, one top, one slot.
    touched: BTreeSet<(usize, A)>,
    /// Numbers that no chain has.
    free: Vec<u32>,
    family: Family<A>,
}

/// One network and its rules: by priority, then place.
struct Network<A> {
    rules: Vec<Placed<A>>,
    chain: Option<u32>,
}

struct Placed<A> {
    priority: u32,
    place: RulePlace,
    rule: PackedRule<A>,
}

impl<A> Placed<A> {
    fn rank(&self) -> (u32, RulePlace) {
        (self.priority, self.place)
    }
}

impl<A> Default for Networks<A> {
    fn default() -> Self {
        Self {
            levels: Default::default(),
            touched: BTreeSet::new(),
            free: Vec::new(),
            family: Family::default(),
        }
    }
}

/// Where a level's pieces begin.
const PIECE_BITS: [u8; 3] = [0, TOP_BITS, SLOT_BITS];

fn level(length: u8) -> usize {
    usize::from(length > TOP_BITS) + usize::from(length > SLOT_BITS)
}

impl<A: Address> Networks<A> {
    fn add(&mut self, place: RulePlace, rule: &Rule, convert: impl Fn(IpAddr) -> Option<A> + Copy) {
        let Some(packed) = PackedRule::new(&rule.selectors, rule.decision, convert) else {
            return;
        };
        let placed = |priority| Placed {
            priority,
            place,
            rule: packed,
        };
        for (address, length) in networks(&rule.selectors, convert) {
            let network = self.levels[level(length)]
                .entry((address, length))
                .or_insert_with(|| Network {
                    rules: Vec::with_capacity(1),
                    chain: None,
                });
            let placed = placed(rule.priority);
            let at = network
                .rules
                .partition_point(|other| other.rank() < placed.rank());
            network.rules.insert(at, placed);
            self.touch(address, length);
        }
    }

    fn remove(
        &mut self,
        place: RulePlace,
        rule: &Rule,
        convert: impl Fn(IpAddr) -> Option<A> + Copy,
    ) {
        for (address, length) in networks(&rule.selectors, convert) {
            let networks = &mut self.levels[level(length)];
            let Some(network) = networks.get_mut(&(address, length)) else {
                continue;
            };
            network
                .rules
                .retain(|placed| placed.rank() != (rule.priority, place));
            if network.rules.is_empty() {
                network.release(&mut self.family.chains, &mut self.free);
                networks.remove(&(address, length));
            }
            self.touch(address, length);
        }
    }

    fn claimed_by(
        &self,
        selectors: &SelectorPair,
        priority: u32,
        convert: impl Fn(IpAddr) -> Option<A> + Copy,
    ) -> Vec<u64> {
        let wanted = PackedRule::new(selectors, Decision::Discard, convert);
        let (Some(wanted), Some(first)) = (wanted, networks(selectors, convert).next()) else {
            return Vec::new();
        };
        let at_network = self.levels[level(first.1)].get(&first);
        at_network
            .into_iter()
            .flat_map(|network| &network.rules)
            .filter(|placed| {
                placed.priority == priority && placed.rule.selectors == wanted.selectors
            })
            .map(|placed| placed.place.0)
            .collect()
    }

    fn touch(&mut self, address: A, length: u8) {
        let level = level(length);
        self.touched
            .insert((level, address.edge(PIECE_BITS[level], false)));
    }

    fn rebuild(&mut self) {
        for (level, first) in std::mem::take(&mut self.touched) {
            let entries = self.entries(level, first);
            let fib = &mut self.family.fib;
            let (top, slot) = (first.bits(0, TOP_BITS), first.bits(TOP_BITS, TOP_BITS));
            if level == 2 {
                let block = (!entries.is_empty()).then(|| Block::new(&entries));
                fib.set_block(top, slot, block);
                continue;
            }
            let mut values = [Value::NONE; PLACES];
            paint(&mut values, &entries, PIECE_BITS[level]);
            if level == 0 {
                fib.set_short(&values);
            } else {
                fib.set_middle(top, &values);
            }
        }
    }

    /// The networks of one piece, sorted; their chains are brought up to date on the way.
    fn entries(&mut self, level: usize, first: A) -> Vec<Entry<A>> {
        let last = first.edge(PIECE_BITS[level], true);
        let mut entries: Vec<Entry<A>> = Vec::new();
        // Networks that hold the one at hand, shortest first.
        let mut around: Vec<Entry<A>> = Vec::new();
        for ((address, length), network) in
            self.levels[level].range_mut((first, 0)..=(last, A::BITS))
        {
            while around
                .last()
                .is_some_and(|entry| address.edge(entry.length, false) != entry.address)
            {
                around.pop();
            }
            let shorter = around.last().map_or(Value::NONE, |entry| entry.value);
            let entry = Entry {
                address: *address,
                length: *length,
                value: network.value(&mut self.family.chains, &mut self.free, shorter),
            };
            entries.push(entry);
            around.push(entry);
        }
        entries
    }
}

impl<A: Address> Network<A> {
    /// What the trie shall say here.
    fn value(&mut self, chains: &mut Chains<A>, free: &mut Vec<u32>, shorter: Value) -> Value {
        if let Some(first) = self.rules.first()
            && first.rule.selectors.asks_for_nothing_else()
        {
            let decision = first.rule.decision;
            self.release(chains, free);
            return Value::decided(decision);
        }
        let number = *self.chain.get_or_insert_with(|| {
            if free.is_empty() {
                free.extend(chains.grow().rev());
            }
            free.pop().unwrap_or_default() // never empty here
        });
        let rules = self.rules.iter().map(|placed| placed.rule);
        chains.set(number, Chain::new(rules, shorter));
        Value::chain(number)
    }

    /// Gives the number of its chain back.
    fn release(&mut self, chains: &mut Chains<A>, free: &mut Vec<u32>) {
        if let Some(number) = self.chain.take() {
            chains.set(number, Chain::new([], Value::NONE));
            free.push(number);
        }
    }
}

/// The networks of the remote selector, if it is of this family.
fn networks<A: Address>(
    selectors: &SelectorPair,
    convert: impl Fn(IpAddr) -> Option<A>,
) -> impl Iterator<Item = (A, u8)> {
    let networks = selectors.remote.prefixes();
    networks
        .into_iter()
        .filter_map(move |network| Some((convert(network.address())?, network.length())))
}
