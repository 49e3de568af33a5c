//! All randomness of the engine: one ChaCha20 stream from the seed it was given, so that a test can
//! replay every handshake byte by byte.

use chacha20::{
    ChaCha20Rng,
    rand_core::{Rng, SeedableRng},
};
use std::time::Duration;
use zeroize::Zeroizing;

/// The generator. Wiped on drop.
pub(crate) struct Random(ChaCha20Rng);

impl Random {
    pub(crate) fn from_seed(seed: [u8; 32]) -> Self {
        Self(ChaCha20Rng::from_seed(seed))
    }

    /// A generator of its own for one handshake, which snow wants to own.
    pub(crate) fn fork(&mut self) -> Self {
        Self(ChaCha20Rng::from_seed(*Zeroizing::new(self.bytes::<32>())))
    }

    pub(crate) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.fill_bytes(&mut bytes);
        bytes
    }

    pub(crate) fn number(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// Somewhere between nothing and `most`.
    pub(crate) fn up_to(&mut self, most: Duration) -> Duration {
        most.mul_f64(f64::from(self.number()) / f64::from(u32::MAX))
    }

    /// For crates that take a generator themselves.
    pub(crate) fn generator(&mut self) -> &mut ChaCha20Rng {
        &mut self.0
    }
}

impl snow::types::Random for Random {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), snow::Error> {
        self.0.fill_bytes(dest);
        Ok(())
    }
}
