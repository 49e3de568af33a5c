//! One function for each parser of foreign bytes. Each must take anything: no panic, and what the
//! function itself asserts (nothing forged comes through, nothing is amplified, what is sealed opens).
//!
//! ```text
//!   corpus/NAME/*  ─┐                       ┌─ bin/fuzz-smoke.rs   seeded mutations, bounded, any toolchain
//!   seeds()        ─┴─▶ fn(&[u8]) ◀─────────┴─ tests/fuzz/         cargo-fuzz: coverage-guided, nightly
//! ```

mod aead;
mod handshake;
mod packets;
mod texts;
mod vici;
mod xfrm;

pub use aead::{aead_aesni, aead_avx512, aead_portable, aead_vaes256};
pub use handshake::{handshake_answer, handshake_first};
pub use packets::{decrypted_payload, esp_datagram, inner_packet, outer_packet};
pub use texts::{config_file, strongswan_settings, values};
pub use vici::vici_stream;
pub use xfrm::{xfrm_client, xfrm_datagram};

/// A function that takes foreign bytes, and inputs to start from.
pub struct Target {
    /// Its name, and its corpus directory's.
    pub name: &'static str,
    /// Takes any bytes; panics on a bug.
    pub run: fn(&[u8]),
    /// Inputs that reach deep.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "inner_packet",
        run: inner_packet,
        seeds: packets::inner_seeds,
    },
    Target {
        name: "esp_datagram",
        run: esp_datagram,
        seeds: packets::esp_seeds,
    },
    Target {
        name: "outer_packet",
        run: outer_packet,
        seeds: packets::outer_seeds,
    },
    Target {
        name: "decrypted_payload",
        run: decrypted_payload,
        seeds: packets::decrypted_seeds,
    },
    Target {
        name: "handshake_first",
        run: handshake_first,
        seeds: handshake::first_seeds,
    },
    Target {
        name: "handshake_answer",
        run: handshake_answer,
        seeds: handshake::answer_seeds,
    },
    Target {
        name: "config_file",
        run: config_file,
        seeds: texts::config_seeds,
    },
    Target {
        name: "aead_avx512",
        run: aead_avx512,
        seeds: aead::seeds,
    },
    Target {
        name: "aead_vaes256",
        run: aead_vaes256,
        seeds: aead::seeds,
    },
    Target {
        name: "aead_aesni",
        run: aead_aesni,
        seeds: aead::seeds,
    },
    Target {
        name: "aead_portable",
        run: aead_portable,
        seeds: aead::seeds,
    },
    Target {
        name: "values",
        run: values,
        seeds: texts::value_seeds,
    },
    Target {
        name: "vici_stream",
        run: vici_stream,
        seeds: vici::seeds,
    },
    Target {
        name: "xfrm_datagram",
        run: xfrm_datagram,
        seeds: xfrm::datagram_seeds,
    },
    Target {
        name: "xfrm_client",
        run: xfrm_client,
        seeds: xfrm::client_seeds,
    },
    Target {
        name: "strongswan_settings",
        run: strongswan_settings,
        seeds: texts::settings_seeds,
    },
];
