//! What the demo has seen, as one JSON object or as a picture with figures.

use super::{
    gateways::REKEY_SECONDS,
    traffic::{ping::PingResult, tcp::TcpResult, udp::UdpResult},
    wiretap::WireResult,
};
use crate::status::Status;
use esplane_api::DropReason;
use serde::Serialize;
use std::{collections::BTreeMap, fmt::Write};

/// The result; its JSON is the demo's interface to programs.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether all of this is as it should be; then `problems` is empty.
    pub ok: bool,
    /// How long the traffic ran.
    pub seconds: u32,
    /// Pings in both directions.
    pub ping: PingResult,
    /// Numbered packets in both directions.
    pub udp: UdpResult,
    /// Bulk data from h1 to h2.
    pub tcp: TcpResult,
    /// Rekeys while the traffic ran.
    pub rekeys: u64,
    /// What the gateways dropped and should not have, by reason.
    pub drops: BTreeMap<String, u64>,
    /// What every healthy tunnel drops by design, by reason.
    pub drops_expected: BTreeMap<String, u64>,
    /// What kernels dropped on the way, by machine and interface: where to look if something is lost.
    pub drops_kernel: BTreeMap<String, u64>,
    /// What could be read between the gateways.
    pub wire: WireResult,
    /// The packets that found no SA.
    pub first_contact: FirstContact,
    /// Handshakes completed in all.
    pub handshakes: u64,
    /// How keys were agreed on.
    pub handshake: String,
    /// How packets were sealed, and by which implementation.
    pub aead: String,
    /// Whether one of the two directions was IPv6.
    pub ipv6: bool,
    /// What is wrong, in words.
    pub problems: Vec<String>,
}

/// The pings sent while there was no SA.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FirstContact {
    /// Sent.
    pub sent: u64,
    /// Answered.
    pub received: u64,
    /// How long the one that waited longest took, handshake included.
    pub longest_ms: f64,
}

/// What a report is made of.
pub struct Observed {
    /// See [`Report`].
    pub seconds: u32,
    /// See [`Report`].
    pub ping: PingResult,
    /// See [`Report`].
    pub udp: UdpResult,
    /// See [`Report`].
    pub tcp: TcpResult,
    /// See [`Report`].
    pub wire: WireResult,
    /// See [`Report`].
    pub first_contact: FirstContact,
    /// Of both gateways, before the traffic.
    pub before: [Status; 2],
    /// Of both gateways, after it.
    pub after: [Status; 2],
    /// See [`Report`].
    pub drops_kernel: BTreeMap<String, u64>,
    /// See [`Report`].
    pub ipv6: bool,
}

/// Rekeys so far. Each end counts each, so the two differ only while one is under way.
pub fn rekeys(statuses: &[Status; 2]) -> u64 {
    let counts = statuses.iter().map(|status| status.handshakes.rekeys);
    counts.max().unwrap_or(0)
}

/// Rekeys that must have happened: one in three seconds, where one in two is asked for, leaves room for
/// jitter and a busy machine.
fn rekeys_required(seconds: u32) -> u64 {
    (seconds / (REKEY_SECONDS + 1)).into()
}

