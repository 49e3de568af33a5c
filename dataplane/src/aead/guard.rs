//! Not a byte outside the packet is touched: packets that end where the next page cannot be read, or that begin where
//! the page before cannot.
#![allow(unsafe_code)]

use super::*;
use std::{ptr, slice};

const PAGE_BYTES: usize = 4096;
/// Readable pages between the two that are not.
const PAGES: usize = 3;

/// Memory between two pages that nobody may touch.
struct Guarded(*mut u8);

impl Guarded {
    fn new() -> Self {
        let bytes = (PAGES + 2) * PAGE_BYTES;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        let start = start.cast::<u8>();
        // SAFETY: pages of the new mapping.
        let result = unsafe {
            let inner = start.add(PAGE_BYTES).cast();
            libc::mprotect(
                inner,
                PAGES * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        assert_eq!(result, 0);
        Self(start)
    }

    fn readable(&mut self) -> &mut [u8] {
        // SAFETY: mapped, readable and writable, and zeros at first.
        unsafe { slice::from_raw_parts_mut(self.0.add(PAGE_BYTES), PAGES * PAGE_BYTES) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, and nobody borrows it.
        unsafe { libc::munmap(self.0.cast(), (PAGES + 2) * PAGE_BYTES) };
    }
}

#[test]
fn packets_at_the_end_of_a_page_and_at_its_beginning() {
    let mut guarded = Guarded::new();
    let arena_bytes = PAGES * PAGE_BYTES;
    for aead in Aead::all() {
        for suite in AeadSuite::ALL {
            let secret = (&vec![5; suite.key_bytes()][..], [6; 4]);
            let key = AeadKey::new(aead, suite, secret, Esn::On).unwrap();
            for bytes in (0..=700).chain([1400, 1401, 4096, 8960]) {
                let job = |start: usize| Job {
                    start: start as u32,
                    bytes: bytes as u32,
                    high: 7,
                    more: 0,
                };
                let (first, last) = (HEADER_BYTES, arena_bytes - bytes - ICV_BYTES);
                let between = HEADER_BYTES + bytes + ICV_BYTES;
                let mut runs = vec![vec![job(first)], vec![job(last)]];
                if 5 * between <= arena_bytes {
                    // Four that are alike, with one of them at either end.
                    let (second, third) = (first + between, first + 2 * between);
                    runs.push(vec![job(first), job(second), job(third), job(last)]);
                    runs.push(vec![job(last), job(second), job(first), job(third)]);
                }
                for jobs in runs {
                    let memory = guarded.readable();
                    memory.fill(0x3c);
                    let (all, keys) = (
                        0..jobs.len(),
                        [Keyed {
                            key: &key,
                            end: jobs.len(),
                        }],
                    );
                    let arena = &mut Arena::over(memory);
                    assert!(
                        aead.seal(arena, &keys, &jobs).has_all(all.clone()),
                        "{} {bytes}",
                        aead.name()
                    );
                    assert!(
                        aead.open(arena, &keys, &jobs).has_all(all),
                        "{} {bytes}",
                        aead.name()
                    );
                    for job in &jobs {
                        let payload = &memory[job.start as usize..][..bytes];
                        assert!(payload.iter().all(|byte| *byte == 0x3c));
                    }
                }
            }
        }
    }
}
