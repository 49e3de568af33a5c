use serde::{Deserialize, Serialize};
use std::{fmt, num::NonZeroU32, str::FromStr};

/// Security Parameters Index, the 32-bit name of an SA on the wire (RFC 4303 §2.1).
///
/// Values 0 to 255 are reserved and cannot be made. Parsed from `0xc0ffee01` or decimal, printed
/// as `0xc0ffee01`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Spi(NonZeroU32);

impl Spi {
    /// The smallest value that is not reserved (RFC 4303 §2.1).
    pub const MIN: u32 = 256;

    /// Refuses the reserved values 0 to 255.
    pub fn new(value: u32) -> Result<Self, SpiError> {
        match NonZeroU32::new(value) {
            Some(v) if value >= Self::MIN => Ok(Self(v)),
            _ => Err(SpiError::Reserved(value)),
        }
    }

    /// The value in host byte order.
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

/// Why a number or a text is no [`Spi`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiError {
    /// RFC 4303 §2.1 reserves 0 for local use and 1-255 for IANA.
    #[error("SPI {0} is reserved (RFC 4303 §2.1); use 256 to 4294967295 (0x100 to 0xffffffff)")]
    Reserved(u32),
    /// Not a number of 32 bits.
    #[error("`{0}` is no SPI; write a 32-bit number such as 0xc0ffee01")]
    NotANumber(String),
}

impl FromStr for Spi {
    type Err = SpiError;
    fn from_str(text: &str) -> Result<Self, SpiError> {
        let value = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => text.parse(),
        };
        Self::new(value.map_err(|_| SpiError::NotANumber(text.to_owned()))?)
    }
}

impl TryFrom<String> for Spi {
    type Error = SpiError;
    fn try_from(text: String) -> Result<Self, SpiError> {
        text.parse()
    }
}

impl From<Spi> for String {
    fn from(spi: Spi) -> String {
        spi.to_string()
    }
}

impl fmt::Display for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

impl fmt::Debug for Spi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A tunnel: one peer's set of policies and the SAs that carry them. Chosen by whoever defines the
/// tunnel, unique within one daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TunnelId(pub u32);

impl fmt::Display for TunnelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Which way an SA's packets go, seen from this gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// ESP arrives, clear packets leave towards the private network.
    Inbound,
    /// Clear packets arrive from the private network, ESP leaves.
    Outbound,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        })
    }
}

/// The full name of one SA.
///
/// Inbound SPIs are ours and unique; outbound SPIs were chosen by the peers and are unique only
/// within a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SaId {
    /// The tunnel whose packets it carries.
    pub tunnel: TunnelId,
    /// Which way.
    pub direction: Direction,
    /// Its name on the wire.
    pub spi: Spi,
}

impl fmt::Display for SaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} SA {} of tunnel {}",
            self.direction, self.spi, self.tunnel
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_values_cannot_be_made() {
        assert_eq!(Spi::new(0), Err(SpiError::Reserved(0)));
        assert_eq!(Spi::new(255), Err(SpiError::Reserved(255)));
        assert_eq!(Spi::new(256).unwrap().get(), 256);
        assert_eq!(Spi::new(u32::MAX).unwrap().get(), u32::MAX);
    }

    #[test]
    fn text_round_trips_and_errors_say_what_would_be_right() {
        assert_eq!(
            "0xc0ffee01".parse::<Spi>().unwrap().to_string(),
            "0xc0ffee01"
        );
        assert_eq!("256".parse::<Spi>().unwrap().to_string(), "0x00000100");
        let error = "0x1ffffffff".parse::<Spi>().unwrap_err().to_string();
        assert!(
            error.contains("0x1ffffffff") && error.contains("such as"),
            "{error}"
        );
        let error = "7".parse::<Spi>().unwrap_err().to_string();
        assert!(error.contains("256 to"), "{error}");
    }
}
