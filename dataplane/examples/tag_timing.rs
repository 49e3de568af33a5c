//! Does the time that opening takes tell how much of a forged tag is right? After dudect (Reparaz, Balasch, Verbauwhede:
//! "Dude, is my code constant time?").
//!
//! ```text
//! cargo run --release -p esplane-dataplane --example tag_timing [IMPLEMENTATION...]
//! ```
//!
//! Two classes of forgeries of one packet, chosen at random: the tag wrong in its first byte, or in its last. Both are
//! refused, and both are wiped, so the only difference is where a comparison that stops early would stop. Welch's
//! t-test over the times, once all of them and once without the slowest tenth, which is mostly interrupts. |t| below 4.5 is
//! no evidence of a leak; above 10, run after run, is one. A third pair compares classes that are the same, to show what
//! this machine's noise makes of nothing. It is a measurement for people to read, not a test: noise decides single runs.

#![allow(
    clippy::disallowed_methods,
    reason = "measuring time is what it is for"
)]

use esplane_api::{AeadSuite, Esn};
use esplane_dataplane::{
    Aead, AeadKey, Arena,
    aead::{ICV_BYTES, Job, Keyed},
};
use std::{error::Error, hint::black_box, time::Instant};

const SAMPLES: usize = 400_000;
/// SPI, number, IV.
const HEADER_BYTES: usize = 16;
const PAYLOAD_BYTES: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let implementations = match names.is_empty() {
        true => Aead::all(),
        false => names
            .iter()
            .map(|name| Aead::named(name))
            .collect::<Result<_, _>>()?,
    };
    println!("{SAMPLES} forgeries each; t of all, and without the slowest tenth");
    for aead in implementations {
        let report = |what: &str, times: [Vec<u64>; 2]| {
            let [all, cropped] = [1.0, 0.9].map(|part| welch(&times, part));
            println!("{:9} {what:36} t = {all:7.2} {cropped:7.2}", aead.name());
        };
        report(
            "first byte wrong against last",
            measure(aead, [0, ICV_BYTES - 1])?,
        );
        report(
            "last byte wrong against last (noise)",
            measure(aead, [ICV_BYTES - 1; 2])?,
        );
    }
    Ok(())
}

/// Times of opening, in nanoseconds, with a tag wrong in the byte of either class.
fn measure(aead: Aead, wrong_bytes: [usize; 2]) -> Result<[Vec<u64>; 2], Box<dyn Error>> {
    let key = AeadKey::new(aead, AeadSuite::Aes128Gcm16, (&[7; 16], [3; 4]), Esn::Off)?;
    let keys = [Keyed { key: &key, end: 1 }];
    let jobs = [Job {
        start: HEADER_BYTES as u32,
        bytes: PAYLOAD_BYTES as u32,
        ..Job::default()
    }];
    let mut sealed = [0xa5; HEADER_BYTES + PAYLOAD_BYTES + ICV_BYTES];
    assert!(
        aead.seal(&mut Arena::over(&mut sealed), &keys, &jobs)
            .has(0)
    );
    let mut times = [const { Vec::new() }; 2];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..SAMPLES {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let class = (random >> 40 & 1) as usize;
        let mut forged = sealed;
        // The same work for both classes: an index, not a branch.
        forged[HEADER_BYTES + PAYLOAD_BYTES + wrong_bytes[class]] ^= 0x40;
        black_box(&mut forged);
        let begun = Instant::now();
        let arena = &mut Arena::over(black_box(&mut forged));
        let opened = aead.open(arena, black_box(&keys), black_box(&jobs));
        let took = begun.elapsed();
        assert!(!opened.has(0), "a forgery was accepted");
        times[class].push(took.as_nanos() as u64);
    }
    Ok(times)
}

/// Welch's t of two classes, of which only times below the quantile `part` of both together count.
fn welch(times: &[Vec<u64>; 2], part: f64) -> f64 {
    let mut together = times.concat();
    together.sort_unstable();
    let limit = together[(part * (together.len() - 1) as f64) as usize];
    let [a, b] = [0, 1].map(|class: usize| {
        let counted: Vec<f64> = times[class]
            .iter()
            .filter(|t| **t <= limit)
            .map(|t| *t as f64)
            .collect();
        let n = counted.len() as f64;
        let mean = counted.iter().sum::<f64>() / n;
        let variance = counted.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / (n - 1.0);
        (mean, variance / n)
    });
    (a.0 - b.0) / (a.1 + b.1).sqrt()
}
