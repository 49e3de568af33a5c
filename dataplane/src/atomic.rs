//! The atomics of [`crate::replay`] and [`crate::sequence`]: the CPU's, or loom's, which tries every order of what
//! several workers do (`tests/run loom`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
