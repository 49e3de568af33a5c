//! What the demo tells while it runs.

use super::report::{FirstContact, grouped};
use std::io::{IsTerminal, stderr};

/// What is told on the way, on standard error: a line that renews itself on a terminal, else little.
pub struct Live {
    json: bool,
    terminal: bool,
}

/// One second of traffic.
pub struct Second {
    /// Its number, from 1.
    pub second: u32,
    /// How many there will be.
    pub of: u32,
    /// Sent and answered so far.
    pub ping: (u64, u64),
    /// Sent and received so far.
    pub udp: (u64, u64),
    /// Received in this second.
    pub tcp_bytes: u64,
    /// So far.
    pub rekeys: u64,
}

impl Live {
    /// Quiet for programs, unless somebody watches.
    pub fn new(json: bool) -> Self {
        Self {
            json,
            terminal: stderr().is_terminal(),
        }
    }

    fn is_quiet(&self) -> bool {
        self.json && !self.terminal
    }

    /// What will happen.
    pub fn title(&self, seconds: u32, user_namespace: bool) {
        if self.is_quiet() {
            return;
        }
        let place = if user_namespace {
            " in a user namespace"
        } else {
            ""
        };
        eprintln!(
            "Esplane demo: two gateways, one tunnel keyed by Noise, {seconds} s of real traffic{place}"
        );
    }

    /// The tunnel is up.
    pub fn first_contact(&self, first: &FirstContact) {
        if !self.is_quiet() {
            eprintln!(
                "tunnel up: {} of {} pings that found no SA were held and answered, within {:.1} ms",
                first.received, first.sent, first.longest_ms
            );
        }
    }

    /// How it goes.
    pub fn second(&self, now: &Second) {
        if !self.terminal {
            return;
        }
        let end = if now.second == now.of { "\n" } else { "" };
        eprint!(
            "\r\x1b[K{:>3}/{} s   ping {}/{}   UDP {}/{}   TCP {:.2} Gbit/s   rekeys {}{end}",
            now.second,
            now.of,
            grouped(now.ping.1),
            grouped(now.ping.0),
            grouped(now.udp.1),
            grouped(now.udp.0),
            now.tcp_bytes as f64 * 8.0 / 1e9,
            now.rekeys,
        );
    }
}
