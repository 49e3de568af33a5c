//! What is remembered of keys after their SAs are gone: how far they had come.
//!
//! A static key is removed and installed again at every reload, and (key, IV) pairs must not come
//! twice, nor packets be accepted twice. So counter and window belong to the key, not to the SA
//! that has them at the moment. Workers with an older snapshot go on with the same counter
//! meanwhile.
//!
//! The key itself is not kept, only its hash under a secret of this process.

use crate::{replay::ReplayWindow, sequence::SequenceCounter};
use esplane_api::{KeyMaterial, Spi, WindowSize};
use std::{
    collections::{VecDeque, hash_map::RandomState},
    hash::BuildHasher,
    sync::Arc,
};

/// Keys remembered at most; the oldest are forgotten first.
const REMEMBERED_KEYS_MAX: usize = 4096;

/// Recognises a key without holding it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyDigest(u64);

/// Keys without an SA. Cloning it copies a pointer.
#[derive(Clone, Default)]
pub(super) struct KeyMemory {
    secret: RandomState,
    oldest_first: Arc<VecDeque<(KeyDigest, Progress)>>,
}

#[derive(Clone)]
enum Progress {
    Sent(Arc<SequenceCounter>),
    Received(Spi, Arc<ReplayWindow>),
}

impl KeyMemory {
    /// The same for the same key and salt, as long as this process lives.
    pub fn digest(&self, key: &KeyMaterial) -> KeyDigest {
        let secret = (key.dangerous_key(), key.dangerous_salt());
        KeyDigest(self.secret.hash_one(secret))
    }

    /// An outbound SA with this key is gone.
    pub fn sent(&mut self, key: KeyDigest, counter: Arc<SequenceCounter>) {
        self.all_mut().push_back((key, Progress::Sent(counter)));
    }

    /// An inbound SA with this key is gone.
    pub fn received(&mut self, key: KeyDigest, spi: Spi, window: Arc<ReplayWindow>) {
        self.all_mut()
            .push_back((key, Progress::Received(spi, window)));
    }

    /// Whether we have sent with it.
    pub fn has_sent(&self, key: KeyDigest) -> bool {
        self.of(key)
            .any(|progress| matches!(progress, Progress::Sent(_)))
    }

    /// Whether the peer has sent with it.
    pub fn has_received(&self, key: KeyDigest) -> bool {
        self.of(key)
            .any(|progress| matches!(progress, Progress::Received(..)))
    }

    /// The counter of a key that has sent. Nonces do not contain the SPI, so the key alone decides.
    pub fn take_counter(&mut self, key: KeyDigest) -> Option<Arc<SequenceCounter>> {
        self.take(key, |progress| match progress {
            Progress::Sent(counter) => Some(counter.clone()),
            Progress::Received(..) => None,
        })
    }

    /// The window of a key that has received with this SPI.
    pub fn take_window(
        &mut self,
        key: KeyDigest,
        spi: Spi,
        size: WindowSize,
    ) -> Option<Arc<ReplayWindow>> {
        let known = self.take(key, |progress| match progress {
            Progress::Received(known_spi, window) if *known_spi == spi => Some(window.clone()),
            _ => None,
        })?;
        Some(if known.window_packets() == size.packets() {
            known
        } else {
            // Another size: all that may have come before is too old.
            Arc::new(ReplayWindow::new(size, known.head()))
        })
    }

    /// At the end of a list of commands, so that a reload may remove and install any number of SAs.
    pub fn forget_oldest(&mut self) {
        let excess = self.oldest_first.len().saturating_sub(REMEMBERED_KEYS_MAX);
        if excess > 0 {
            self.all_mut().drain(..excess);
        }
    }

    fn take<T>(&mut self, key: KeyDigest, wanted: impl Fn(&Progress) -> Option<T>) -> Option<T> {
        let newest_first = self.oldest_first.iter().enumerate().rev();
        let (at, found) = newest_first
            .filter(|(_, (known, _))| *known == key)
            .find_map(|(at, (_, progress))| Some((at, wanted(progress)?)))?;
        self.all_mut().remove(at);
        Some(found)
    }

    fn of(&self, key: KeyDigest) -> impl Iterator<Item = &Progress> {
        let all = self.oldest_first.iter();
        all.filter(move |(known, _)| *known == key)
            .map(|(_, progress)| progress)
    }

    fn all_mut(&mut self) -> &mut VecDeque<(KeyDigest, Progress)> {
        Arc::make_mut(&mut self.oldest_first)
    }
}
