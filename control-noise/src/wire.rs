//! Every byte that comes from outside is read here, with its length checked before its meaning.
//!
//! ```text
//!           0               1               2               3
//!          +---------------+---------------+---------------+---------------+
//!   (-4)   |          non-ESP marker: four zero bytes (RFC 3948 §2.2)      |
//!          +---------------+---------------+---------------+---------------+
//!     0    |      'E'      |      's'      |      'p'      |      'l'      |
//!     4    |     type      |    version    | length of the whole message   |
//!     8    |    index: 1 the sender's choice; 2, 3 the same, given back    |
//!    12    |                 zero (8 bytes; where an IKE header has        |
//!    16    |                 "next payload" and its version)               |
//!          +---------------+---------------+---------------+---------------+
//!    20    |   1 initiation:   Noise e, s, payload · MAC1 16 · MAC2 16     |
//!          |   2 response:     Noise e, payload    · MAC1 16               |
//!          |   3 cookie reply: nonce 24 · sealed cookie 32                 |
//!          +---------------------------------------------------------------+
//! ```
//! The payloads inside Noise are fields of type (1 byte, the high bit says *critical*), length (2
//! bytes, big-endian) and value, in any order, each at most once. An unknown field is skipped, unless
//! it is critical: then the message is refused.

use crate::{Disagreement, KemPolicy, keys::KEY_BYTES};
use esplane_api::{AeadSuite, DropReason, Esn, Spi};
use std::{collections::BTreeSet, time::Duration};

/// Four zero bytes where ESP has its SPI (RFC 3948 §2.2).
pub(crate) const MARKER: [u8; 4] = [0; 4];
pub(crate) const MAGIC: [u8; 4] = *b"Espl";
pub(crate) const VERSION: u8 = 1;
pub(crate) const HEADER_BYTES: usize = 20;
pub(crate) const MAC_BYTES: usize = 16;
pub(crate) const COOKIE_BYTES: usize = 16;
pub(crate) const COOKIE_NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
/// Noise message 1 without its payload: e, encrypted s, tag of the payload.
const INITIATION_NOISE_BYTES: usize = KEY_BYTES + KEY_BYTES + TAG_BYTES + TAG_BYTES;
/// Noise message 2 without its payload: e, tag of the payload.
const RESPONSE_NOISE_BYTES: usize = KEY_BYTES + TAG_BYTES;
/// Messages longer than this are not ours: room for every extension that fits an Ethernet frame.
pub(crate) const LONGEST: usize = 1472;
const MOST_SUITES: usize = 16;
/// SAs in one direction that one handshake makes: with their SPIs message 1 still fits an MTU of 1500.
pub(crate) const MOST_SAS: usize = 16;

const TYPE_INITIATION: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
const TYPE_COOKIE_REPLY: u8 = 3;