impl Report {
    /// Judges.
    pub fn new(observed: Observed) -> Self {
        let Observed {
            seconds,
            ping,
            udp,
            tcp,
            wire,
            first_contact,
            before,
            after,
            drops_kernel,
            ipv6,
        } = observed;
        let (drops, drops_expected) = drops(&after);
        let peer = after[0].peers.first().cloned().unwrap_or_default();
        let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "?".to_owned());
        let mut report = Self {
            ok: false,
            seconds,
            ping,
            udp,
            tcp,
            rekeys: rekeys(&after).saturating_sub(rekeys(&before)),
            drops,
            drops_expected,
            drops_kernel,
            wire,
            first_contact,
            handshakes: after[0].handshakes.completed,
            handshake: format!("Noise IKpsk2, X25519 + {}", or_unknown(peer.kem)),
            aead: format!("{} ({})", or_unknown(peer.suite), after[0].aead),
            ipv6,
            problems: Vec::new(),
        };
        report.problems = report.find_problems();
        report.ok = report.problems.is_empty();
        report
    }

    fn find_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut expect = |fine: bool, problem: String| {
            if !fine {
                problems.push(problem);
            }
        };
        let lost = |sent: u64, received: u64| sent.saturating_sub(received);
        let FirstContact { sent, received, .. } = self.first_contact;
        expect(
            sent > 0 && received == sent,
            format!(
                "{} of {sent} pings sent before there was an SA were not answered",
                lost(sent, received)
            ),
        );
        let ping = &self.ping;
        expect(
            ping.is_perfect(),
            format!(
                "{} of {} pings lost, {} answered twice",
                lost(ping.sent, ping.received),
                ping.sent,
                ping.duplicated
            ),
        );
        let udp = &self.udp;
        expect(
            udp.is_perfect(),
            format!(
                "{} of {} UDP packets lost, {} received twice, {} damaged",
                lost(udp.sent, udp.received),
                udp.sent,
                udp.duplicated,
                udp.corrupted
            ),
        );
        let tcp = &self.tcp;
        expect(
            tcp.is_perfect(),
            format!(
                "TCP carried {} of {} bytes, intact: {}",
                tcp.bytes_received, tcp.bytes_sent, tcp.intact
            ),
        );
        let required = rekeys_required(self.seconds);
        expect(
            self.rekeys >= required,
            format!(
                "{} rekeys in {} s; at least {required} were due",
                self.rekeys, self.seconds
            ),
        );
        for (name, count) in &self.drops {
            expect(false, format!("{count} packets dropped: {}", meaning(name)));
        }
        expect(
            self.wire.is_perfect(),
            format!(
                "on the wire: {} packets in clear, {} of {} inspected ESP packets readable",
                self.wire.clear_packets,
                self.wire.payloads_readable,
                self.wire.esp_packets_inspected
            ),
        );
        problems
    }

    /// For programs.
    pub fn to_json(&self) -> String {
        // Numbers, texts and maps with text keys: cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// For people.
    pub fn to_text(&self, colour: bool) -> String {
        let mut text = String::new();
        let outcome = self.draw(&mut text, &Paint { colour });
        debug_assert!(outcome.is_ok(), "writing to a String cannot fail");
        text
    }

    fn draw(&self, out: &mut String, paint: &Paint) -> std::fmt::Result {
        self.picture(out, paint)?;
        writeln!(out)?;
        self.table(out, paint)?;
        writeln!(out)?;
        if self.ok {
            let lossless = paint.good("zero packets lost");
            return writeln!(
                out,
                "The tunnel carried everything under fresh keys {} times over: {lossless}, nothing in clear.",
                self.rekeys + 1
            );
        }
        writeln!(out, "{}", paint.bad("Not as it should be:"))?;
        for problem in &self.problems {
            writeln!(out, "  - {problem}")?;
        }
        for (place, count) in &self.drops_kernel {
            writeln!(out, "    (the kernel dropped {count} at {place})")?;
        }
        Ok(())
    }

    fn picture(&self, out: &mut String, paint: &Paint) -> std::fmt::Result {
        let esp = paint.good("════ ESP ════");
        let (v6a, v6b) = if self.ipv6 {
            ("fd00:a::/64", "fd00:b::/64")
        } else {
            ("", "")
        };
        let back = if self.ipv6 { "IPv6" } else { "IPv4" };
        writeln!(
            out,
            " private network A                     the Internet                      private network B"
        )?;
        writeln!(
            out,
            " 10.1.0.0/24 {v6a:<11}    198.51.100.0/24   203.0.113.0/24    10.2.0.0/24 {v6b}"
        )?;
        writeln!(
            out,
            " ┌──────┐     ┌─────────┐             ┌──────────┐             ┌─────────┐     ┌──────┐"
        )?;
        writeln!(
            out,
            " │  h1  ├─────┤ gateway ╞{esp}╡ internet ╞{esp}╡ gateway ├─────┤  h2  │"
        )?;
        writeln!(
            out,
            " │      │     │   g1    │             │ wiretap  │             │   g2    │     │      │"
        )?;
        writeln!(
            out,
            " └──────┘     └─────────┘             └──────────┘             └─────────┘     └──────┘"
        )?;
        writeln!(
            out,
            "     ─── TCP bulk, UDP and ping over IPv4 ──▶        ◀── UDP and ping over {back} ───"
        )
    }

    fn table(&self, out: &mut String, paint: &Paint) -> std::fmt::Result {
        let Self {
            ping,
            udp,
            tcp,
            wire,
            ..
        } = self;
        let mut row = |name: &str, fine: bool, figures: String| {
            let mark = if fine {
                paint.good("✔")
            } else {
                paint.bad("✘")
            };
            writeln!(out, " {mark} {name:<9} {figures}")
        };
        row(
            "ping",
            ping.is_perfect(),
            format!(
                "{} sent, {} answered; {:.2} / {:.2} / {:.2} ms min/avg/max",
                grouped(ping.sent),
                grouped(ping.received),
                ping.rtt_ms.min,
                ping.rtt_ms.avg,
                ping.rtt_ms.max
            ),
        )?;
        row(
            "UDP",
            udp.is_perfect(),
            format!(
                "{} numbered packets sent, {} received intact, {} reordered",
                grouped(udp.sent),
                grouped(udp.received),
                grouped(udp.reordered)
            ),
        )?;
        row(
            "TCP",
            tcp.is_perfect(),
            format!(
                "{:.2} Gbit/s; {:.2} GB, every byte checked, {} segments retransmitted",
                tcp.gbit_per_second,
                tcp.bytes_received as f64 / 1e9,
                tcp.retransmitted_segments
            ),
        )?;
        row(
            "rekeys",
            self.rekeys >= rekeys_required(self.seconds),
            format!(
                "{} under this load, in {} s; {}",
                self.rekeys, self.seconds, self.handshake
            ),
        )?;
        row("sealed by", true, self.aead.clone())?;
        row(
            "drops",
            self.drops.is_empty(),
            drops_text(&self.drops, &self.drops_expected),
        )?;
        row(
            "wire",
            wire.is_perfect(),
            format!(
                "{} packets in clear; {} of {} ESP packets inspected readable",
                wire.clear_packets,
                wire.payloads_readable,
                grouped(wire.esp_packets_inspected)
            ),
        )?;
        let first = &self.first_contact;
        row(
            "first",
            first.received == first.sent,
            format!(
                "{} pings sent without an SA: held, {} answered within {:.1} ms, handshake included",
                first.sent, first.received, first.longest_ms
            ),
        )
    }
}

