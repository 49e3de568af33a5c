//! SAs in the kernel's layout: `struct xfrm_usersa_info`, `struct xfrm_usersa_id`, and their attributes.

use super::wire::{
    Builder, FAMILY_V4, PROTO_ESP, STATE_ESN, UNLIMITED, WireError, address_at, array_at,
    attribute, attributes, family_of, need, put, put_address, size, u16_at, u32_at, u64_at,
};
use super::{SaKey, XfrmCipher, XfrmEncap, XfrmMode, XfrmSa};
use crate::vici::Mark;
use esplane_api::{AeadSuite, Direction, KeyError, KeyMaterial, Limits, Spi};

/// Where things are in `struct xfrm_usersa_info`.
pub mod at {
    #![allow(missing_docs)]
    pub const DESTINATION: usize = 56;
    pub const SPI: usize = 72;
    pub const PROTO: usize = 76;
    pub const SOURCE: usize = 80;
    pub const LIMITS: usize = 96;
    pub const CARRIED: usize = 160;
    pub const REQID: usize = 208;
    pub const FAMILY: usize = 212;
    pub const MODE: usize = 214;
    pub const WINDOW: usize = 215;
    pub const FLAGS: usize = 216;
}

/// The most packets a replay window can have here: `XFRMA_REPLAY_ESN_MAX` of the kernel, in bits.
const WINDOW_MAX: u32 = 4096 * 8;

/// `XFRM_SA_DIR_IN`, `XFRM_SA_DIR_OUT`.
const DIRECTION_IN: u8 = 1;
const DIRECTION_OUT: u8 = 2;

/// `UDP_ENCAP_ESPINUDP`.
const ENCAP_ESP_IN_UDP: u16 = 2;

/// Reads an SA: `struct xfrm_usersa_info` and attributes. `None` where it is not ESP's, or has no SPI yet.
pub fn parse_sa(body: &[u8]) -> Result<Option<XfrmSa>, WireError> {
    need("xfrm_usersa_info", body, size::USERSA_INFO)?;
    let Ok(spi) = Spi::new(u32::from_be_bytes(array_at(body, at::SPI))) else {
        return Ok(None);
    };
    if body[at::PROTO] != PROTO_ESP {
        return Ok(None);
    }
    let family = u16_at(body, at::FAMILY);
    let (soft, hard) = limits(body);
    let mut sa = XfrmSa {
        key: SaKey {
            destination: address_at(body, at::DESTINATION, family)?,
            spi,
            mark: (0, 0),
        },
        source: address_at(body, at::SOURCE, family)?,
        reqid: u32_at(body, at::REQID),
        mode: match body[at::MODE] {
            0 => XfrmMode::Transport,
            1 => XfrmMode::Tunnel,
            other => XfrmMode::Other(other),
        },
        mark: None,
        if_id: None,
        direction: None,
        cipher: XfrmCipher::Larval,
        esn: body[at::FLAGS] & STATE_ESN != 0,
        window_packets: u32::from(body[at::WINDOW]),
        encap: None,
        soft,
        hard,
        sequence_sent: 0,
        sequence_received: 0,
        packets: u64_at(body, at::CARRIED + 8),
        bytes: u64_at(body, at::CARRIED),
        added_unix_seconds: u64_at(body, at::CARRIED + 16),
    };
    let mut algorithms = Algorithms::default();
    for one in attributes(&body[size::USERSA_INFO..]) {
        let (kind, value) = one?;
        if !algorithms.read(kind, value)? {
            read_attribute(&mut sa, kind, value)?;
        }
    }
    sa.cipher = algorithms.cipher();
    Ok(Some(sa))
}

