//! Netlink's frames: messages, attributes, and a builder of them. Knows XFRM's numbers, not its meaning.
//!
//! Everything is in the machine's byte order, except SPIs and ports, which are in the network's.

use std::{fmt, net::IpAddr};
use zeroize::Zeroizing;

/// Bytes of `struct nlmsghdr`.
pub const HEADER_BYTES: usize = 16;

/// Types of messages: `NLMSG_*` and `XFRM_MSG_*`.
pub mod kind {
    #![allow(missing_docs)]
    pub const ERROR: u16 = 2;
    pub const DONE: u16 = 3;
    pub const NEWSA: u16 = 0x10;
    pub const DELSA: u16 = 0x11;
    pub const GETSA: u16 = 0x12;
    pub const NEWPOLICY: u16 = 0x13;
    pub const DELPOLICY: u16 = 0x14;
    pub const GETPOLICY: u16 = 0x15;
    pub const ALLOCSPI: u16 = 0x16;
    pub const ACQUIRE: u16 = 0x17;
    pub const EXPIRE: u16 = 0x18;
    pub const UPDPOLICY: u16 = 0x19;
    pub const UPDSA: u16 = 0x1a;
    pub const POLEXPIRE: u16 = 0x1b;
    pub const FLUSHSA: u16 = 0x1c;
    pub const FLUSHPOLICY: u16 = 0x1d;
    pub const NEWAE: u16 = 0x1e;
    pub const GETAE: u16 = 0x1f;
    pub const MIGRATE: u16 = 0x21;
    pub const NEWSADINFO: u16 = 0x22;
    pub const GETSADINFO: u16 = 0x23;
    pub const NEWSPDINFO: u16 = 0x24;
    pub const GETSPDINFO: u16 = 0x25;
    pub const MAPPING: u16 = 0x26;
    pub const SETDEFAULT: u16 = 0x27;
    pub const GETDEFAULT: u16 = 0x28;
}

/// `NLM_F_*`.
pub mod flag {
    #![allow(missing_docs)]
    pub const REQUEST: u16 = 1;
    pub const MULTI: u16 = 2;
    pub const ACK: u16 = 4;
    pub const REPLACE: u16 = 0x100;
    pub const DUMP: u16 = 0x300;
    /// Of `NLMSG_ERROR`: the message it answers is not repeated.
    pub const CAPPED: u16 = 0x100;
}

/// `XFRMA_*`.
pub mod attribute {
    #![allow(missing_docs)]
    pub const ALG_AUTH: u16 = 1;
    pub const ALG_CRYPT: u16 = 2;
    pub const ALG_COMP: u16 = 3;
    pub const ENCAP: u16 = 4;
    pub const TMPL: u16 = 5;
    pub const SA: u16 = 6;
    pub const LTIME_VAL: u16 = 9;
    pub const REPLAY_VAL: u16 = 10;
    pub const LASTUSED: u16 = 15;
    pub const ALG_AEAD: u16 = 18;
    pub const ALG_AUTH_TRUNC: u16 = 20;
    pub const MARK: u16 = 21;
    pub const REPLAY_ESN_VAL: u16 = 23;
    pub const SA_EXTRA_FLAGS: u16 = 24;
    pub const IF_ID: u16 = 31;
    pub const SA_DIR: u16 = 33;
    /// Of `NEWSPDINFO`, which counts its attributes anew.
    pub const SPD_IPV4_THRESHOLD: u16 = 3;
    pub const SPD_IPV6_THRESHOLD: u16 = 4;
}

/// `XFRMNLGRP_*`: what can be subscribed to.
pub mod group {
    #![allow(missing_docs)]
    pub const ACQUIRE: u32 = 1;
    pub const EXPIRE: u32 = 2;
    pub const SA: u32 = 3;
    pub const MAPPING: u32 = 8;
}

/// Bytes of the fixed parts, `struct xfrm_*`.
pub mod size {
    #![allow(missing_docs)]
    pub const SELECTOR: usize = 56;
    pub const USERSA_INFO: usize = 224;
    pub const USERSA_ID: usize = 24;
    pub const USERSPI_INFO: usize = 232;
    pub const USER_EXPIRE: usize = 232;
    pub const USER_ACQUIRE: usize = 280;
    pub const USERPOLICY_INFO: usize = 168;
    pub const USERPOLICY_ID: usize = 64;
    pub const USER_TMPL: usize = 64;
    pub const USER_MAPPING: usize = 64;
    pub const AEVENT_ID: usize = 48;
    pub const ALGORITHM_NAME: usize = 64;
    pub const REPLAY_ESN: usize = 24;
}