/// Unexpected and expected drops of both gateways.
fn drops(statuses: &[Status; 2]) -> (BTreeMap<String, u64>, BTreeMap<String, u64>) {
    let (mut unexpected, mut expected) = (BTreeMap::new(), BTreeMap::new());
    for (name, count) in statuses.iter().flat_map(|status| &status.drops) {
        let by_design = reason(name).is_some_and(DropReason::is_expected);
        let map = if by_design {
            &mut expected
        } else {
            &mut unexpected
        };
        if *count > 0 {
            *map.entry(name.clone()).or_default() += count;
        }
    }
    (unexpected, expected)
}

fn reason(name: &str) -> Option<DropReason> {
    let mut all = DropReason::ALL.iter().copied();
    all.find(|reason| reason.name() == name)
}

fn meaning(name: &str) -> String {
    match reason(name) {
        Some(reason) => format!("{name}. {}", reason.meaning()),
        None => name.to_owned(),
    }
}

fn drops_text(unexpected: &BTreeMap<String, u64>, expected: &BTreeMap<String, u64>) -> String {
    let list = |map: &BTreeMap<String, u64>| {
        let entries: Vec<_> = map
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        entries.join(", ")
    };
    let mut text = match unexpected.is_empty() {
        true => "none".to_owned(),
        false => list(unexpected),
    };
    if !expected.is_empty() {
        text += &format!(" (by design: {})", list(expected));
    }
    text
}

/// 1234567 as 1,234,567.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Colours, or none.
struct Paint {
    colour: bool,
}

impl Paint {
    fn good(&self, text: &str) -> String {
        self.with("32", text)
    }

