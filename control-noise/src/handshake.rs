//! One handshake, as types: whoever holds a value can do only what comes next.
//!
//! ```text
//!   initiator                                                    responder
//!   Waiting::start ──1: e, es, s, ss, {Offer}──────────────────▶ Opened::open
//!   Waiting::finish ◀─2: e, ee, se, psk, {Answer}─────────────── Opened::{accept, refuse}
//!     └▶ Session                                                   └▶ Session
//!          └─────── esp_keys: the same two keys on both ends ───────┘
//! ```
//! The pattern is `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s`, WireGuard's, through `snow`.

use crate::{
    KemPolicy, PresharedKey, PublicKey, StaticSecretKey,
    kem::{self, KemKey, KemSecret},
    keys::KEY_BYTES,
    random::Random,
    wire::{self, Answer, HEADER_BYTES, LONGEST, Offer, PayloadError, Timestamp},
};
use blake2::Blake2s256;
use esplane_api::{AeadSuite, Esn, KeyMaterial, Spi};
use hkdf::SimpleHkdf;
use snow::{
    Builder, HandshakeState,
    params::{CipherChoice, DHChoice, HashChoice, NoiseParams},
    resolvers::{CryptoResolver, DefaultResolver},
    types::{Cipher, Dh, Hash},
};
use std::sync::Mutex;
use zeroize::Zeroizing;

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
/// Protocol and version; the header of message 1 follows it. Both ends must agree on every bit.
const PROLOGUE: &[u8] = b"esplane 1";
const PSK_POSITION: u8 = 2;
/// "No pre-shared key", as WireGuard has it: the pattern is the same with and without.
const NO_PSK: [u8; KEY_BYTES] = [0; KEY_BYTES];

const LABEL_TO_RESPONDER: &[u8] = b"esplane 1 esp initiator to responder";
const LABEL_TO_INITIATOR: &[u8] = b"esplane 1 esp responder to initiator";

/// Why a handshake goes no further.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The peer's message: wrong keys or damaged. Our own: cannot happen with keys of the right length.
    #[error("Noise refused the message: {0}")]
    Noise(snow::Error),
    /// Authentic, and its payload breaks the rules.
    #[error("the payload is malformed")]
    Malformed,
    /// Authentic, and its payload holds something critical that we do not know.
    #[error("the payload holds a critical field that this version does not know")]
    Unknown,
}

/// The initiator between message 1 and message 2.
pub(crate) struct Waiting {
    noise: HandshakeState,
    kem: KemKey,
}

/// What the initiator offers, besides the KEM key that [`Waiting::start`] makes.
pub(crate) struct Terms<'a> {
    pub timestamp: Timestamp,
    pub spi: Spi,
    pub suites: &'a [AeadSuite],
    pub esn: Esn,
    pub window_packets: u32,
    pub kem: KemPolicy,
}

impl Waiting {
    /// Makes message 1, without its MACs.
    pub(crate) fn start(
        random: &mut Random,
        own: &StaticSecretKey,
        peer: &PublicKey,
        psk: Option<&PresharedKey>,
        index: u32,
        terms: &Terms,
    ) -> Result<(Self, Vec<u8>), HandshakeError> {
        let (kem, kem_key) = KemKey::generate(terms.kem, random);
        let offer = Offer {
            timestamp: terms.timestamp,
            spi: terms.spi,
            suites: terms.suites.to_vec(),
            esn: terms.esn,
            window_packets: Some(terms.window_packets),
            kem: terms.kem,
            kem_key,
        };
        let payload = offer.encode();
        let header = wire::initiation_header(index, payload.len());
        let prologue = prologue(&header);
        let mut noise = builder(random)?
            .local_private_key(own.dangerous_bytes())?
            .remote_public_key(peer.as_bytes())?
            .psk(
                PSK_POSITION,
                psk.map_or(&NO_PSK, PresharedKey::dangerous_bytes),
            )?
            .prologue(&prologue)?
            .build_initiator()?;
        let message = write(&mut noise, &header, &payload)?;
        Ok((Self { noise, kem }, message))
    }

