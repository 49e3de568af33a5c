//! The AEAD's kernels: a run of packets of any sizes, places, nonces, and keys. Each implementation must seal as the portable
//! one does, touch nothing beside the packets, open what it has sealed, and refuse what was changed.

use esplane_api::AeadSuite;
use esplane_dataplane::{
    Aead, AeadKey, Arena,
    aead::{ICV_BYTES, Job},
};
use std::sync::Once;

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
const KEYS: usize = 3;

/// A run as the input spells it: which packet and bit to break, how many packets, then those.
struct Run {
    arena: Vec<u8>,
    packets: Vec<Packet>,
    broken: usize,
}

struct Packet {
    key: usize,
    nonce: [u8; 12],
    aad: [u8; 16],
    aad_bytes: u8,
    start: usize,
    bytes: usize,
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

    let mut sealed = run.arena.clone();
    let mut jobs = run.jobs(&ours);
    aead.seal(&mut Arena::over(&mut sealed), &mut jobs);
    assert!(jobs.iter().all(|job| job.ok), "a packet was not sealed");
    let mut expected = run.arena.clone();
    Aead::portable().seal(&mut Arena::over(&mut expected), &mut run.jobs(&oracle));
    assert!(sealed == expected, "{name} seals differently");

    let mut opened = sealed.clone();
    let mut jobs = run.jobs(&ours);
    aead.open(&mut Arena::over(&mut opened), &mut jobs);
    assert!(jobs.iter().all(|job| job.ok), "{name} refuses its own");
    for job in &jobs {
        assert!(opened[job.payload.clone()] == run.arena[job.payload.clone()]);
    }

    let packet = run.broken % run.packets.len();
    let Packet { start, bytes, .. } = run.packets[packet];
    sealed[start + run.broken % (bytes + ICV_BYTES)] ^= 1 << (run.broken % 8);
    let mut jobs = run.jobs(&ours);
    aead.open(&mut Arena::over(&mut sealed), &mut jobs);
    for (index, job) in jobs.iter().enumerate() {
        assert_eq!(job.ok, index != packet, "{name}: packet {index}");
    }
}

/// Two keys of AES-128 and one of AES-256.
fn key(aead: Aead, index: usize, secrets: &[u8]) -> AeadKey {
    let (suite, secret) = match index {
        0 => (AeadSuite::Aes128Gcm16, &secrets[..16]),
        1 => (AeadSuite::Aes128Gcm16, &secrets[16..]),
        _ => (AeadSuite::Aes256Gcm16, secrets),
    };
    AeadKey::new(aead, suite, secret).expect("a key of the right length")
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
            let mut aad = [0; 16];
            let aad_bytes = if bytes[2] & 1 == 0 { 8 } else { 12 };
            aad[..aad_bytes].fill(bytes[3]);
            let mut nonce = [bytes[4]; 12];
            nonce[8..].copy_from_slice(&bytes[4..]);
            at += usize::from(bytes[2] >> 1);
            packets.push(Packet {
                key: usize::from(bytes[7]) % KEYS,
                nonce,
                aad,
                aad_bytes: aad_bytes as u8,
                start: at,
                bytes: usize::from(size),
            });
            at += usize::from(size) + ICV_BYTES;
        }
        let filling = first
            .get(8 * packets.len()..)
            .filter(|rest| !rest.is_empty());
        let filling = filling.unwrap_or(&[0x5a]);
        (!packets.is_empty()).then(|| Self {
            arena: filling.iter().copied().cycle().take(at + 64).collect(),
            packets,
            broken: usize::from(u16::from_be_bytes([*broken_high, *broken_low])),
        })
    }

    fn jobs<'k>(&self, keys: &'k [AeadKey]) -> Vec<Job<'k>> {
        let job = |packet: &Packet| Job {
            key: &keys[packet.key],
            nonce: packet.nonce,
            aad: packet.aad,
            aad_bytes: packet.aad_bytes,
            ok: false,
            payload: packet.start..packet.start + packet.bytes,
        };
        self.packets.iter().map(job).collect()
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