    fn bad(&self, text: &str) -> String {
        self.with("1;31", text)
    }

    fn with(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{demo::traffic::ping::RoundTrip, status::PeerRow};

    fn perfect() -> Observed {
        let before = [Status::default(), Status::default()];
        let mut after = before.clone();
        for status in &mut after {
            status.handshakes.rekeys = 4;
            status.handshakes.completed = 5;
            status.drops.insert("dummy_packet".to_owned(), 5);
            status.aead = "portable".to_owned();
            status.peers.push(PeerRow {
                suite: Some("aes128gcm16".to_owned()),
                kem: Some("mlkem768".to_owned()),
                ..PeerRow::default()
            });
        }
        Observed {
            seconds: 10,
            ping: PingResult {
                sent: 1000,
                received: 1000,
                duplicated: 0,
                rtt_ms: RoundTrip {
                    min: 0.1,
                    avg: 0.3,
                    max: 4.0,
                },
            },
            udp: UdpResult {
                sent: 200_000,
                received: 200_000,
                reordered: 3,
                ..UdpResult::default()
            },
            tcp: TcpResult {
                gbit_per_second: 5.0,
                bytes_sent: 9,
                bytes_received: 9,
                intact: true,
                retransmitted_segments: 0,
            },
            wire: WireResult {
                esp_packets_inspected: 900,
                ..WireResult::default()
            },
            first_contact: FirstContact {
                sent: 5,
                received: 5,
                longest_ms: 4.0,
            },
            before,
            after,
            drops_kernel: BTreeMap::new(),
            ipv6: true,
        }
    }

    #[test]
    fn a_perfect_run_is_ok_and_its_json_has_the_promised_names() {
        let report = Report::new(perfect());
        assert!(report.ok, "{:?}", report.problems);
        let json: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
        for pointer in [
            "/ok",
            "/ping/sent",
            "/ping/received",
            "/udp/sent",
            "/udp/received",
            "/tcp/gbit_per_second",
            "/rekeys",
            "/drops",
            "/seconds",
            "/aead",
            "/handshake",
        ] {
            assert!(json.pointer(pointer).is_some(), "{pointer}");
        }
        assert_eq!(json["rekeys"], 4);
        assert_eq!(json["drops"], serde_json::json!({}));
        assert_eq!(json["drops_expected"]["dummy_packet"], 10);
        assert!(!report.to_text(false).contains('\x1b'));
    }

    #[test]
    fn each_flaw_alone_is_a_problem() {
        type Flaw = fn(&mut Observed);
        let flaws: [(&str, Flaw); 12] = [
            ("1 of 1000 pings lost", |o| o.ping.received -= 1),
            ("2 answered twice", |o| o.ping.duplicated = 2),
            ("1 of 200000 UDP packets lost", |o| o.udp.received -= 1),
            ("1 received twice", |o| o.udp.duplicated = 1),
            ("1 damaged", |o| o.udp.corrupted = 1),
            ("8 of 9 bytes", |o| o.tcp.bytes_received = 8),
            ("intact: false", |o| o.tcp.intact = false),
            ("1 rekeys in 10 s", |o| {
                o.before.iter_mut().for_each(|s| s.handshakes.rekeys = 3)
            }),
            ("7 packets dropped: no_policy", |o| {
                o.after[1].drops.insert("no_policy".to_owned(), 7);
            }),
            ("1 packets in clear", |o| o.wire.clear_packets = 1),
            ("0 of 0 inspected", |o| o.wire.esp_packets_inspected = 0),
            ("1 of 5 pings sent before", |o| o.first_contact.received = 4),
        ];
        for (words, flaw) in flaws {
            let mut observed = perfect();
            flaw(&mut observed);
            let report = Report::new(observed);
            assert!(
                !report.ok && report.problems.len() == 1,
                "{words}: {:?}",
                report.problems
            );
            assert!(
                report.problems[0].contains(words),
                "{words}: {:?}",
                report.problems
            );
            assert!(report.to_text(true).contains(words));
        }
    }

    #[test]
    fn digits_are_grouped_by_thousands() {
        let texts = [0, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567"]);
    }
}