/// A message as it lies in the datagram, lengths checked, nothing authenticated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    Initiation(Initiation<'a>),
    Response(Response<'a>),
    CookieReply(CookieReply<'a>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Initiation<'a> {
    /// The sender's name for this handshake, to be given back.
    pub index: u32,
    pub header: &'a [u8],
    pub noise: &'a [u8],
    /// Header and Noise message: what MAC1 covers.
    pub under_mac1: &'a [u8],
    pub mac1: &'a [u8],
    /// All before it: what MAC2 covers.
    pub under_mac2: &'a [u8],
    pub mac2: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Response<'a> {
    /// Our name for this handshake.
    pub index: u32,
    pub noise: &'a [u8],
    pub under_mac1: &'a [u8],
    pub mac1: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CookieReply<'a> {
    /// Our name for this handshake.
    pub index: u32,
    pub nonce: &'a [u8; COOKIE_NONCE_BYTES],
    pub sealed: &'a [u8; COOKIE_BYTES + TAG_BYTES],
}

impl<'a> Message<'a> {
    /// Reads what comes after the non-ESP marker.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let malformed = DropReason::HandshakeMalformed;
        let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(malformed);
        };
        if header[..4] != MAGIC || bytes.len() > LONGEST {
            return Err(malformed);
        }
        if header[5] != VERSION {
            return Err(DropReason::HandshakeVersion);
        }
        let length = usize::from(u16::from_be_bytes([header[6], header[7]]));
        if length != bytes.len() || header[12..].iter().any(|byte| *byte != 0) {
            return Err(malformed);
        }
        let index = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
        match header[4] {
            TYPE_INITIATION if body.len() >= INITIATION_NOISE_BYTES + 2 * MAC_BYTES => {
                let (under_mac2, mac2) = bytes.split_at(bytes.len() - MAC_BYTES);
                let (under_mac1, mac1) = under_mac2.split_at(under_mac2.len() - MAC_BYTES);
                let noise = &under_mac1[HEADER_BYTES..];
                Ok(Self::Initiation(Initiation {
                    index,
                    header,
                    noise,
                    under_mac1,
                    mac1,
                    under_mac2,
                    mac2,
                }))
            }
            TYPE_RESPONSE if body.len() >= RESPONSE_NOISE_BYTES + MAC_BYTES => {
                let (under_mac1, mac1) = bytes.split_at(bytes.len() - MAC_BYTES);
                let noise = &under_mac1[HEADER_BYTES..];
                Ok(Self::Response(Response {
                    index,
                    noise,
                    under_mac1,
                    mac1,
                }))
            }
            TYPE_COOKIE_REPLY => {
                let (nonce, sealed) = body.split_first_chunk().ok_or(malformed)?;
                let sealed = sealed.try_into().map_err(|_| malformed)?;
                Ok(Self::CookieReply(CookieReply {
                    index,
                    nonce,
                    sealed,
                }))
            }
            _ => Err(malformed),
        }
    }
}

/// The header of an initiation whose payload has `payload_bytes`; the Noise prologue covers it.
pub(crate) fn initiation_header(index: u32, payload_bytes: usize) -> [u8; HEADER_BYTES] {
    header(
        TYPE_INITIATION,
        index,
        INITIATION_NOISE_BYTES + payload_bytes + 2 * MAC_BYTES,
    )
}

/// The header of a response whose payload has `payload_bytes`.
pub(crate) fn response_header(index: u32, payload_bytes: usize) -> [u8; HEADER_BYTES] {
    header(
        TYPE_RESPONSE,
        index,
        RESPONSE_NOISE_BYTES + payload_bytes + MAC_BYTES,
    )
}

/// A whole cookie reply.
pub(crate) fn cookie_reply(index: u32, nonce: &[u8; COOKIE_NONCE_BYTES], sealed: &[u8]) -> Vec<u8> {
    let mut message = header(TYPE_COOKIE_REPLY, index, nonce.len() + sealed.len()).to_vec();
    message.extend_from_slice(nonce);
    message.extend_from_slice(sealed);
    message
}

fn header(kind: u8, index: u32, body_bytes: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4] = kind;
    header[5] = VERSION;
    header[6..8].copy_from_slice(&((HEADER_BYTES + body_bytes) as u16).to_be_bytes());
    header[8..12].copy_from_slice(&index.to_be_bytes());
    header
}

/// When a handshake was started, by its initiator's clock: seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Timestamp {
    seconds: u64,
    nanoseconds: u32,
}

impl Timestamp {
    /// The clock's time, or just after `last` where the clock has not moved on or was set back.
    pub(crate) fn after(last: Option<Self>, unix: Duration) -> Self {
        let clock = Self {
            seconds: unix.as_secs(),
            nanoseconds: unix.subsec_nanos(),
        };
        match last {
            Some(last) if last >= clock => last.next(),
            _ => clock,
        }
    }

    /// Whether it is older than a packet that the network has delayed or doubled could be.
    pub(crate) fn is_long_before(self, newest: Self) -> bool {
        newest.seconds.saturating_sub(self.seconds) > 5
    }