/// `AF_INET`.
pub const FAMILY_V4: u16 = 2;
/// `AF_INET6`.
pub const FAMILY_V6: u16 = 10;
/// `IPPROTO_ESP`.
pub const PROTO_ESP: u8 = 50;
/// `XFRM_STATE_ESN`, a flag of `xfrm_usersa_info`.
pub const STATE_ESN: u8 = 128;
/// `XFRM_INF`: no limit.
pub const UNLIMITED: u64 = u64::MAX;

/// Why bytes are no message of the kernel's. Never holds a byte of the message: it may be a key's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A part ends before it should.
    #[error("{part} has {got} bytes, but needs {needed}")]
    Short {
        /// Which part.
        part: &'static str,
        /// What is needed.
        needed: usize,
        /// What is there.
        got: usize,
    },
    /// A length field points past the end, or is less than its own header.
    #[error("{part} says it has {said} bytes, but {got} are there")]
    Length {
        /// Which part.
        part: &'static str,
        /// What it says.
        said: usize,
        /// What is there.
        got: usize,
    },
    /// Neither IPv4 nor IPv6.
    #[error("the address family {0} is neither IPv4 (2) nor IPv6 (10)")]
    Family(u16),
    /// A value out of its range.
    #[error("{part} holds {value}, which it cannot")]
    Value {
        /// Which part.
        part: &'static str,
        /// What it holds.
        value: u64,
    },
}

/// One netlink message, borrowed from what was received. `Debug` prints no body: there are keys in it.
#[derive(Clone, Copy)]
pub struct Message<'a> {
    /// Its type.
    pub kind: u16,
    /// Its flags.
    pub flags: u16,
    /// The sequence number that requests and answers share; 0 in events.
    pub sequence: u32,
    /// Whose socket asked.
    pub port: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

impl fmt::Debug for Message<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            flags,
            sequence,
            port,
            body,
        } = self;
        write!(
            f,
            "Message {{ kind: {kind:#x}, flags: {flags:#x}, sequence: {sequence}, port: {port}, "
        )?;
        write!(f, "body: [redacted; {} bytes] }}", body.len())
    }
}

/// The messages of one datagram, in order; ends after the first bad one.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, WireError>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let one = take_message(&mut datagram);
        if one.is_err() {
            datagram = &[];
        }
        Some(one)
    })
}

fn take_message<'a>(rest: &mut &'a [u8]) -> Result<Message<'a>, WireError> {
    let part = "a netlink message";
    let bytes = *rest;
    need(part, bytes, HEADER_BYTES)?;
    let said = u32_at(bytes, 0) as usize;
    let got = bytes.len();
    if !(HEADER_BYTES..=got).contains(&said) {
        return Err(WireError::Length { part, said, got });
    }
    *rest = &bytes[said.next_multiple_of(4).min(got)..];
    Ok(Message {
        kind: u16_at(bytes, 4),
        flags: u16_at(bytes, 6),
        sequence: u32_at(bytes, 8),
        port: u32_at(bytes, 12),
        body: &bytes[HEADER_BYTES..said],
    })
}

/// One attribute: its type without the flags of nesting, and its value.
pub type Attribute<'a> = (u16, &'a [u8]);

/// The attributes behind a message's fixed part, in order; ends after the first bad one.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Result<Attribute<'_>, WireError>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let one = take_attribute(&mut bytes);
        if one.is_err() {
            bytes = &[];
        }
        Some(one)
    })
}

fn take_attribute<'a>(rest: &mut &'a [u8]) -> Result<Attribute<'a>, WireError> {
    let part = "an attribute";
    let bytes = *rest;
    need(part, bytes, 4)?;
    let said = usize::from(u16_at(bytes, 0));
    let got = bytes.len();
    if !(4..=got).contains(&said) {
        return Err(WireError::Length { part, said, got });
    }
    *rest = &bytes[said.next_multiple_of(4).min(got)..];
    Ok((u16_at(bytes, 2) & 0x3fff, &bytes[4..said]))
}

/// Refuses fewer than `needed` bytes. The readers below are for bytes that have passed here.
pub fn need(part: &'static str, bytes: &[u8], needed: usize) -> Result<(), WireError> {
    let got = bytes.len();
    match got < needed {
        true => Err(WireError::Short { part, needed, got }),
        false => Ok(()),
    }
}