fn read_attribute(sa: &mut XfrmSa, kind: u16, value: &[u8]) -> Result<(), WireError> {
    match kind {
        attribute::MARK => {
            sa.key.mark = read_mark(value)?;
            let (value, mask) = sa.key.mark;
            sa.mark = (mask != 0).then_some(Mark { value, mask });
        }
        attribute::IF_ID => {
            need("XFRMA_IF_ID", value, 4)?;
            sa.if_id = Some(u32_at(value, 0)).filter(|id| *id != 0);
        }
        attribute::SA_DIR => {
            need("XFRMA_SA_DIR", value, 1)?;
            sa.direction = match value[0] {
                DIRECTION_IN => Some(Direction::Inbound),
                DIRECTION_OUT => Some(Direction::Outbound),
                _ => None,
            };
        }
        attribute::ENCAP => {
            need("XFRMA_ENCAP", value, 6)?;
            sa.encap = Some(XfrmEncap {
                source_port: u16::from_be_bytes(array_at(value, 2)),
                destination_port: u16::from_be_bytes(array_at(value, 4)),
            });
        }
        attribute::REPLAY_VAL => {
            need("XFRMA_REPLAY_VAL", value, 12)?;
            sa.sequence_sent = u32_at(value, 0).into();
            sa.sequence_received = u32_at(value, 4).into();
        }
        attribute::REPLAY_ESN_VAL => {
            let replay = ReplayEsn::read(value)?;
            sa.window_packets = replay.window_packets;
            sa.sequence_sent = replay.sent;
            sa.sequence_received = replay.received;
        }
        // The kernel's own state and what newer kernels add.
        _ => {}
    }
    Ok(())
}

/// `struct xfrm_replay_state_esn`, without its bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayEsn {
    /// The last number sent.
    pub sent: u64,
    /// The highest number received.
    pub received: u64,
    /// The window.
    pub window_packets: u32,
}

impl ReplayEsn {
    /// Reads it; refuses a window that its bitmap cannot hold.
    pub fn read(value: &[u8]) -> Result<Self, WireError> {
        need("XFRMA_REPLAY_ESN_VAL", value, size::REPLAY_ESN)?;
        let bitmap_words = u32_at(value, 0);
        let window_packets = u32_at(value, 20);
        if window_packets > WINDOW_MAX || window_packets > bitmap_words.saturating_mul(32) {
            return Err(WireError::Value {
                part: "the window of XFRMA_REPLAY_ESN_VAL",
                value: window_packets.into(),
            });
        }
        let wide = |low, high| u64::from(u32_at(value, low)) | u64::from(u32_at(value, high)) << 32;
        Ok(Self {
            sent: wide(4, 12),
            received: wide(8, 16),
            window_packets,
        })
    }

    /// Changes the last number sent in the attribute's value; everything else stays.
    pub fn put_sent(value: &mut [u8], sent: u64) {
        put(value, 4, &(sent as u32).to_ne_bytes());
        put(value, 12, &((sent >> 32) as u32).to_ne_bytes());
    }

    /// Changes the highest number received, likewise.
    pub fn put_received(value: &mut [u8], received: u64) {
        put(value, 8, &(received as u32).to_ne_bytes());
        put(value, 16, &((received >> 32) as u32).to_ne_bytes());
    }
}

/// Soft and hard, of `struct xfrm_lifetime_cfg`.
fn limits(body: &[u8]) -> (Limits, Limits) {
    let limit = |index: usize| {
        let value = u64_at(body, at::LIMITS + 8 * index);
        // The kernel ignores zero seconds, and counts to no other zero.
        (value != UNLIMITED && value != 0).then_some(value)
    };
    let set = |soft_or_hard| Limits {
        bytes: limit(soft_or_hard),
        packets: limit(2 + soft_or_hard),
        seconds: limit(4 + soft_or_hard),
    };
    (set(0), set(1))
}

/// The algorithms of one SA, borrowed.
#[derive(Default)]
struct Algorithms<'a> {
    aead: Option<(&'a str, u32, &'a [u8])>,
    others: [Option<&'a str>; 3],
    foreign_encap: Option<u16>,
}

