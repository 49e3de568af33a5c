use serde::{Deserialize, Serialize};
use std::fmt;

/// How long an SA may be used: `soft` asks for a successor, `hard` ends it (RFC 4301 §4.4.2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Lifetime {
    soft: Limits,
    hard: Limits,
}

/// One set of limits; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Inner bytes carried.
    pub bytes: Option<u64>,
    /// Packets carried.
    pub packets: Option<u64>,
    /// Seconds since the SA was installed.
    pub seconds: Option<u64>,
}

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LifetimeUnit {
    /// Inner bytes.
    Bytes,
    /// Packets.
    Packets,
    /// Seconds since installation.
    Seconds,
}

impl fmt::Display for LifetimeUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bytes => "bytes",
            Self::Packets => "packets",
            Self::Seconds => "seconds",
        })
    }
}

impl Lifetime {
    /// No limit but the sequence numbers' own.
    pub const UNLIMITED: Self = Self {
        soft: Limits::NONE,
        hard: Limits::NONE,
    };

    /// Refuses zero limits and a soft limit past its hard one.
    pub fn new(soft: Limits, hard: Limits) -> Result<Self, LifetimeError> {
        for (unit, soft, hard) in [
            (LifetimeUnit::Bytes, soft.bytes, hard.bytes),
            (LifetimeUnit::Packets, soft.packets, hard.packets),
            (LifetimeUnit::Seconds, soft.seconds, hard.seconds),
        ] {
            if soft == Some(0) || hard == Some(0) {
                return Err(LifetimeError::Zero(unit));
            }
            if let (Some(soft), Some(hard)) = (soft, hard)
                && soft > hard
            {
                return Err(LifetimeError::SoftPastHard { unit, soft, hard });
            }
        }
        Ok(Self { soft, hard })
    }

    /// The limits at which a successor is asked for.
    pub fn soft(&self) -> Limits {
        self.soft
    }

    /// The limits at which the SA ends.
    pub fn hard(&self) -> Limits {
        self.hard
    }
}

impl Limits {
    /// No limit at all.
    pub const NONE: Self = Self {
        bytes: None,
        packets: None,
        seconds: None,
    };
}

/// Why limits are no [`Lifetime`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LifetimeError {
    /// An SA that ends before its first packet.
    #[error("a limit of 0 {0} would end the SA before its first packet; leave it out for no limit")]
    Zero(LifetimeUnit),
    /// The successor would be asked for too late.
    #[error(
        "the soft limit of {soft} {unit} lies past the hard limit of {hard}; it must be at most that"
    )]
    SoftPastHard {
        /// What is counted.
        unit: LifetimeUnit,
        /// As given.
        soft: u64,
        /// As given.
        hard: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_limits_are_refused() {
        let soft = Limits {
            packets: Some(11),
            ..Limits::NONE
        };
        let hard = Limits {
            packets: Some(10),
            ..Limits::NONE
        };
        let error = Lifetime::new(soft, hard).unwrap_err().to_string();
        assert!(
            error.contains("11 packets") && error.contains("10"),
            "{error}"
        );
        let zero = Limits {
            seconds: Some(0),
            ..Limits::NONE
        };
        assert_eq!(
            Lifetime::new(zero, Limits::NONE),
            Err(LifetimeError::Zero(LifetimeUnit::Seconds))
        );
        assert!(Lifetime::new(hard, soft).is_ok());
    }
}
