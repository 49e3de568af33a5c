//! The atomics of [`crate::replay`], [`crate::sequence`] and [`crate::usage`]: the CPU's, or loom's, which tries every order
//! of what several workers do (`tests/run loom`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};
