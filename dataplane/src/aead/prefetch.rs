//! Hints that memory is soon read: it is on its way while other packets are worked on. With thousands of SAs, records and
//! keys lie in the outer caches, and each line that is asked for only when it is needed costs a hundred cycles.
#![allow(unsafe_code)]

/// The unit of caches.
const LINE_BYTES: usize = 64;

/// Asks for all lines of a value, which should be few. Changes nothing but time.
#[inline(always)]
pub fn prefetch<T: ?Sized>(value: &T) {
    let start = (&raw const *value).cast::<u8>();
    let mut line = start.map_addr(|address| address & !(LINE_BYTES - 1));
    let end = start.wrapping_add(size_of_val(value));
    while line < end {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which faults nowhere; every x86-64 has the instruction.
        unsafe {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.cast());
        }
        line = line.wrapping_add(LINE_BYTES);
    }
}
