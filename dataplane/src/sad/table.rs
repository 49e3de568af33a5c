//! SPI to SA: a hash table whose buckets are cache lines, in pages that snapshots share.
//!
//! ```text
//!   SPI ─hash─▶ page ─▶ bucket │ 5 SPIs │ passed │ 5 SAs │   one line
//!                              full? SAs that belong here lie in the next bucket; `passed` says how many go on
//! ```
//!
//! A search ends at the first bucket that nobody has passed. At most half of the slots are in use, so it is mostly the first.

use super::InboundSa;
use crate::aead::prefetch;
use std::sync::Arc;

/// Slots of a bucket: what fits into a cache line.
const BUCKET_SLOTS: usize = 5;
/// Buckets of a page.
const PAGE_BUCKETS: usize = 16;

/// The Security Association Database: what receives, by SPI. A clone shares all of it.
#[derive(Clone)]
pub struct Sad {
    pages: Arc<[Arc<Page>]>,
    /// There are 2 to the power of this many buckets.
    bits: u32,
    used: usize,
}

type Page = [Bucket; PAGE_BUCKETS];

#[derive(Clone, Default)]
#[repr(align(64))]
struct Bucket {
    /// 0, which no SA has, where a slot is free.
    spis: [u32; BUCKET_SLOTS],
    /// SAs that have not found room up to here: a search for them goes on.
    passed: u32,
    sas: [Option<Arc<InboundSa>>; BUCKET_SLOTS],
}

const _: () = assert!(size_of::<Bucket>() == 64);

impl Default for Sad {
    fn default() -> Self {
        Self::with_bits(PAGE_BUCKETS.ilog2())
    }
}

impl Sad {
    fn with_bits(bits: u32) -> Self {
        let pages = (1usize << bits) / PAGE_BUCKETS;
        Self {
            pages: (0..pages).map(|_| Arc::default()).collect(),
            bits,
            used: 0,
        }
    }

    /// The SA with this SPI.
    #[inline]
    pub fn find(&self, spi: u32) -> Option<&InboundSa> {
        for at in self.search(spi) {
            let bucket = self.bucket(at)?;
            if let Some(slot) = bucket.slot_of(spi) {
                return bucket.sas[slot].as_deref();
            }
            if bucket.passed == 0 {
                break;
            }
        }
        None
    }

    /// Asks for the bucket where an SPI belongs.
    #[inline]
    pub fn prefetch(&self, spi: u32) {
        if let Some(bucket) = self.search(spi).next().and_then(|at| self.bucket(at)) {
            prefetch(bucket);
        }
    }

    /// Puts an SA in whose SPI no other has.
    pub fn insert(&mut self, sa: Arc<InboundSa>) {
        let slots = BUCKET_SLOTS << self.bits;
        if 2 * (self.used + 1) > slots {
            self.grow();
        }
        let spi = sa.id.spi.get();
        for at in self.search(spi) {
            let bucket = self.bucket_mut(at);
            if let Some(free) = bucket.slot_of(0) {
                bucket.spis[free] = spi;
                bucket.sas[free] = Some(sa);
                self.used += 1;
                return;
            }
            bucket.passed += 1;
        }
    }

    /// Takes the SA with this SPI out, if there is one.
    pub fn remove(&mut self, spi: u32) {
        if self.find(spi).is_none() {
            return;
        }
        for at in self.search(spi) {
            let bucket = self.bucket_mut(at);
            if let Some(slot) = bucket.slot_of(spi) {
                bucket.spis[slot] = 0;
                bucket.sas[slot] = None;
                self.used -= 1;
                return;
            }
            bucket.passed -= 1;
        }
    }

    fn grow(&mut self) {
        let mut larger = Self::with_bits(self.bits + 1);
        let buckets = self.pages.iter().flat_map(|page| page.iter());
        for sa in buckets.flat_map(|bucket| bucket.sas.iter().flatten()) {
            larger.insert(sa.clone());
        }
        *self = larger;
    }

    /// All buckets, beginning with the one where an SPI belongs. One multiplication is hash enough, as SPIs in the table are
    /// ours: nobody else can choose them to collide.
    #[inline]
    fn search(&self, spi: u32) -> impl Iterator<Item = usize> + use<> {
        let home = (spi.wrapping_mul(0x9e37_79b9) >> (u32::BITS - self.bits)) as usize;
        let buckets = 1usize << self.bits;
        (home..home + buckets).map(move |at| at & (buckets - 1))
    }

    #[inline]
    fn bucket(&self, at: usize) -> Option<&Bucket> {
        let page = self.pages.get(at / PAGE_BUCKETS)?;
        Some(&page[at % PAGE_BUCKETS])
    }

    fn bucket_mut(&mut self, at: usize) -> &mut Bucket {
        let page = &mut Arc::make_mut(&mut self.pages)[at / PAGE_BUCKETS];
        &mut Arc::make_mut(page)[at % PAGE_BUCKETS]
    }
}

impl Bucket {
    #[inline]
    fn slot_of(&self, spi: u32) -> Option<usize> {
        self.spis.iter().position(|known| *known == spi)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::inbound, *};
    use std::collections::BTreeSet;

    fn spis(sad: &Sad) -> BTreeSet<u32> {
        let buckets = sad.pages.iter().flat_map(|page| page.iter());
        let sas = buckets.flat_map(|bucket| bucket.sas.iter().flatten());
        sas.map(|sa| sa.id.spi.get()).collect()
    }

    #[test]
    fn every_spi_is_found_and_no_other() {
        let mut sad = Sad::default();
        let spis: Vec<u32> = (0..2000).map(|number| 256 + number * 4099).collect();
        for spi in &spis {
            sad.insert(Arc::new(inbound(*spi)));
        }
        for spi in spis {
            assert_eq!(sad.find(spi).unwrap().id.spi.get(), spi);
            assert!(sad.find(spi + 1).is_none());
        }
        assert!(sad.find(0).is_none());
    }

    /// Seeded; SPIs that share few homes, so that buckets overflow into each other, around the end too.
    #[test]
    fn what_comes_and_goes_in_any_order_leaves_nothing_behind() {
        let homes = [0u32, 1, 15];
        let crowded = Sad::default();
        let home = |spi: &u32| crowded.search(*spi).next().unwrap() as u32;
        let all = (256u32..).filter(|spi| homes.contains(&home(spi)));
        let all: Vec<u32> = all.take(36).collect();
        let (mut sad, mut known, mut seed) = (crowded.clone(), BTreeSet::new(), 1u32);
        for _ in 0..5000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let spi = all[(seed >> 16) as usize % all.len()];
            let before = sad.clone();
            let before_known = known.clone();
            if known.remove(&spi) {
                sad.remove(spi);
            } else {
                known.insert(spi);
                sad.insert(Arc::new(inbound(spi)));
            }
            for spi in &all {
                assert_eq!(sad.find(*spi).is_some(), known.contains(spi));
            }
            assert_eq!(spis(&before), before_known, "a snapshot never changes");
            assert_eq!(sad.used, known.len());
            sad.remove(255);
        }
        for spi in known {
            sad.remove(spi);
        }
        let buckets = sad.pages.iter().flat_map(|page| page.iter());
        assert_eq!(buckets.map(|bucket| bucket.passed).sum::<u32>(), 0);
        assert!(spis(&sad).is_empty());
    }
}