    fn next(self) -> Self {
        match self.nanoseconds {
            999_999_999.. => Self {
                seconds: self.seconds.saturating_add(1),
                nanoseconds: 0,
            },
            nanoseconds => Self {
                nanoseconds: nanoseconds + 1,
                ..self
            },
        }
    }
}

/// The inbound SPIs of one end, all different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spis {
    /// Of the fallback SA.
    pub first: Spi,
    /// Of those for single workers (RFC 9611), fewer than [`MOST_SAS`].
    pub more: Vec<Spi>,
}

impl Spis {
    /// All of them, the fallback SA's first.
    pub(crate) fn all(&self) -> impl Iterator<Item = Spi> + '_ {
        std::iter::once(self.first).chain(self.more.iter().copied())
    }

    fn put(&self, out: &mut Vec<u8>) {
        put(out, FIELD_SPI, &self.first.get().to_be_bytes());
        let more = self.more.iter().flat_map(|spi| spi.get().to_be_bytes());
        let more: Vec<u8> = more.collect();
        if !more.is_empty() {
            put(out, FIELD_MORE_SPIS, &more);
        }
    }

    fn of_fields(first: Option<Spi>, more: Option<Vec<Spi>>) -> Result<Self, PayloadError> {
        let spis = Self {
            first: first.ok_or(PayloadError::Malformed)?,
            more: more.unwrap_or_default(),
        };
        let different: BTreeSet<Spi> = spis.all().collect();
        if different.len() == 1 + spis.more.len() {
            Ok(spis)
        } else {
            Err(PayloadError::Malformed)
        }
    }
}

/// What travels encrypted in message 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub timestamp: Timestamp,
    /// What the initiator wants to receive with.
    pub spis: Spis,
    /// In the initiator's order; those that this version knows.
    pub suites: Vec<AeadSuite>,
    pub esn: Esn,
    pub window_packets: Option<u32>,
    pub kem: KemPolicy,
    /// The ephemeral encapsulation key; empty with [`KemPolicy::Off`].
    pub kem_key: Vec<u8>,
}

/// What travels encrypted in message 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Accepted {
        /// What the responder wants to receive with.
        spis: Spis,
        suite: AeadSuite,
        window_packets: Option<u32>,
        /// Empty with [`KemPolicy::Off`].
        kem_ciphertext: Vec<u8>,
    },
    Refused(Disagreement),
}

/// Why an authentic payload cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PayloadError {
    /// Truncated, doubled, missing or of a wrong length.
    Malformed,
    /// A critical field or a value that this version does not know.
    Unknown,
}

const CRITICAL: u8 = 0x80;
const FIELD_TIMESTAMP: u8 = 0x81;
const FIELD_SPI: u8 = 0x82;
const FIELD_SUITES: u8 = 0x83;
const FIELD_ESN: u8 = 0x84;
const FIELD_KEM: u8 = 0x85;
const FIELD_REFUSED: u8 = 0x86;
const FIELD_WINDOW: u8 = 0x07;
const FIELD_MORE_SPIS: u8 = 0x08;

