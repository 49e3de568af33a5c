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
    wire::{self, Answer, HEADER_BYTES, LONGEST, Offer, PayloadError, Spis, Timestamp},
};
use blake2::Blake2s256;
use esplane_api::{AeadSuite, Esn, KeyMaterial};
use hkdf::SimpleHkdf;
use snow::{
    Builder, HandshakeState,
    params::{CipherChoice, DHChoice, HashChoice, NoiseParams},
    resolvers::{CryptoResolver, DefaultResolver},
    types::{Cipher, Dh, Hash},
};
use std::cell::Cell;
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
    pub spis: &'a Spis,
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
            spis: terms.spis.clone(),
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
        spis: &Spis,
        suite: AeadSuite,
        window_packets: u32,
    ) -> Result<(Vec<u8>, Session), HandshakeError> {
        let (kem_ciphertext, secret) =
            kem::encapsulate(offer.kem, &offer.kem_key, random).ok_or(HandshakeError::Malformed)?;
        let answer = Answer::Accepted {
            spis: spis.clone(),
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

/// All keys of one negotiation, named by which way they carry, in the order of the receiver's SPIs.
pub(crate) struct EspKeys {
    pub to_responder: Vec<KeyMaterial>,
    pub to_initiator: Vec<KeyMaterial>,
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
    /// numbers' width and the KEM are in `info`, so keys for other terms are other keys. Of further SAs the key has
    /// their own SPI in it, too.
    pub(crate) fn esp_keys(
        &self,
        suite: AeadSuite,
        esn: Esn,
        initiator: &Spis,
        responder: &Spis,
    ) -> Result<EspKeys, HandshakeError> {
        let hkdf = SimpleHkdf::<Blake2s256>::new(Some(&self.transcript), &self.secrets);
        let terms = [
            wire::suite_number(suite),
            wire::esn_number(esn),
            wire::kem_number(self.kem),
        ];
        let ends = [initiator.first, responder.first].map(|spi| spi.get().to_be_bytes());
        let key = |label: &[u8], own: &[u8]| {
            let mut bytes = Zeroizing::new([0; 36]);
            let bytes = &mut bytes[..suite.keying_material_bytes()];
            hkdf.expand_multi_info(&[label, &terms, &ends[0], &ends[1], own], bytes)
                .map_err(|_| HandshakeError::Malformed)?; // cannot happen: 36 bytes are far below HKDF's limit
            KeyMaterial::new(suite, bytes).map_err(|_| HandshakeError::Malformed)
        };
        let keys = |label: &[u8], receiver: &Spis| {
            let more = receiver
                .more
                .iter()
                .map(|spi| key(label, &spi.get().to_be_bytes()));
            std::iter::once(key(label, &[])).chain(more).collect()
        };
        let to_responder: Result<_, HandshakeError> = keys(LABEL_TO_RESPONDER, responder);
        Ok(EspKeys {
            to_responder: to_responder?,
            to_initiator: keys(LABEL_TO_INITIATOR, initiator)?,
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
        Box::new(Resolver(Cell::new(Some(random.fork())))),
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
struct Resolver(Cell<Option<Random>>);

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn snow::types::Random>> {
        let random = self.0.take()?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Message;
    use esplane_api::Spi;

    fn keys() -> [StaticSecretKey; 2] {
        [1, 2].map(|number| StaticSecretKey::generate([number; 32]))
    }

    /// Of two SAs.
    fn spis(number: u32) -> Spis {
        Spis {
            first: Spi::new(number).unwrap(),
            more: vec![Spi::new(number + 1).unwrap()],
        }
    }

    /// Both sessions of one handshake whose KEM is `kem`.
    fn shake(kem: KemPolicy, psk: Option<&PresharedKey>) -> [Session; 2] {
        let [initiator, responder] = keys();
        let random = &mut Random::from_seed([7; 32]);
        let terms = Terms {
            timestamp: Timestamp::default(),
            spis: &spis(1000),
            suites: &AeadSuite::ALL,
            esn: Esn::On,
            window_packets: 64,
            kem,
        };
        let (mut waiting, mut one) =
            Waiting::start(random, &initiator, &responder.public_key(), psk, 5, &terms).unwrap();
        one.extend_from_slice(&[0; 32]);
        let Ok(Message::Initiation(message)) = Message::parse(&one) else {
            panic!("no initiation");
        };
        let opened = Opened::open(random, &responder, &message).unwrap();
        assert_eq!(opened.peer(), initiator.public_key());
        let offer = opened.offer().unwrap();
        assert_eq!((&offer.spis, offer.kem), (&spis(1000), kem));
        let suite = AeadSuite::Aes256Gcm16;
        let (mut two, theirs) = opened
            .accept(random, psk, &offer, &spis(2000), suite, 64)
            .unwrap();
        two.extend_from_slice(&[0; 16]);
        let Ok(Message::Response(message)) = Message::parse(&two) else {
            panic!("no response");
        };
        let (_, ours) = waiting.finish(message.noise).unwrap();
        [ours.unwrap(), theirs]
    }

    fn esp(session: &Session) -> EspKeys {
        session
            .esp_keys(AeadSuite::Aes256Gcm16, Esn::On, &spis(1000), &spis(2000))
            .unwrap()
    }

    #[test]
    fn both_ends_derive_the_same_two_keys() {
        for kem in [KemPolicy::MlKem768, KemPolicy::MlKem512, KemPolicy::Off] {
            let [ours, theirs] = shake(kem, None);
            let (ours, theirs) = (esp(&ours), esp(&theirs));
            let all = |keys: EspKeys| [keys.to_responder, keys.to_initiator].concat();
            let (ours, theirs) = (all(ours), all(theirs));
            assert_eq!((ours.len(), theirs.len()), (4, 4));
            for (place, key) in ours.iter().enumerate() {
                let same = theirs.iter().map(|other| other.same_secret(key));
                let only_there = (0..4).map(|other| other == place);
                assert!(same.eq(only_there), "the same key, and no other");
            }
        }
    }

    #[test]
    fn whoever_breaks_only_x25519_or_only_the_kem_does_not_get_the_keys() {
        let [mut session, _] = shake(KemPolicy::MlKem768, None);
        let real = esp(&session).to_responder.remove(0);
        assert_eq!(
            session.secrets.len(),
            96,
            "Noise's two halves and the KEM's secret"
        );
        // All that X25519 gives, a wrong KEM secret; then the other way round.
        for half in [64..96, 0..32, 32..64] {
            let secrets = session.secrets.clone();
            session.secrets[half.start] ^= 1;
            assert!(
                !esp(&session).to_responder[0].same_secret(&real),
                "{half:?}"
            );
            session.secrets = secrets;
        }
        session.transcript[0] ^= 1;
        assert!(
            !esp(&session).to_responder[0].same_secret(&real),
            "another transcript"
        );
    }

    #[test]
    fn keys_for_other_terms_are_other_keys() {
        let [session, _] = shake(KemPolicy::Off, None);
        let suite = AeadSuite::Aes256Gcm16;
        let keys = [
            esp(&session).to_responder,
            esp(&session).to_initiator,
            session
                .esp_keys(suite, Esn::Off, &spis(1000), &spis(2000))
                .unwrap()
                .to_responder,
            session
                .esp_keys(suite, Esn::On, &spis(1001), &spis(2000))
                .unwrap()
                .to_responder,
            session
                .esp_keys(suite, Esn::On, &spis(1000), &spis(2001))
                .unwrap()
                .to_responder,
            session
                .esp_keys(suite, Esn::On, &spis(2000), &spis(1000))
                .unwrap()
                .to_responder,
        ];
        let mut keys = keys.concat();
        while let Some(key) = keys.pop() {
            assert!(
                keys.iter()
                    .all(|other| other.dangerous_key() != key.dangerous_key())
            );
        }
    }

    /// Pins the key schedule: a change here is another protocol and needs another version.
    #[test]
    fn the_key_schedule_is_hkdf_blake2s_as_written_down() {
        let session = Session {
            transcript: [0x11; 32],
            secrets: Zeroizing::new([[0x22; 32], [0x33; 32], [0x44; 32]].concat()),
            kem: KemPolicy::MlKem768,
        };
        let own_spis: [&[u8]; 2] = [&[], &[0, 0, 0x07, 0xd1]];
        for (key, own) in esp(&session).to_responder.iter().zip(own_spis) {
            let mut info = LABEL_TO_RESPONDER.to_vec();
            info.extend_from_slice(&[2, 1, 2, 0, 0, 0x03, 0xe8, 0, 0, 0x07, 0xd0]);
            info.extend_from_slice(own);
            let prk = hmac(&[0x11; 32], &[&session.secrets]);
            let first = hmac(&prk, &[&info, &[1]]);
            let second = hmac(&prk, &[&first, &info, &[2]]);
            assert_eq!(key.dangerous_key(), first);
            assert_eq!(key.dangerous_salt(), second[..4]);
        }
    }

    /// HMAC-BLAKE2s by its definition (RFC 2104), not by the crate that is under test.
    fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
        use blake2::Digest;
        let pad = |byte: u8| {
            std::array::from_fn::<u8, 64, _>(|at| key.get(at).copied().unwrap_or(0) ^ byte)
        };
        let mut inner = Blake2s256::new_with_prefix(pad(0x36));
        parts.iter().for_each(|part| inner.update(part));
        Blake2s256::new_with_prefix(pad(0x5c))
            .chain_update(inner.finalize())
            .finalize()
            .into()
    }

    #[test]
    fn a_wrong_responder_key_or_pre_shared_key_ends_it() {
        let [initiator, responder] = keys();
        let random = &mut Random::from_seed([8; 32]);
        let terms = Terms {
            timestamp: Timestamp::default(),
            spis: &spis(1000),
            suites: &AeadSuite::ALL,
            esn: Esn::On,
            window_packets: 64,
            kem: KemPolicy::Off,
        };
        let wrong = StaticSecretKey::generate([9; 32]);
        let (mut waiting, mut one) =
            Waiting::start(random, &initiator, &responder.public_key(), None, 5, &terms).unwrap();
        one.extend_from_slice(&[0; 32]);
        let Ok(Message::Initiation(message)) = Message::parse(&one) else {
            panic!("no initiation");
        };
        assert!(matches!(
            Opened::open(random, &wrong, &message),
            Err(HandshakeError::Noise(_))
        ));
        let opened = Opened::open(random, &responder, &message).unwrap();
        let offer = opened.offer().unwrap();
        let psk = PresharedKey::generate([1; 32]);
        let (mut two, _) = opened
            .accept(
                random,
                Some(&psk),
                &offer,
                &spis(2000),
                AeadSuite::Aes128Gcm16,
                64,
            )
            .unwrap();
        two.extend_from_slice(&[0; 16]);
        let Ok(Message::Response(message)) = Message::parse(&two) else {
            panic!("no response");
        };
        assert!(matches!(
            waiting.finish(message.noise),
            Err(HandshakeError::Noise(_))
        ));
    }
}
