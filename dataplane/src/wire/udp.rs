//! UDP (RFC 768).

use super::u16_at;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 8;

/// One whole datagram.
#[derive(Clone, Copy, Debug)]
pub struct Udp<'a> {
    fixed: &'a [u8; HEADER_BYTES],
    payload: &'a [u8],
}

impl<'a> Udp<'a> {
    /// Refuses lengths that contradict each other. The checksum is not looked at: RFC 3948 §2.1
    /// lets it be zero, and the ICV protects what matters.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let fixed = bytes.first_chunk::<HEADER_BYTES>()?;
        Some(Self {
            fixed,
            payload: bytes.get(HEADER_BYTES..usize::from(u16_at(fixed, 4)))?,
        })
    }

    /// Where it comes from.
    pub fn source_port(&self) -> u16 {
        u16_at(self.fixed, 0)
    }

    /// Where it goes.
    pub fn destination_port(&self) -> u16 {
        u16_at(self.fixed, 2)
    }

    /// What follows the header.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}
