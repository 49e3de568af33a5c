use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A network in CIDR notation, such as `10.1.0.0/16` or `2001:db8::/32`. No host bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IpPrefix {
    address: IpAddr,
    length: u8,
}

impl IpPrefix {
    /// All of IPv4.
    pub const ALL_V4: Self = Self {
        address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        length: 0,
    };
    /// All of IPv6.
    pub const ALL_V6: Self = Self {
        address: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        length: 0,
    };

    /// Refuses a length past the family's and addresses with bits set behind it.
    pub fn new(address: IpAddr, length: u8) -> Result<Self, PrefixError> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        if length > bits {
            return Err(PrefixError::TooLong { length, bits });
        }
        let network = Self::truncated(address, length);
        if network.address != address {
            return Err(PrefixError::HostBits {
                address,
                length,
                network: network.address,
            });
        }
        Ok(network)
    }

    /// The network of `length` bits that holds `address`; a length past the family's means all bits.
    pub fn truncated(address: IpAddr, length: u8) -> Self {
        match address {
            IpAddr::V4(v4) => {
                let length = length.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                Self {
                    address: Ipv4Addr::from_bits(v4.to_bits() & mask).into(),
                    length,
                }
            }
            IpAddr::V6(v6) => {
                let length = length.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                Self {
                    address: Ipv6Addr::from_bits(v6.to_bits() & mask).into(),
                    length,
                }
            }
        }
    }

    /// The network of one address.
    pub fn host(address: IpAddr) -> Self {
        Self::truncated(address, 128)
    }

    /// The network address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The number of leading bits that all its addresses share.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Whether `address` lies within.
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4()
            && Self::truncated(address, self.length) == *self
    }

    /// The last address of the network.
    pub fn last(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(v4) => {
                let host = u32::MAX.checked_shr(u32::from(self.length)).unwrap_or(0);
                Ipv4Addr::from_bits(v4.to_bits() | host).into()
            }
            IpAddr::V6(v6) => {
                let host = u128::MAX.checked_shr(u32::from(self.length)).unwrap_or(0);
                Ipv6Addr::from_bits(v6.to_bits() | host).into()
            }
        }
    }
}

/// Why something is no [`IpPrefix`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrefixError {
    /// Not `ADDRESS/LENGTH`.
    #[error("`{0}` is no network; write ADDRESS/LENGTH, such as 10.1.0.0/16 or 2001:db8::/32")]
    Syntax(String),
    /// The length exceeds the family's bits.
    #[error("prefix length {length} is too long; this address family has {bits} bits")]
    TooLong {
        /// What was asked for.
        length: u8,
        /// What the family has.
        bits: u8,
    },
    /// The address names a host, not a network.
    #[error("{address}/{length} has host bits set; write {network}/{length}")]
    HostBits {
        /// The address as given.
        address: IpAddr,
        /// The length as given.
        length: u8,
        /// The network that holds it.
        network: IpAddr,
    },
}

impl FromStr for IpPrefix {
    type Err = PrefixError;
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let syntax = || PrefixError::Syntax(text.to_owned());
        let (address, length) = text.split_once('/').ok_or_else(syntax)?;
        Self::new(
            address.parse().map_err(|_| syntax())?,
            length.parse().map_err(|_| syntax())?,
        )
    }
}

impl TryFrom<String> for IpPrefix {
    type Error = PrefixError;
    fn try_from(text: String) -> Result<Self, PrefixError> {
        text.parse()
    }
}

impl From<IpPrefix> for String {
    fn from(prefix: IpPrefix) -> String {
        prefix.to_string()
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl fmt::Debug for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_bits_are_refused_with_the_network_that_was_meant() {
        let error = "10.1.2.3/16".parse::<IpPrefix>().unwrap_err().to_string();
        assert_eq!(error, "10.1.2.3/16 has host bits set; write 10.1.0.0/16");
    }

    #[test]
    fn edges_of_both_families() {
        for (text, inside, outside, last) in [
            ("0.0.0.0/0", "255.255.255.255", "::1", "255.255.255.255"),
            (
                "::/0",
                "ffff::",
                "1.2.3.4",
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            ),
            ("10.0.0.1/32", "10.0.0.1", "10.0.0.2", "10.0.0.1"),
            (
                "2001:db8::/33",
                "2001:db8:7fff::1",
                "2001:db8:8000::",
                "2001:db8:7fff:ffff:ffff:ffff:ffff:ffff",
            ),
        ] {
            let prefix: IpPrefix = text.parse().unwrap();
            assert_eq!(prefix.to_string(), text);
            assert!(prefix.contains(inside.parse().unwrap()), "{text}");
            assert!(!prefix.contains(outside.parse().unwrap()), "{text}");
            assert_eq!(prefix.last(), last.parse::<IpAddr>().unwrap());
        }
        assert!("10.0.0.0/33".parse::<IpPrefix>().is_err());
        assert!("10.0.0.0".parse::<IpPrefix>().is_err());
    }
}
