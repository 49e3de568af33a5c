use crate::{Direction, KeyMaterial, Lifetime, OuterPath, SaId, SelectorPair, Spi, TunnelId};
use serde::{Deserialize, Serialize};

/// All that is needed to install one SA.
///
/// Every field is valid by its own type, and no two fields can contradict each other, so a
/// `SaParams` that exists can be installed: what may still be refused depends on what is installed
/// already (a duplicate SPI, an unknown tunnel).
#[derive(Clone, Debug)]
pub struct SaParams {
    /// The tunnel it belongs to.
    pub tunnel: TunnelId,
    /// Which way its packets go.
    pub direction: Direction,
    /// Its name on the wire.
    pub spi: Spi,
    /// Suite, key and salt.
    pub key: KeyMaterial,
    /// 64-bit or 32-bit sequence numbers.
    pub esn: Esn,
    /// How far behind the highest number a packet may arrive (inbound only).
    pub window: WindowSize,
    /// Where its packets travel.
    pub path: OuterPath,
    /// Which inner packets it may carry; checked on what arrives (RFC 4301 §5.2). One pair must fit.
    pub selectors: Vec<SelectorPair>,
    /// When it ends.
    pub lifetime: Lifetime,
    /// Where an outbound SA starts to count; what an inbound one takes begins at `first`.
    pub sequence: SequenceStart,
    /// Outbound: the one worker that sends with it (a resource-specific SA, RFC 9611 §2). `None`: the fallback SA,
    /// of all workers that have none of their own. Inbound: that the peer sends with it so, and perhaps from a UDP port
    /// of that worker; only the fallback SA tells at which port the peer is.
    pub worker: Option<u16>,
}

impl SaParams {
    /// Its full name.
    pub fn id(&self) -> SaId {
        SaId {
            tunnel: self.tunnel,
            direction: self.direction,
            spi: self.spi,
        }
    }
}

/// Both SAs of one negotiation.
#[derive(Clone, Debug)]
pub struct SaPair {
    /// What we receive with.
    pub inbound: SaParams,
    /// What we send with.
    pub outbound: SaParams,
}

/// Whether sequence numbers have 64 bits (Extended Sequence Numbers, RFC 4303 §2.2.1) or 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Esn {
    /// 64 bits, of which the low 32 travel.
    On,
    /// 32 bits.
    Off,
}

impl Esn {
    /// The last number that may be sent.
    ///
    /// With ESN it stays 2^32 short of the end, room enough that no race between workers can wrap
    /// a 64-bit counter; nobody will notice.
    pub const fn last_sequence(self) -> u64 {
        match self {
            Self::On => u64::MAX - (1 << 32),
            Self::Off => u32::MAX as u64,
        }
    }
}

/// Anti-replay window in packets (RFC 4303 §3.4.3): 32 to 65,536, rounded up to a multiple of 32.
///
/// It cannot be switched off: a control plane that wants no protection asks for the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct WindowSize(u32);

impl WindowSize {
    /// 4096 packets: enough for the reordering of several cores and links.
    pub const DEFAULT: Self = Self(4096);

    /// Refuses windows below 32 (RFC 4303 §3.4.3: "a minimum window size of 32 packets MUST be supported")
    /// and above 65,536.
    pub fn new(packets: u32) -> Result<Self, WindowError> {
        match packets {
            32..=65_536 => Ok(Self(packets.next_multiple_of(32))),
            _ => Err(WindowError(packets)),
        }
    }

    /// Its size in packets, a multiple of 32.
    pub fn packets(self) -> u32 {
        self.0
    }
}

impl Default for WindowSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl TryFrom<u32> for WindowSize {
    type Error = WindowError;
    fn try_from(packets: u32) -> Result<Self, WindowError> {
        Self::new(packets)
    }
}

impl From<WindowSize> for u32 {
    fn from(window: WindowSize) -> u32 {
        window.0
    }
}

/// A window size out of range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a replay window of {0} packets is out of range; use 32 to 65536 (default 4096)")]
pub struct WindowError(pub u32);

/// Where an outbound SA starts to count, and how far it may go before it must ask.
///
/// The IV is the sequence number (RFC 4106 §3.1), so a number used twice under one key is fatal. A
/// key that outlives the daemon (static keys, strongSwan's) therefore counts within a
/// reservation that was stored durably before any number of it was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SequenceStart {
    /// The first number to send; 1 for a fresh key (RFC 4303 §2.2). Inbound: the first number taken, all before
    /// it count as received, and the high half of extended numbers goes on from there.
    pub first: u64,
    /// The last number that may be sent until [`crate::SaCommand::ExtendSequence`]; `None`: as far
    /// as [`Esn::last_sequence`].
    pub reserved_until: Option<u64>,
}

impl SequenceStart {
    /// For a key that no one has ever used and that dies with this process.
    pub const FRESH: Self = Self {
        first: 1,
        reserved_until: None,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_bounded_and_rounded_up() {
        assert_eq!(WindowSize::new(31), Err(WindowError(31)));
        assert_eq!(WindowSize::new(33).unwrap().packets(), 64);
        assert_eq!(WindowSize::new(65_536).unwrap().packets(), 65_536);
        assert!(
            WindowSize::new(65_537)
                .unwrap_err()
                .to_string()
                .contains("32 to 65536")
        );
    }

    #[test]
    fn numbers_stop_short_of_wrapping() {
        assert_eq!(Esn::Off.last_sequence(), 4_294_967_295);
        assert!(
            Esn::On
                .last_sequence()
                .checked_add(u64::from(u32::MAX))
                .is_some()
        );
    }
}
