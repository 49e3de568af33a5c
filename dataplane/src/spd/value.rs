//! What a look-up in the trie finds, in one word.

use super::{Decision, TunnelSlot};

/// None, a decision, or where to ask further. Packed, as a million of them shall stay in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Value(u32);

/// A [`Value`] taken apart.
pub(super) enum Kind {
    /// No network holds the address.
    None,
    /// Whatever the packet.
    Decided(Decision),
    /// This chain of rules decides.
    Chain(u32),
}

const BYPASS: u32 = 1;
const DISCARD: u32 = 2;
const PROTECT: u32 = 1 << 30;
const CHAIN: u32 = 1 << 31;
/// More than either could ever count up to.
const NUMBER_MASK: u32 = PROTECT - 1;

impl Value {
    pub const NONE: Self = Self(0);

    pub fn decided(decision: Decision) -> Self {
        Self(match decision {
            Decision::Protect(TunnelSlot(slot)) => PROTECT | slot & NUMBER_MASK,
            Decision::Bypass => BYPASS,
            Decision::Discard => DISCARD,
        })
    }

    pub fn chain(number: u32) -> Self {
        Self(CHAIN | number & NUMBER_MASK)
    }

    #[inline]
    pub fn kind(self) -> Kind {
        match self.0 {
            0 => Kind::None,
            bits if bits & CHAIN != 0 => Kind::Chain(bits & NUMBER_MASK),
            bits if bits & PROTECT != 0 => {
                Kind::Decided(Decision::Protect(TunnelSlot(bits & NUMBER_MASK)))
            }
            BYPASS => Kind::Decided(Decision::Bypass),
            _ => Kind::Decided(Decision::Discard),
        }
    }

    /// The tunnel, if it is that and no more.
    #[inline]
    pub fn protects(self) -> Option<TunnelSlot> {
        let plain = self.0 & (CHAIN | PROTECT) == PROTECT;
        plain.then_some(TunnelSlot(self.0 & NUMBER_MASK))
    }

    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub fn bits(self) -> u32 {
        self.0
    }
}
