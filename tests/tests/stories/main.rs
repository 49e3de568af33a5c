//! Scenarios an operator meets, each in a simulated world (see `esplane_tests::sim`): two or more
//! real gateways, a seeded network, a simulated clock. Every story also obeys the world's laws: no
//! byte of a private packet is ever on the wire in clear, and no (key, IV) pair is used twice.

mod attackers;
mod connecting;
mod misconfigured;
mod moving;
mod rekeying;
mod reloading;
mod restarting;
mod sequence_numbers;
mod weather;

use std::time::Duration;

const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}