/// The `N` bytes at `at`.
pub fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// A number in the machine's order.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(array_at(bytes, at))
}

/// A number in the machine's order.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(array_at(bytes, at))
}

/// A number in the machine's order.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(array_at(bytes, at))
}

/// An `xfrm_address_t`.
pub fn address_at(bytes: &[u8], at: usize, family: u16) -> Result<IpAddr, WireError> {
    match family {
        FAMILY_V4 => Ok(IpAddr::from(array_at::<4>(bytes, at))),
        FAMILY_V6 => Ok(IpAddr::from(array_at::<16>(bytes, at))),
        other => Err(WireError::Family(other)),
    }
}

/// An address' family.
pub fn family_of(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(_) => FAMILY_V4,
        IpAddr::V6(_) => FAMILY_V6,
    }
}

/// Writes an `xfrm_address_t`; the rest of its 16 bytes becomes zero.
pub fn put_address(bytes: &mut [u8], at: usize, address: IpAddr) {
    let field = &mut bytes[at..at + 16];
    field.fill(0);
    match address {
        IpAddr::V4(v4) => field[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => field.copy_from_slice(&v6.octets()),
    }
}

/// Writes the bytes at `at`.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// One message being written. Wiped when dropped: there may be keys in it.
pub struct Builder(Zeroizing<Vec<u8>>);

impl Builder {
    /// Room for any message made here, so that no copy of a key stays behind in outgrown memory.
    const CAPACITY: usize = 4096;

    /// Begins with the header and a fixed part.
    pub fn new(kind: u16, flags: u16, sequence: u32, fixed: &[u8]) -> Self {
        let mut bytes = Zeroizing::new(Vec::with_capacity(
            Self::CAPACITY.max(2 * (HEADER_BYTES + fixed.len())),
        ));
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    /// Says whose socket it answers.
    #[must_use]
    pub fn port(mut self, port: u32) -> Self {
        put(&mut self.0, 12, &port.to_ne_bytes());
        self
    }

    /// Adds an attribute.
    #[must_use]
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.pad();
        let length = (4 + value.len()) as u16; // values are a few hundred bytes at most
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self
    }

    /// The message.
    pub fn finish(mut self) -> Zeroizing<Vec<u8>> {
        let length = self.0.len() as u32;
        put(&mut self.0, 0, &length.to_ne_bytes());
        self.pad();
        self.0
    }

    fn pad(&mut self) {
        while !self.0.len().is_multiple_of(4) {
            self.0.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        let bytes = Builder::new(kind::NEWSA, flag::ACK, 7, &[1; 8])
            .port(9)
            .attribute(attribute::MARK, &[2; 5])
            .attribute(attribute::IF_ID, &[3; 4])
            .finish();
        let two = [&bytes[..], &bytes[..]].concat();
        let read: Vec<_> = messages(&two).map(Result::unwrap).collect();
        assert_eq!(read.len(), 2);
        for message in read {
            assert_eq!((message.kind, message.flags), (kind::NEWSA, flag::ACK));
            assert_eq!((message.sequence, message.port), (7, 9));
            let attributes: Vec<_> = attributes(&message.body[8..]).map(Result::unwrap).collect();
            assert_eq!(
                attributes,
                [
                    (attribute::MARK, &[2; 5][..]),
                    (attribute::IF_ID, &[3; 4][..])
                ]
            );
        }
    }

    #[test]
    fn lengths_that_lie_end_the_reading() {
        let good = Builder::new(kind::NEWSA, 0, 0, &[]).finish();
        for said in [0u32, 15, 17, u32::MAX] {
            let mut bad = good.to_vec();
            put(&mut bad, 0, &said.to_ne_bytes());
            let read: Vec<_> = messages(&bad).collect();
            assert!(
                matches!(read[..], [Err(WireError::Length { .. })]),
                "{said}: {read:?}"
            );
        }
        assert!(matches!(
            messages(&good[..9]).next(),
            Some(Err(WireError::Short { .. }))
        ));
        for said in [0u16, 3, 9, u16::MAX] {
            let mut bad = [0; 8];
            put(&mut bad, 0, &said.to_ne_bytes());
            assert!(attributes(&bad).next().unwrap().is_err());
        }
    }

    #[test]
    fn no_body_is_printed() {
        let bytes = Builder::new(kind::NEWSA, 0, 0, b"secretsecret").finish();
        let printed = format!("{:?}", messages(&bytes).next());
        assert!(
            printed.contains("redacted") && !printed.contains("115"),
            "{printed}"
        );
    }
}
