//! The post-quantum half: one ML-KEM exchange with ephemeral keys (FIPS 203), or none.

use crate::{KemPolicy, random::Random};
use ml_kem::{
    B32, Decapsulate, DecapsulationKey512, DecapsulationKey768, Encapsulate, EncapsulationKey512,
    EncapsulationKey768, FromSeed, Key, KeyExport, MlKem512, MlKem768, Seed,
};
use zeroize::{Zeroize, Zeroizing};

/// The secret that both ends share; nothing where the KEM is off. Wiped on drop.
pub(crate) type KemSecret = Zeroizing<Vec<u8>>;

/// What the initiator keeps until the answer comes. Wiped on drop by its own type.
pub(crate) enum KemKey {
    Off,
    MlKem512(Box<DecapsulationKey512>),
    MlKem768(Box<DecapsulationKey768>),
}

impl KemKey {
    /// A fresh key pair: what we keep, and the encapsulation key for message 1.
    pub(crate) fn generate(kem: KemPolicy, random: &mut Random) -> (Self, Vec<u8>) {
        let mut seed = Seed::default();
        seed.copy_from_slice(Zeroizing::new(random.bytes::<64>()).as_slice());
        let made = match kem {
            KemPolicy::Off => (Self::Off, Vec::new()),
            KemPolicy::MlKem512 => {
                let (secret, public) = MlKem512::from_seed(&seed);
                (Self::MlKem512(Box::new(secret)), public.to_bytes().to_vec())
            }
            KemPolicy::MlKem768 => {
                let (secret, public) = MlKem768::from_seed(&seed);
                (Self::MlKem768(Box::new(secret)), public.to_bytes().to_vec())
            }
        };
        seed.zeroize();
        made
    }

    pub(crate) fn policy(&self) -> KemPolicy {
        match self {
            Self::Off => KemPolicy::Off,
            Self::MlKem512(_) => KemPolicy::MlKem512,
            Self::MlKem768(_) => KemPolicy::MlKem768,
        }
    }

    /// The shared secret out of message 2's ciphertext; `None` if that has the wrong length. A wrong
    /// ciphertext of the right length yields another secret (implicit rejection), so other ESP keys;
    /// but it lies under Noise's AEAD, so only the peer itself could have put it there.
    pub(crate) fn decapsulate(&self, ciphertext: &[u8]) -> Option<KemSecret> {
        match self {
            Self::Off => ciphertext.is_empty().then(KemSecret::default),
            Self::MlKem512(key) => key.decapsulate_slice(ciphertext).ok().map(secret),
            Self::MlKem768(key) => key.decapsulate_slice(ciphertext).ok().map(secret),
        }
    }
}

/// A fresh secret for the holder of an encapsulation key, and its ciphertext for message 2; `None` if
/// the key is not one (FIPS 203 §7.2: wrong length, or coefficients out of range).
pub(crate) fn encapsulate(
    kem: KemPolicy,
    key: &[u8],
    random: &mut Random,
) -> Option<(Vec<u8>, KemSecret)> {
    match kem {
        KemPolicy::Off => key.is_empty().then(|| (Vec::new(), KemSecret::default())),
        KemPolicy::MlKem512 => {
            let key =
                EncapsulationKey512::new(&Key::<EncapsulationKey512>::try_from(key).ok()?).ok()?;
            let (ciphertext, shared) = key.encapsulate_with_rng(random.generator());
            Some((ciphertext.to_vec(), secret(shared)))
        }
        KemPolicy::MlKem768 => {
            let key =
                EncapsulationKey768::new(&Key::<EncapsulationKey768>::try_from(key).ok()?).ok()?;
            let (ciphertext, shared) = key.encapsulate_with_rng(random.generator());
            Some((ciphertext.to_vec(), secret(shared)))
        }
    }
}

fn secret(mut shared: B32) -> KemSecret {
    let secret = Zeroizing::new(shared.to_vec());
    shared.zeroize();
    secret
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_share_a_secret_of_the_documented_sizes() {
        let random = &mut Random::from_seed([1; 32]);
        for (kem, key_bytes, ciphertext_bytes, secret_bytes) in [
            (KemPolicy::MlKem768, 1184, 1088, 32),
            (KemPolicy::MlKem512, 800, 768, 32),
            (KemPolicy::Off, 0, 0, 0),
        ] {
            let (secret, public) = KemKey::generate(kem, random);
            let (ciphertext, theirs) = encapsulate(kem, &public, random).unwrap();
            assert_eq!(
                (public.len(), ciphertext.len(), theirs.len()),
                (key_bytes, ciphertext_bytes, secret_bytes)
            );
            assert_eq!(secret.decapsulate(&ciphertext), Some(theirs));
            assert_eq!(secret.policy(), kem);
        }
    }

    #[test]
    fn what_is_no_key_or_ciphertext_is_refused() {
        let random = &mut Random::from_seed([2; 32]);
        for kem in [KemPolicy::MlKem768, KemPolicy::MlKem512, KemPolicy::Off] {
            let (secret, mut public) = KemKey::generate(kem, random);
            public.push(0);
            assert!(
                encapsulate(kem, &public, random).is_none(),
                "{kem}: a byte too many"
            );
            assert!(secret.decapsulate(&[0; 5]).is_none(), "{kem}: five bytes");
        }
        // FIPS 203 §7.2: coefficients of 0xfff lie past the modulus 3329.
        assert!(encapsulate(KemPolicy::MlKem768, &[0xff; 1184], random).is_none());
        assert!(encapsulate(KemPolicy::MlKem512, &[0xff; 800], random).is_none());
    }
}
