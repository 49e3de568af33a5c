//! Hints that memory is soon read: it is on its way while other packets are worked on. With thousands of SAs, records and
//! keys lie in the outer caches, and each line that is asked for only when it is needed costs a hundred cycles.
#![allow(unsafe_code)]

/// The unit of caches.
const LINE_BYTES: usize = 64;

/// Asks for the line where a value begins. Changes nothing but time.
#[inline(always)]
pub fn prefetch<T: ?Sized>(value: &T) {
    prefetch_lines::<1, T>(value);
}

/// The same for so many lines.
#[inline(always)]
pub fn prefetch_lines<const LINES: usize, T: ?Sized>(value: &T) {
    let start = (&raw const *value).cast::<u8>();
    for line in 0..LINES {
        let line = start.wrapping_add(line * LINE_BYTES);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which faults nowhere; every x86-64 has the instruction.
        unsafe {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _unused = line;
    }
}
