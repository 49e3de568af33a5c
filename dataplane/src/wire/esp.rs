//! ESP (RFC 4303 §2) with the AEADs of RFC 4106 and RFC 7634.
//!
//! ```text
//!    0        4          8        16                                        n-16     n
//!    │ SPI    │ sequence │ IV     │ inner packet │ 1 2 3… │ pad │ next │ ICV        │
//!    │        │ (low 32) │        │              │ padding│ len │ head.│            │
//!    └─ associated data ─┘        └──────────── encrypted ────────────┘
//! ```

use crate::aead::ICV_BYTES;

/// Bytes of SPI and sequence number.
pub const HEADER_BYTES: usize = 8;
/// Bytes of IV behind it: the same for all suites.
pub const IV_BYTES: usize = 8;
/// Bytes before what is encrypted.
pub const BEFORE_PAYLOAD_BYTES: usize = HEADER_BYTES + IV_BYTES;
/// Bytes of pad length and next header.
pub const TRAILER_BYTES: usize = 2;

/// One whole ESP packet, still sealed.
#[derive(Clone, Copy, Debug)]
pub struct Esp<'a> {
    fixed: &'a [u8; BEFORE_PAYLOAD_BYTES],
    encrypted_bytes: usize,
}

impl<'a> Esp<'a> {
    /// Refuses what is too short for header, IV, trailer and ICV, and encrypted parts that are no
    /// multiple of four bytes (RFC 4303 §2.4).
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let encrypted_bytes = bytes.len().checked_sub(BEFORE_PAYLOAD_BYTES + ICV_BYTES)?;
        if encrypted_bytes < TRAILER_BYTES || !encrypted_bytes.is_multiple_of(4) {
            return None;
        }
        Some(Self {
            fixed: bytes.first_chunk()?,
            encrypted_bytes,
        })
    }

    /// The SPI.
    #[inline]
    pub fn spi(&self) -> u32 {
        let [a, b, c, d, ..] = *self.fixed;
        u32::from_be_bytes([a, b, c, d])
    }

    /// The low 32 bits of the sequence number.
    #[inline]
    pub fn sequence_low(&self) -> u32 {
        let [_, _, _, _, a, b, c, d, ..] = *self.fixed;
        u32::from_be_bytes([a, b, c, d])
    }

    /// The IV.
    pub fn iv(&self) -> [u8; IV_BYTES] {
        let [_, _, _, _, _, _, _, _, iv @ ..] = *self.fixed;
        iv
    }

    /// Length of what is encrypted.
    pub fn encrypted_bytes(&self) -> usize {
        self.encrypted_bytes
    }
}

/// The SPI with which `bytes` begin, reserved or not.
#[inline]
pub fn spi(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|spi| u32::from_be_bytes(*spi))
}
