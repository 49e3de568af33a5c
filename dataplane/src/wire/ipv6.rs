//! IPv6 (RFC 8200) and its extension headers.

use super::u16_at;
use std::net::Ipv6Addr;

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 40;

/// Extension headers walked at most; RFC 8200 §4.1 knows seven places for them. A packet with more
/// is refused: its protocol cannot be known, so no selector may let it pass.
const EXTENSIONS_MAX: usize = 8;

/// One whole packet, fragment or not.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6<'a> {
    fixed: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
}

/// What lies behind the extension headers.
#[derive(Clone, Copy, Debug)]
pub struct Upper<'a> {
    /// Its protocol.
    pub protocol: u8,
    /// Its bytes; empty in a later fragment, whose bytes are not those of the protocol's header.
    pub payload: &'a [u8],
    /// Whether the packet is a part of a larger one.
    pub is_fragment: bool,
}

impl<'a> Ipv6<'a> {
    /// Refuses another version, and a length past the bytes there are. Bytes behind the packet are
    /// cut off. Jumbograms (RFC 2675) are not supported.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<HEADER_BYTES>()?;
        if fixed[0] >> 4 != 6 {
            return None;
        }
        let payload_bytes = usize::from(u16_at(fixed, 4));
        Some(Self {
            fixed,
            payload: bytes.get(HEADER_BYTES..HEADER_BYTES + payload_bytes)?,
        })
    }

    /// Header and payload.
    pub fn total_bytes(&self) -> usize {
        HEADER_BYTES + self.payload.len()
    }

    /// DSCP and ECN.
    pub fn traffic_class(&self) -> u8 {
        self.fixed[0] << 4 | self.fixed[1] >> 4
    }

    /// The first header behind the fixed one.
    pub fn next_header(&self) -> u8 {
        self.fixed[6]
    }

    /// Where it comes from.
    pub fn source(&self) -> Ipv6Addr {
        address(self.fixed, 8)
    }

    /// Where it goes.
    pub fn destination(&self) -> Ipv6Addr {
        address(self.fixed, 24)
    }

    /// What follows the fixed header.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Walks the extension headers. `None` if one of them is cut off or there are too many.
    #[inline]
    pub fn upper(&self) -> Option<Upper<'a>> {
        let mut upper = Upper {
            protocol: self.next_header(),
            payload: self.payload,
            is_fragment: false,
        };
        for _ in 0..=EXTENSIONS_MAX {
            let length = match upper.protocol {
                // Hop-by-hop, routing, destination options, mobility, HIP, shim6: units of eight
                // bytes, the first not counted.
                0 | 43 | 60 | 135 | 139 | 140 => (usize::from(*upper.payload.get(1)?) + 1) * 8,
                // Authentication header: units of four bytes, the first two not counted (RFC 4302 §2.2).
                51 => (usize::from(*upper.payload.get(1)?) + 2) * 4,
                44 => {
                    let fragment = upper.payload.first_chunk::<8>()?;
                    let offset_and_more = u16_at(fragment, 2) & 0xfff9;
                    upper.is_fragment |= offset_and_more != 0;
                    if offset_and_more & 0xfff8 != 0 {
                        upper.protocol = fragment[0];
                        upper.payload = &[];
                        return Some(upper);
                    }
                    8
                }
                _ => return Some(upper),
            };
            upper.protocol = *upper.payload.first()?;
            upper.payload = upper.payload.get(length..)?;
        }
        None
    }
}

fn address(header: &[u8; HEADER_BYTES], at: usize) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&header[at..at + 16]);
    octets.into()
}