impl Offer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut timestamp = self.timestamp.seconds.to_be_bytes().to_vec();
        timestamp.extend_from_slice(&self.timestamp.nanoseconds.to_be_bytes());
        put(&mut out, FIELD_TIMESTAMP, &timestamp);
        self.spis.put(&mut out);
        let suites: Vec<u8> = self
            .suites
            .iter()
            .map(|suite| suite_number(*suite))
            .collect();
        put(&mut out, FIELD_SUITES, &suites);
        put(&mut out, FIELD_ESN, &[esn_number(self.esn)]);
        if let Some(window) = self.window_packets {
            put(&mut out, FIELD_WINDOW, &window.to_be_bytes());
        }
        let mut kem = vec![kem_number(self.kem)];
        kem.extend_from_slice(&self.kem_key);
        put(&mut out, FIELD_KEM, &kem);
        out
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, PayloadError> {
        let (mut timestamp, mut spi, mut more_spis, mut suites) = (None, None, None, None);
        let (mut esn, mut window_packets, mut kem) = (None, None, None);
        for field in Fields(bytes) {
            let (kind, value) = field?;
            match kind {
                FIELD_TIMESTAMP => once(&mut timestamp, parse_timestamp(value)?)?,
                FIELD_SPI => once(&mut spi, parse_spi(value)?)?,
                FIELD_MORE_SPIS => once(&mut more_spis, parse_spis(value)?)?,
                FIELD_SUITES => once(&mut suites, parse_suites(value)?)?,
                FIELD_ESN => once(&mut esn, parse_esn(value)?)?,
                FIELD_WINDOW => once(&mut window_packets, parse_u32(value)?)?,
                FIELD_KEM => once(&mut kem, parse_kem_key(value)?)?,
                unknown => skip(unknown)?,
            }
        }
        let (kem, kem_key) = kem.ok_or(PayloadError::Malformed)?;
        Ok(Self {
            timestamp: timestamp.ok_or(PayloadError::Malformed)?,
            spis: Spis::of_fields(spi, more_spis)?,
            suites: suites.ok_or(PayloadError::Malformed)?,
            esn: esn.ok_or(PayloadError::Malformed)?,
            window_packets,
            kem,
            kem_key,
        })
    }
}

impl Answer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Accepted {
                spis,
                suite,
                window_packets,
                kem_ciphertext,
            } => {
                spis.put(&mut out);
                put(&mut out, FIELD_SUITES, &[suite_number(*suite)]);
                if let Some(window) = window_packets {
                    put(&mut out, FIELD_WINDOW, &window.to_be_bytes());
                }
                put(&mut out, FIELD_KEM, kem_ciphertext);
            }
            Self::Refused(why) => put(&mut out, FIELD_REFUSED, &[disagreement_number(*why)]),
        }
        out
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, PayloadError> {
        let (mut spi, mut more_spis, mut suite, mut window_packets) = (None, None, None, None);
        let (mut kem_ciphertext, mut refused) = (None, None);
        for field in Fields(bytes) {
            let (kind, value) = field?;
            match kind {
                FIELD_SPI => once(&mut spi, parse_spi(value)?)?,
                FIELD_MORE_SPIS => once(&mut more_spis, parse_spis(value)?)?,
                FIELD_SUITES => once(&mut suite, parse_suite(value)?)?,
                FIELD_WINDOW => once(&mut window_packets, parse_u32(value)?)?,
                FIELD_KEM => once(&mut kem_ciphertext, value.to_vec())?,
                FIELD_REFUSED => once(&mut refused, parse_disagreement(value)?)?,
                unknown => skip(unknown)?,
            }
        }
        if let Some(why) = refused {
            return Ok(Self::Refused(why));
        }
        Ok(Self::Accepted {
            spis: Spis::of_fields(spi, more_spis)?,
            suite: suite.ok_or(PayloadError::Malformed)?,
            window_packets,
            kem_ciphertext: kem_ciphertext.ok_or(PayloadError::Malformed)?,
        })
    }
}

/// The number of a suite on the wire and in the key schedule.
pub(crate) const fn suite_number(suite: AeadSuite) -> u8 {
    match suite {
        AeadSuite::Aes128Gcm16 => 1,
        AeadSuite::Aes256Gcm16 => 2,
        AeadSuite::ChaCha20Poly1305 => 3,
    }
}

/// The number of a KEM on the wire and in the key schedule.
pub(crate) const fn kem_number(kem: KemPolicy) -> u8 {
    match kem {
        KemPolicy::Off => 0,
        KemPolicy::MlKem512 => 1,
        KemPolicy::MlKem768 => 2,
    }
}

/// The number of an ESN setting on the wire and in the key schedule.
pub(crate) const fn esn_number(esn: Esn) -> u8 {
    match esn {
        Esn::Off => 0,
        Esn::On => 1,
    }
}

const fn disagreement_number(why: Disagreement) -> u8 {
    match why {
        Disagreement::Suites => 1,
        Disagreement::Esn => 2,
        Disagreement::Kem => 3,
        Disagreement::Unknown => 255,
    }
}

fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&(value.len() as u16).to_be_bytes());
    out.extend_from_slice(value);
}

/// Walks type, length, value.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u8, &'a [u8]), PayloadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&kind, rest) = self.0.split_first()?;
        let field = rest.split_first_chunk().and_then(|(length, rest)| {
            rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
        });
        let Some((value, rest)) = field else {
            self.0 = &[];
            return Some(Err(PayloadError::Malformed));
        };
        self.0 = rest;
        Some(Ok((kind, value)))
    }
}

fn once<T>(slot: &mut Option<T>, value: T) -> Result<(), PayloadError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(PayloadError::Malformed),
    }
}

fn skip(kind: u8) -> Result<(), PayloadError> {
    if kind & CRITICAL == 0 {
        Ok(())
    } else {
        Err(PayloadError::Unknown)
    }
}

fn parse_u32(value: &[u8]) -> Result<u32, PayloadError> {
    value
        .try_into()
        .map(u32::from_be_bytes)
        .map_err(|_| PayloadError::Malformed)
}

fn parse_spi(value: &[u8]) -> Result<Spi, PayloadError> {
    Spi::new(parse_u32(value)?).map_err(|_| PayloadError::Malformed)
}

fn parse_spis(value: &[u8]) -> Result<Vec<Spi>, PayloadError> {
    if value.is_empty() || value.len() / 4 >= MOST_SAS {
        return Err(PayloadError::Malformed);
    }
    value.chunks(4).map(parse_spi).collect()
}

fn parse_timestamp(value: &[u8]) -> Result<Timestamp, PayloadError> {
    let (seconds, rest) = value.split_first_chunk().ok_or(PayloadError::Malformed)?;
    let timestamp = Timestamp {
        seconds: u64::from_be_bytes(*seconds),
        nanoseconds: parse_u32(rest)?,
    };
    if timestamp.nanoseconds > 999_999_999 {
        return Err(PayloadError::Malformed);
    }
    Ok(timestamp)
}

/// Numbers that we do not know are suites that we do not have: not chosen, not an error.
fn parse_suites(value: &[u8]) -> Result<Vec<AeadSuite>, PayloadError> {
    if value.is_empty() || value.len() > MOST_SUITES {
        return Err(PayloadError::Malformed);
    }
    let known = |number: &u8| {
        AeadSuite::ALL
            .into_iter()
            .find(|suite| suite_number(*suite) == *number)
    };
    Ok(value.iter().filter_map(known).collect())
}

fn parse_suite(value: &[u8]) -> Result<AeadSuite, PayloadError> {
    match (value.len(), parse_suites(value)?.first()) {
        (1, Some(suite)) => Ok(*suite),
        (1, None) => Err(PayloadError::Unknown),
        _ => Err(PayloadError::Malformed),
    }
}

fn parse_esn(value: &[u8]) -> Result<Esn, PayloadError> {
    match value {
        [0] => Ok(Esn::Off),
        [1] => Ok(Esn::On),
        _ => Err(PayloadError::Malformed),
    }
}

fn parse_kem_key(value: &[u8]) -> Result<(KemPolicy, Vec<u8>), PayloadError> {
    let (number, key) = value.split_first().ok_or(PayloadError::Malformed)?;
    let kem = [KemPolicy::Off, KemPolicy::MlKem512, KemPolicy::MlKem768]
        .into_iter()
        .find(|kem| kem_number(*kem) == *number)
        .ok_or(PayloadError::Unknown)?;
    Ok((kem, key.to_vec()))
}

fn parse_disagreement(value: &[u8]) -> Result<Disagreement, PayloadError> {
    let [number] = value else {
        return Err(PayloadError::Malformed);
    };
    let known = [Disagreement::Suites, Disagreement::Esn, Disagreement::Kem];
    let why = known
        .into_iter()
        .find(|why| disagreement_number(*why) == *number);
    Ok(why.unwrap_or(Disagreement::Unknown))
}

#[cfg(test)]
mod tests;