    /// Reads message 2. After an error a better message 2 may still come: nothing has changed.
    pub(crate) fn finish(
        &mut self,
        noise_message: &[u8],
    ) -> Result<(Answer, Option<Session>), HandshakeError> {
        let payload = read(&mut self.noise, noise_message)?;
        let answer = Answer::parse(&payload)?;
        let session = match &answer {
            Answer::Refused(_) => None,
            Answer::Accepted { kem_ciphertext, .. } => {
                let secret = self
                    .kem
                    .decapsulate(kem_ciphertext)
                    .ok_or(HandshakeError::Malformed)?;
                Some(Session::of(&mut self.noise, self.kem.policy(), secret))
            }
        };
        Ok((answer, session))
    }
}

/// The responder between message 1 and message 2.
pub(crate) struct Opened {
    noise: HandshakeState,
    peer: PublicKey,
    payload: Zeroizing<Vec<u8>>,
    index: u32,
}

impl Opened {
    /// Decrypts message 1 and learns who sent it. Nothing is decided by that: the caller must know
    /// the peer and find the timestamp new.
    pub(crate) fn open(
        random: &mut Random,
        own: &StaticSecretKey,
        message: &wire::Initiation,
    ) -> Result<Self, HandshakeError> {
        let prologue = prologue(message.header);
        let mut noise = builder(random)?
            .local_private_key(own.dangerous_bytes())?
            .prologue(&prologue)?
            .build_responder()?;
        let payload = read(&mut noise, message.noise)?;
        let peer = noise
            .get_remote_static()
            .and_then(|key| key.try_into().ok())
            .and_then(|key| PublicKey::from_bytes(key).ok())
            .ok_or(HandshakeError::Malformed)?;
        Ok(Self {
            noise,
            peer,
            payload,
            index: message.index,
        })
    }

    /// Who sent it.
    pub(crate) fn peer(&self) -> PublicKey {
        self.peer
    }

    /// What it offers.
    pub(crate) fn offer(&self) -> Result<Offer, HandshakeError> {
        Ok(Offer::parse(&self.payload)?)
    }

    /// Makes message 2, without its MAC, and the keys.
    pub(crate) fn accept(
        mut self,
        random: &mut Random,
        psk: Option<&PresharedKey>,
        offer: &Offer,
        spi: Spi,
        suite: AeadSuite,
        window_packets: u32,
    ) -> Result<(Vec<u8>, Session), HandshakeError> {
        let (kem_ciphertext, secret) =
            kem::encapsulate(offer.kem, &offer.kem_key, random).ok_or(HandshakeError::Malformed)?;
        let answer = Answer::Accepted {
            spi,
            suite,
            window_packets: Some(window_packets),
            kem_ciphertext,
        };
        let message = self.answer(psk, &answer)?;
        Ok((message, Session::of(&mut self.noise, offer.kem, secret)))
    }

    /// Makes message 2 that says why not, so that both ends' operators hear of it.
    pub(crate) fn refuse(
        mut self,
        psk: Option<&PresharedKey>,
        why: crate::Disagreement,
    ) -> Result<Vec<u8>, HandshakeError> {
        self.answer(psk, &Answer::Refused(why))
    }

    fn answer(
        &mut self,
        psk: Option<&PresharedKey>,
        answer: &Answer,
    ) -> Result<Vec<u8>, HandshakeError> {
        // The psk is chosen only now: in message 1 nobody knew yet whose it is.
        let psk = psk.map_or(&NO_PSK, PresharedKey::dangerous_bytes);
        self.noise.set_psk(PSK_POSITION.into(), psk)?;
        let payload = answer.encode();
        let header = wire::response_header(self.index, payload.len());
        write(&mut self.noise, &header, &payload)
    }
}

/// The secrets of a completed handshake. Wiped on drop.
pub(crate) struct Session {
    transcript: [u8; 32],
    secrets: Zeroizing<Vec<u8>>,
    kem: KemPolicy,
}

/// Both keys of one negotiation, named by which way they carry.
pub(crate) struct EspKeys {
    pub to_responder: KeyMaterial,
    pub to_initiator: KeyMaterial,
}