impl<'a> Algorithms<'a> {
    /// Takes an attribute if it names an algorithm.
    fn read(&mut self, kind: u16, value: &'a [u8]) -> Result<bool, WireError> {
        match kind {
            attribute::ALG_AEAD => {
                let (name, key_bits) = algorithm(value)?;
                need("XFRMA_ALG_AEAD", value, 72)?;
                let bytes = key_bits.div_ceil(8) as usize;
                let key = &value[72..];
                need("the key of XFRMA_ALG_AEAD", key, bytes)?;
                self.aead = Some((name, u32_at(value, 68), &key[..bytes]));
            }
            // Its ports are read elsewhere. ESP in TCP (7) is no path of Esplane's.
            attribute::ENCAP => {
                need("XFRMA_ENCAP", value, 2)?;
                let kind = u16_at(value, 0);
                self.foreign_encap = (kind != ENCAP_ESP_IN_UDP).then_some(kind);
                return Ok(false);
            }
            attribute::ALG_CRYPT => self.others[0] = Some(algorithm(value)?.0),
            // The kernel sends both forms; the later names the same.
            attribute::ALG_AUTH | attribute::ALG_AUTH_TRUNC => {
                self.others[1] = Some(algorithm(value)?.0);
            }
            attribute::ALG_COMP => self.others[2] = Some(algorithm(value)?.0),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn cipher(&self) -> XfrmCipher {
        if let Some(kind) = self.foreign_encap {
            return XfrmCipher::Unsupported(format!("encapsulation of type {kind}"));
        }
        let Some((name, icv_bits, key)) = self.aead else {
            let names: Vec<&str> = self.others.into_iter().flatten().collect();
            return match names.is_empty() {
                true => XfrmCipher::Larval,
                false => XfrmCipher::Unsupported(names.join("/")),
            };
        };
        let Some(suite) = suite_of(name, icv_bits, key.len()) else {
            let bits = 8 * key.len();
            return XfrmCipher::Unsupported(format!("{name} (key {bits}, ICV {icv_bits} bits)"));
        };
        match KeyMaterial::new(suite, key) {
            Ok(material) => XfrmCipher::Aead(material),
            Err(KeyError::AllZero) => XfrmCipher::Concealed(suite),
            // suite_of has chosen by the length
            Err(KeyError::Length { .. }) => XfrmCipher::Unsupported(name.to_owned()),
        }
    }
}

/// The name and the key's bits of any `struct xfrm_algo*`.
fn algorithm(value: &[u8]) -> Result<(&str, u32), WireError> {
    need("an algorithm", value, size::ALGORITHM_NAME + 4)?;
    let name = &value[..size::ALGORITHM_NAME];
    let end = name
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(name.len());
    // The kernel's names are ASCII; another is none of Esplane's, and is shown as far as it can be.
    let name = std::str::from_utf8(&name[..end]).unwrap_or("(unreadable)");
    Ok((name, u32_at(value, size::ALGORITHM_NAME)))
}

fn suite_of(name: &str, icv_bits: u32, key_bytes: usize) -> Option<AeadSuite> {
    AeadSuite::ALL.into_iter().find(|suite| {
        name == kernel_name(*suite)
            && icv_bits as usize == 8 * suite.icv_bytes()
            && key_bytes == suite.keying_material_bytes()
    })
}

/// What the kernel calls a suite.
pub fn kernel_name(suite: AeadSuite) -> &'static str {
    match suite {
        AeadSuite::Aes128Gcm16 | AeadSuite::Aes256Gcm16 => "rfc4106(gcm(aes))",
        AeadSuite::ChaCha20Poly1305 => "rfc7539esp(chacha20,poly1305)",
    }
}

/// Reads `XFRMA_MARK`: value and mask.
pub fn read_mark(value: &[u8]) -> Result<(u32, u32), WireError> {
    need("XFRMA_MARK", value, 8)?;
    Ok((u32_at(value, 0), u32_at(value, 4)))
}

/// Reads `struct xfrm_usersa_id` and the mark behind it. `None` where it is not ESP's, or names no SPI.
pub fn parse_key(body: &[u8]) -> Result<Option<SaKey>, WireError> {
    parse_key_before(body, size::USERSA_ID)
}

/// Likewise of a fixed part of `fixed` bytes that begins with a `struct xfrm_usersa_id`.
pub fn parse_key_before(body: &[u8], fixed: usize) -> Result<Option<SaKey>, WireError> {
    need(
        "a part that begins with xfrm_usersa_id",
        body,
        fixed.max(size::USERSA_ID),
    )?;
    let Ok(spi) = Spi::new(u32::from_be_bytes(array_at(body, 16))) else {
        return Ok(None);
    };
    if body[22] != PROTO_ESP {
        return Ok(None);
    }
    Ok(Some(SaKey {
        destination: address_at(body, 0, u16_at(body, 20))?,
        spi,
        mark: find_mark(&body[fixed..])?,
    }))
}

/// The mark among attributes; (0, 0) for none.
pub fn find_mark(attribute_bytes: &[u8]) -> Result<(u32, u32), WireError> {
    Ok(match find(attribute_bytes, attribute::MARK)? {
        Some(value) => read_mark(value)?,
        None => (0, 0),
    })
}

/// The attribute of a kind; the last, where there are several, as the kernel takes it.
pub fn find(attribute_bytes: &[u8], wanted: u16) -> Result<Option<&[u8]>, WireError> {
    let mut found = None;
    for one in attributes(attribute_bytes) {
        let (kind, value) = one?;
        if kind == wanted {
            found = Some(value);
        }
    }
    Ok(found)
}

/// `struct xfrm_usersa_id`.
pub fn usersa_id(key: &SaKey) -> [u8; size::USERSA_ID] {
    let mut id = [0; size::USERSA_ID];
    put_address(&mut id, 0, key.destination);
    put(&mut id, 16, &key.spi.get().to_be_bytes());
    put(&mut id, 20, &family_of(key.destination).to_ne_bytes());
    id[22] = PROTO_ESP;
    id
}

/// Adds the mark, where the SA has one.
pub fn with_mark(builder: Builder, (value, mask): (u32, u32)) -> Builder {
    if mask == 0 && value == 0 {
        return builder;
    }
    let mut bytes = [0; 8];
    put(&mut bytes, 0, &value.to_ne_bytes());
    put(&mut bytes, 4, &mask.to_ne_bytes());
    builder.attribute(attribute::MARK, &bytes)
}

/// Writes an SA as the kernel does: the body of NEWSA.
///
/// For tests, and for whoever plays the kernel.
pub fn build_sa(message: u16, flags: u16, sequence: u32, sa: &XfrmSa) -> Builder {
    let mut info = [0; size::USERSA_INFO];
    put(&mut info, 40, &FAMILY_V4.to_ne_bytes()); // of the selector 0/0; the inner family is not told
    put_address(&mut info, at::DESTINATION, sa.key.destination);
    put(&mut info, at::SPI, &sa.key.spi.get().to_be_bytes());
    info[at::PROTO] = PROTO_ESP;
    put_address(&mut info, at::SOURCE, sa.source);
    let limits = |soft: Option<u64>| soft.unwrap_or(UNLIMITED).to_ne_bytes();
    let seconds = |limit: Option<u64>| limit.unwrap_or(0).to_ne_bytes();
    for (index, limit) in [
        limits(sa.soft.bytes),
        limits(sa.hard.bytes),
        limits(sa.soft.packets),
        limits(sa.hard.packets),
        seconds(sa.soft.seconds),
        seconds(sa.hard.seconds),
    ]
    .iter()
    .enumerate()
    {
        put(&mut info, at::LIMITS + 8 * index, limit);
    }
    put(&mut info, at::CARRIED, &sa.bytes.to_ne_bytes());
    put(&mut info, at::CARRIED + 8, &sa.packets.to_ne_bytes());
    put(
        &mut info,
        at::CARRIED + 16,
        &sa.added_unix_seconds.to_ne_bytes(),
    );
    put(&mut info, at::REQID, &sa.reqid.to_ne_bytes());
    put(
        &mut info,
        at::FAMILY,
        &family_of(sa.key.destination).to_ne_bytes(),
    );
    info[at::MODE] = match sa.mode {
        XfrmMode::Transport => 0,
        XfrmMode::Tunnel => 1,
        XfrmMode::Other(number) => number,
    };
    info[at::FLAGS] = if sa.esn { STATE_ESN } else { 0 };
    let wide = sa.esn || sa.window_packets > 32;
    info[at::WINDOW] = if wide { 0 } else { sa.window_packets as u8 };
    let mut builder = Builder::new(message, flags, sequence, &info);
    builder = with_cipher(builder, &sa.cipher);
    if let Some(encap) = sa.encap {
        let mut value = [0; 24];
        put(&mut value, 0, &ENCAP_ESP_IN_UDP.to_ne_bytes());
        put(&mut value, 2, &encap.source_port.to_be_bytes());
        put(&mut value, 4, &encap.destination_port.to_be_bytes());
        builder = builder.attribute(attribute::ENCAP, &value);
    }
    builder = with_mark(builder, sa.key.mark);
    let (sent, received) = (sa.sequence_sent, sa.sequence_received);
    let (replay, value) = build_replay(sent, received, sa.window_packets, wide);
    builder = builder.attribute(replay, &value);
    if let Some(id) = sa.if_id {
        builder = builder.attribute(attribute::IF_ID, &id.to_ne_bytes());
    }
    match sa.direction {
        Some(Direction::Inbound) => builder.attribute(attribute::SA_DIR, &[DIRECTION_IN]),
        Some(Direction::Outbound) => builder.attribute(attribute::SA_DIR, &[DIRECTION_OUT]),
        None => builder,
    }
}

fn with_cipher(builder: Builder, cipher: &XfrmCipher) -> Builder {
    let XfrmCipher::Aead(material) = cipher else {
        return builder;
    };
    let suite = material.suite();
    let mut value = zeroize::Zeroizing::new([0u8; 72 + 36]);
    let name = kernel_name(suite).as_bytes();
    value[..name.len()].copy_from_slice(name);
    let bytes = suite.keying_material_bytes();
    put(&mut value[..], 64, &(8 * bytes as u32).to_ne_bytes());
    put(
        &mut value[..],
        68,
        &(8 * suite.icv_bytes() as u32).to_ne_bytes(),
    );
    put(&mut value[..], 72, material.dangerous_key());
    put(
        &mut value[..],
        72 + suite.key_bytes(),
        &material.dangerous_salt(),
    );
    builder.attribute(attribute::ALG_AEAD, &value[..72 + bytes])
}

/// The replay state of an SA: attribute and value.
pub fn build_replay(sent: u64, received: u64, window_packets: u32, wide: bool) -> (u16, Vec<u8>) {
    if !wide {
        let mut value = vec![0; 12];
        put(&mut value, 0, &(sent as u32).to_ne_bytes());
        put(&mut value, 4, &(received as u32).to_ne_bytes());
        return (attribute::REPLAY_VAL, value);
    }
    let words = window_packets.div_ceil(32);
    let mut value = vec![0; size::REPLAY_ESN + 4 * words as usize];
    put(&mut value, 0, &words.to_ne_bytes());
    put(&mut value, 20, &window_packets.to_ne_bytes());
    ReplayEsn::put_sent(&mut value, sent);
    ReplayEsn::put_received(&mut value, received);
    (attribute::REPLAY_ESN_VAL, value)
}
