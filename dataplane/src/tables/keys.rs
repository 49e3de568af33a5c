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
use rpds::RedBlackTreeMapSync as Map;
use std::{collections::hash_map::RandomState, hash::BuildHasher, sync::Arc};

/// Keys remembered at most; the oldest are forgotten first.
const REMEMBERED_KEYS_MAX: usize = 4096;

/// Recognises a key without holding it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyDigest(u64);

/// Keys without an SA. A clone shares all of it.
#[derive(Clone, Default)]
pub(super) struct KeyMemory {
    secret: RandomState,
    /// By the order in which their SAs went.
    by_age: Map<u64, KeyDigest>,
    /// By key, and that order among those of one key.
    by_key: Map<(KeyDigest, u64), Progress>,
    last: u64,
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
        self.remember(key, Progress::Sent(counter));
    }

    /// An inbound SA with this key is gone.
    pub fn received(&mut self, key: KeyDigest, spi: Spi, window: Arc<ReplayWindow>) {
        self.remember(key, Progress::Received(spi, window));
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
        while self.by_age.size() > REMEMBERED_KEYS_MAX
            && let Some((age, key)) = self.by_age.first().map(|(age, key)| (*age, *key))
        {
            self.forget(key, age);
        }
    }

    fn remember(&mut self, key: KeyDigest, progress: Progress) {
        self.last += 1;
        self.by_age.insert_mut(self.last, key);
        self.by_key.insert_mut((key, self.last), progress);
    }

    fn forget(&mut self, key: KeyDigest, age: u64) {
        self.by_age.remove_mut(&age);
        self.by_key.remove_mut(&(key, age));
    }

    /// The newest of the kind that is wanted.
    fn take<T>(&mut self, key: KeyDigest, wanted: impl Fn(&Progress) -> Option<T>) -> Option<T> {
        let oldest_first = self.by_key.range((key, 0)..=(key, u64::MAX));
        let (age, found) = oldest_first
            .filter_map(|((_, age), progress)| Some((*age, wanted(progress)?)))
            .last()?;
        self.forget(key, age);
        Some(found)
    }

    fn of(&self, key: KeyDigest) -> impl Iterator<Item = &Progress> {
        let all = self.by_key.range((key, 0)..=(key, u64::MAX));
        all.map(|(_, progress)| progress)
    }
}
