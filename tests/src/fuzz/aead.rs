//! The AEAD's kernels: a run of packets of any sizes, places, numbers, and keys. Each implementation must seal as the portable
//! one does, touch nothing beside the packets, open what it has sealed, and refuse what was changed.

use esplane_api::{AeadSuite, Esn};
use esplane_dataplane::{
    Aead, AeadKey, Arena,
    aead::{Done, ICV_BYTES, Job, Keyed},
};
use std::{ops::Range, sync::Once};

/// AVX-512 against the portable implementation.
pub fn aead_avx512(data: &[u8]) {
    against_portable("avx512", data);
}

/// VAES on 256 bits against the portable implementation.
pub fn aead_vaes256(data: &[u8]) {
    against_portable("vaes256", data);
}

/// AES-NI against the portable implementation.
pub fn aead_aesni(data: &[u8]) {
    against_portable("aesni", data);
}

/// The portable implementation with itself.
pub fn aead_portable(data: &[u8]) {
    against_portable("portable", data);
}

const PACKETS_MAX: usize = 12;
const PAYLOAD_BYTES_MAX: u16 = 2100;
/// Each with and without extended numbers.
const KEYS: usize = 6;
/// SPI, number, IV.
const HEADER_BYTES: usize = 16;

/// A run as the input spells it: which packet and bit to break, how many packets, then those.
struct Run {
    arena: Vec<u8>,
    packets: Vec<Packet>,
    broken: usize,
}

struct Packet {
    key: usize,
    header: [u8; HEADER_BYTES],
    job: Job,
}

impl Packet {
    fn payload(&self) -> Range<usize> {
        self.job.start as usize..(self.job.start + self.job.bytes) as usize
    }
}

fn against_portable(name: &'static str, data: &[u8]) {
    static LACKING: Once = Once::new();
    let aead = match Aead::named(name) {
        Ok(aead) => aead,
        Err(error) => {
            LACKING.call_once(|| eprintln!("NOT RUN: {error}"));
            return;
        }
    };
    let Some((secrets, rest)) = data.split_at_checked(32) else {
        return;
    };
    let Some(run) = Run::spelled(rest) else {
        return;
    };
    let keys = |aead| -> Vec<AeadKey> { (0..KEYS).map(|i| key(aead, i, secrets)).collect() };
    let (ours, oracle) = (keys(aead), keys(Aead::portable()));

    let count = run.packets.len();
    let mut sealed = run.arena.clone();
    let done = run.crypt(aead, true, &ours, &mut sealed);
    assert!(done.has_all(0..count), "a packet was not sealed");
    let mut expected = run.arena.clone();
    let done = run.crypt(Aead::portable(), true, &oracle, &mut expected);
    assert!(
        done.has_all(0..count) && sealed == expected,
        "{name} seals differently"
    );

    let mut opened = sealed.clone();
    let done = run.crypt(aead, false, &ours, &mut opened);
    assert!(done.has_all(0..count), "{name} refuses its own");
    for packet in &run.packets {
        assert!(opened[packet.payload()] == run.arena[packet.payload()]);
    }

    let broken = run.broken % count;
    let payload = run.packets[broken].payload();
    sealed[payload.start + run.broken % (payload.len() + ICV_BYTES)] ^= 1 << (run.broken % 8);
    let done = run.crypt(aead, false, &ours, &mut sealed);
    for index in 0..count {
        assert_eq!(done.has(index), index != broken, "{name}: packet {index}");
    }
}

/// Two secrets of AES-128 and one of AES-256.
fn key(aead: Aead, index: usize, secrets: &[u8]) -> AeadKey {
    let (suite, secret) = match index / 2 {
        0 => (AeadSuite::Aes128Gcm16, &secrets[..16]),
        1 => (AeadSuite::Aes128Gcm16, &secrets[16..]),
        _ => (AeadSuite::Aes256Gcm16, secrets),
    };
    let salt = [secrets[3], secrets[7], secrets[11], index as u8];
    let esn = [Esn::Off, Esn::On][index % 2];
    AeadKey::new(aead, suite, (secret, salt), esn).expect("a key of the right length")
}

impl Run {
    /// Eight bytes a packet; what is left fills the payloads.
    fn spelled(data: &[u8]) -> Option<Self> {
        let [broken_high, broken_low, count, first @ ..] = data else {
            return None;
        };
        let count = 1 + usize::from(*count) % PACKETS_MAX;
        let mut packets = Vec::new();
        let mut at = 0;
        for bytes in first.chunks_exact(8).take(count) {
            let size = u16::from_be_bytes([bytes[0], bytes[1]]) % PAYLOAD_BYTES_MAX;
            let mut header = [bytes[3]; HEADER_BYTES];
            header[8..].fill(bytes[4]);
            header[12..].copy_from_slice(&bytes[4..]);
            at += usize::from(bytes[2] >> 1) + HEADER_BYTES;
            packets.push(Packet {
                key: 2 * (usize::from(bytes[7]) % (KEYS / 2)) + usize::from(bytes[2] & 1),
                header,
                job: Job {
                    start: at as u32,
                    bytes: size.into(),
                    high: u32::from(bytes[3]) << (bytes[4] % 32),
                    more: 0,
                },
            });
            at += usize::from(size) + ICV_BYTES;
        }
        let filling = first
            .get(8 * packets.len()..)
            .filter(|rest| !rest.is_empty());
        let filling = filling.unwrap_or(&[0x5a]);
        let mut arena: Vec<u8> = filling.iter().copied().cycle().take(at + 64).collect();
        for Packet { job, header, .. } in &packets {
            let start = job.start as usize;
            arena[start - HEADER_BYTES..start].copy_from_slice(header);
        }
        (!packets.is_empty()).then(|| Self {
            arena,
            packets,
            broken: usize::from(u16::from_be_bytes([*broken_high, *broken_low])),
        })
    }

    fn crypt(&self, aead: Aead, seal: bool, keys: &[AeadKey], arena: &mut [u8]) -> Done {
        let jobs: Vec<Job> = self.packets.iter().map(|packet| packet.job).collect();
        let keyed = |(index, packet): (usize, &Packet)| Keyed {
            key: &keys[packet.key],
            end: index + 1,
        };
        let keys: Vec<Keyed<'_>> = self.packets.iter().enumerate().map(keyed).collect();
        let arena = &mut Arena::over(arena);
        if seal {
            aead.seal(arena, &keys, &jobs)
        } else {
            aead.open(arena, &keys, &jobs)
        }
    }
}

/// Runs of one size, of mixed sizes, of one packet: each kernel has its own.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let run = |sizes: &[u16], key: u8| {
        let mut seed: Vec<u8> = (0..32).collect();
        seed.extend([1, 77, sizes.len() as u8 - 1]);
        for (index, size) in sizes.iter().enumerate() {
            seed.extend(size.to_be_bytes());
            seed.extend([34, 0x11, index as u8, 3, 4, key]);
        }
        seed.extend(b"what fills the payloads");
        seed
    };
    vec![
        run(&[68; 9], 0),
        run(&[64, 1400, 64, 576, 64, 64, 576, 64, 0, 1, 17], 0),
        run(&[256, 250, 248, 243, 300], 2),
        run(&[2048], 1),
        run(&[500; 4], 2),
    ]
}
