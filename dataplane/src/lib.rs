//! Pure ESP: batches of packets in, batches of packets out. No I/O, no clock.
pub mod batch;
