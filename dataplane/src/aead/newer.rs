//! Safe code with the instructions of newer CPUs: a count of bits, bytes swapped while they are loaded, shifts that leave the
//! flags alone. A compiler uses them only where it is told that it may, and what is built for every x86-64 does without. No
//! cryptography, but here because here is where `unsafe` may be.

#![allow(unsafe_code)]

/// What is to be compiled so. Only what is inlined into `run` profits: have it and all it calls `#[inline(always)]`.
pub(crate) trait Work {
    /// Does it.
    fn run(self);
}

/// Does the work, compiled once for any CPU and once for those since Haswell and Zen.
#[inline]
pub(crate) fn on_newer_cpus(work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    if is_newer() {
        // SAFETY: this CPU has just been found to have all that `newer` asks for.
        unsafe { newer(work) };
        return;
    }
    work.run();
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn is_newer() -> bool {
    // Cached by the standard library.
    is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("movbe")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "popcnt,bmi1,bmi2,lzcnt,movbe")]
fn newer(work: impl Work) {
    work.run();
}