impl Session {
    /// Noise's final chaining key (through its split) and the KEM's secret, side by side: whoever
    /// wants the ESP keys needs both. The handshake hash binds every byte that was exchanged.
    fn of(noise: &mut HandshakeState, kem: KemPolicy, kem_secret: KemSecret) -> Self {
        let (first, second) = noise.dangerously_get_raw_split();
        let (first, second) = (Zeroizing::new(first), Zeroizing::new(second));
        let mut secrets = Zeroizing::new(Vec::with_capacity(
            first.len() + second.len() + kem_secret.len(),
        ));
        secrets.extend_from_slice(first.as_slice());
        secrets.extend_from_slice(second.as_slice());
        secrets.extend_from_slice(&kem_secret);
        let mut transcript = [0; 32];
        transcript.copy_from_slice(&noise.get_handshake_hash()[..32]);
        Self {
            transcript,
            secrets,
            kem,
        }
    }

    /// HKDF-BLAKE2s (RFC 5869) with a label for each direction; both SPIs, the suite, the sequence
    /// numbers' width and the KEM are in `info`, so keys for other terms are other keys.
    pub(crate) fn esp_keys(
        &self,
        suite: AeadSuite,
        esn: Esn,
        initiator_spi: Spi,
        responder_spi: Spi,
    ) -> Result<EspKeys, HandshakeError> {
        let hkdf = SimpleHkdf::<Blake2s256>::new(Some(&self.transcript), &self.secrets);
        let terms = [
            wire::suite_number(suite),
            wire::esn_number(esn),
            wire::kem_number(self.kem),
        ];
        let key = |label: &[u8]| {
            let mut bytes = Zeroizing::new([0; 36]);
            let bytes = &mut bytes[..suite.keying_material_bytes()];
            let (initiator_spi, responder_spi) = (
                initiator_spi.get().to_be_bytes(),
                responder_spi.get().to_be_bytes(),
            );
            hkdf.expand_multi_info(&[label, &terms, &initiator_spi, &responder_spi], bytes)
                .map_err(|_| HandshakeError::Malformed)?; // cannot happen: 36 bytes are far below HKDF's limit
            KeyMaterial::new(suite, bytes).map_err(|_| HandshakeError::Malformed)
        };
        Ok(EspKeys {
            to_responder: key(LABEL_TO_RESPONDER)?,
            to_initiator: key(LABEL_TO_INITIATOR)?,
        })
    }
}

fn prologue(header: &[u8]) -> Vec<u8> {
    [PROLOGUE, header].concat()
}

fn builder<'a>(random: &mut Random) -> Result<Builder<'a>, HandshakeError> {
    let params: NoiseParams = PATTERN.parse()?;
    Ok(Builder::with_resolver(
        params,
        Box::new(Resolver(Mutex::new(Some(random.fork())))),
    ))
}

/// Header and Noise message, one after the other.
fn write(
    noise: &mut HandshakeState,
    header: &[u8; HEADER_BYTES],
    payload: &[u8],
) -> Result<Vec<u8>, HandshakeError> {
    let mut message = vec![0; LONGEST];
    message[..HEADER_BYTES].copy_from_slice(header);
    let length = noise.write_message(payload, &mut message[HEADER_BYTES..])?;
    message.truncate(HEADER_BYTES + length);
    Ok(message)
}

fn read(noise: &mut HandshakeState, message: &[u8]) -> Result<Zeroizing<Vec<u8>>, HandshakeError> {
    let mut payload = Zeroizing::new(vec![0; message.len()]);
    let length = noise.read_message(message, &mut payload)?;
    payload.truncate(length);
    Ok(payload)
}

/// snow's own primitives with our generator: a pure crate takes its randomness as an argument.
struct Resolver(Mutex<Option<Random>>);

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn snow::types::Random>> {
        let random = self.0.lock().ok()?.take()?;
        Some(Box::new(random))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        DefaultResolver.resolve_dh(choice)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

impl From<snow::Error> for HandshakeError {
    fn from(error: snow::Error) -> Self {
        Self::Noise(error)
    }
}

impl From<PayloadError> for HandshakeError {
    fn from(error: PayloadError) -> Self {
        match error {
            PayloadError::Malformed => Self::Malformed,
            PayloadError::Unknown => Self::Unknown,
        }
    }
}
