//! `esplane show`: asks the daemon for its status and prints it for people, or as JSON.
//!
//! ```text
//!   fetch.rs ──Status──▶ print ──rows──▶ table.rs
//!   (sockets, HTTP)        └────────────▶ tunnels.rs
//! ```

use crate::{
    cli::ShowWhat,
    status::{PeerRow, SaRow, Status, Traffic},
};
use esplane_api::DropReason;
use std::io::{self, Write};
use table::{Table, bytes, duration};

mod fetch;
mod table;
mod tunnels;

pub use fetch::{ShowError, Target, fetch};

/// Prints one table of a status, or the same rows as JSON.
pub fn print(
    status: &Status,
    what: ShowWhat,
    json: bool,
    output: &mut impl Write,
) -> io::Result<()> {
    if json {
        let rows = match what {
            ShowWhat::Peers => serde_json::to_value(&status.peers),
            ShowWhat::Tunnels => serde_json::to_value(tunnels::Rows::of(status)),
            ShowWhat::Sas => serde_json::to_value(&status.sas),
            ShowWhat::Routes => serde_json::to_value(&status.routes),
            ShowWhat::Drops => serde_json::to_value(&status.drops),
        };
        serde_json::to_writer_pretty(&mut *output, &rows?)?;
        return writeln!(output);
    }
    match what {
        ShowWhat::Peers => {
            headline(status, output)?;
            peers(status).write(output)
        }
        ShowWhat::Tunnels => {
            headline(status, output)?;
            tunnels::write(status, output)
        }
        ShowWhat::Sas => sas(status).write(output),
        ShowWhat::Routes => routes(status).write(output),
        ShowWhat::Drops => drops(status).write(output),
    }
}

fn headline(status: &Status, output: &mut impl Write) -> io::Result<()> {
    let up = status.peers.iter().filter(|peer| peer.up).count();
    writeln!(
        output,
        "{}: esplane {}, up {}, {}, {up} of {} tunnels up, {} rekeys",
        status.node,
        status.version,
        duration(status.uptime_seconds),
        match &status.not_ready_because {
            Some(reason) => format!("not ready ({reason})"),
            None => "ready".to_owned(),
        },
        status.peers.len(),
        status.handshakes.rekeys,
    )
}

fn peers(status: &Status) -> Table {
    let mut table = Table::new(
        &[
            "PEER",
            "ENDPOINT",
            "STATE",
            "HANDSHAKE",
            "RECEIVED",
            "SENT",
            "SUITE",
            "KEM",
        ],
        "no peers are configured",
    );
    for peer in &status.peers {
        table.row([
            peer.name.clone(),
            or_dash(&peer.endpoint),
            state(peer),
            peer.last_handshake_seconds_ago
                .map_or("-".to_owned(), |seconds| {
                    format!("{} ago", duration(seconds))
                }),
            traffic(&peer.received),
            traffic(&peer.sent),
            or_dash(&peer.suite),
            or_dash(&peer.kem),
        ]);
    }
    table
}

fn state(peer: &PeerRow) -> String {
    match (peer.up, peer.state.as_str()) {
        (true, "" | "up") => "up".to_owned(),
        (true, state) => format!("up, {state}"),
        (false, "") => "down".to_owned(),
        (false, state) => state.to_owned(),
    }
}

fn sas(status: &Status) -> Table {
    let mut table = Table::new(
        &[
            "PEER",
            "DIRECTION",
            "SPI",
            "SUITE",
            "ESN",
            "FROM",
            "TO",
            "OVER",
            "SEQUENCE",
            "CARRIED",
            "ROLE",
        ],
        "no SA is installed",
    );
    for sa in &status.sas {
        let inbound = sa.direction == "inbound";
        let (from, to) = match inbound {
            true => (&sa.remote, &sa.local),
            false => (&sa.local, &sa.remote),
        };
        table.row([
            sa.peer.clone(),
            sa.direction.clone(),
            sa.spi.clone(),
            sa.suite.clone(),
            if sa.esn { "on" } else { "off" }.to_owned(),
            from.clone(),
            to.clone(),
            sa.encapsulation.clone(),
            sa.sequence.to_string(),
            traffic(&sa.traffic),
            role(sa, inbound),
        ]);
    }
    table
}

fn role(sa: &SaRow, inbound: bool) -> String {
    let role = match (inbound, sa.active) {
        (true, _) => "receives",
        (false, true) => "sends",
        (false, false) => "stands by",
    };
    match sa.worker {
        Some(worker) => format!("{role} for worker {worker}"),
        None => role.to_owned(),
    }
}

fn routes(status: &Status) -> Table {
    let mut table = Table::new(
        &["DESTINATION", "PEER", "METRIC", "STATE"],
        "no network is protected",
    );
    for route in &status.routes {
        table.row([
            route.destination.clone(),
            route.peer.clone(),
            route.metric.to_string(),
            match (route.installed, &route.problem) {
                (true, _) => "installed".to_owned(),
                (false, None) => "not installed".to_owned(),
                (false, Some(problem)) => format!("not installed: {problem}"),
            },
        ]);
    }
    table
}

/// Only what happened; the rest is silence.
fn drops(status: &Status) -> Table {
    let mut table = Table::new(&["PACKETS", "REASON", "MEANING"], "no packet was dropped");
    for reason in DropReason::ALL {
        let count = status.dropped(*reason);
        if count > 0 {
            table.row([
                count.to_string(),
                reason.name().to_owned(),
                reason.meaning().to_owned(),
            ]);
        }
    }
    table
}

fn or_dash(text: &Option<String>) -> String {
    text.clone().unwrap_or_else(|| "-".to_owned())
}

fn traffic(traffic: &Traffic) -> String {
    format!("{} ({} packets)", bytes(traffic.bytes), traffic.packets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::RouteRow;

    fn printed(status: &Status, what: ShowWhat) -> String {
        let mut output = Vec::new();
        print(status, what, false, &mut output).unwrap();
        String::from_utf8(output).unwrap()
    }

    fn two_peers() -> Status {
        let paris = PeerRow {
            name: "paris".to_owned(),
            endpoint: Some("192.0.2.7:4500".to_owned()),
            state: "established".to_owned(),
            up: true,
            last_handshake_seconds_ago: Some(75),
            suite: Some("aes128gcm16".to_owned()),
            kem: Some("ml-kem-768".to_owned()),
            received: Traffic {
                packets: 3,
                bytes: 1536,
                ..Traffic::default()
            },
            ..PeerRow::default()
        };
        let rome = PeerRow {
            name: "rome\u{1b}[2J".to_owned(),
            state: "connecting".to_owned(),
            ..PeerRow::default()
        };
        Status {
            node: "berlin".to_owned(),
            version: "0.1.0".to_owned(),
            uptime_seconds: 90_000,
            peers: vec![paris, rome],
            ..Status::default()
        }
    }

    #[test]
    fn peers_stand_in_columns_under_a_headline() {
        assert_eq!(
            printed(&two_peers(), ShowWhat::Peers),
            "\
berlin: esplane 0.1.0, up 1d 1h, ready, 1 of 2 tunnels up, 0 rekeys
PEER      ENDPOINT        STATE            HANDSHAKE   RECEIVED              SENT             SUITE        KEM
paris     192.0.2.7:4500  up, established  1m 15s ago  1.50 KiB (3 packets)  0 B (0 packets)  aes128gcm16  ml-kem-768
rome?[2J  -               connecting       -           0 B (0 packets)       0 B (0 packets)  -            -
"
        );
    }

    #[test]
    fn drops_come_with_what_they_mean_and_routes_with_what_is_missing() {
        let mut status = Status::default();
        assert_eq!(printed(&status, ShowWhat::Drops), "no packet was dropped\n");
        status.drops.insert("replay_duplicate".to_owned(), 12);
        assert_eq!(
            printed(&status, ShowWhat::Drops),
            "PACKETS  REASON            MEANING\n12       replay_duplicate  The sequence number has been received before\n"
        );
        status.routes.push(RouteRow {
            destination: "10.2.0.0/16".to_owned(),
            peer: "paris".to_owned(),
            metric: 100,
            installed: false,
            problem: Some("File exists".to_owned()),
        });
        assert!(
            printed(&status, ShowWhat::Routes)
                .ends_with("10.2.0.0/16  paris  100     not installed: File exists\n")
        );
        assert_eq!(printed(&status, ShowWhat::Sas), "no SA is installed\n");
    }

    #[test]
    fn an_sa_is_shown_from_sender_to_receiver() {
        let sa = |direction: &str, active| SaRow {
            peer: "paris".to_owned(),
            direction: direction.to_owned(),
            local: "192.0.2.1".to_owned(),
            remote: "192.0.2.2".to_owned(),
            active,
            ..SaRow::default()
        };
        let status = Status {
            sas: vec![
                sa("inbound", true),
                sa("outbound", true),
                sa("outbound", false),
            ],
            ..Status::default()
        };
        let shown = printed(&status, ShowWhat::Sas);
        let lines: Vec<&str> = shown.lines().collect();
        assert!(
            lines[1].contains("192.0.2.2  192.0.2.1") && lines[1].ends_with("receives"),
            "{shown}"
        );
        assert!(
            lines[2].contains("192.0.2.1  192.0.2.2") && lines[2].ends_with("sends"),
            "{shown}"
        );
        assert!(lines[3].ends_with("stands by"), "{shown}");
    }

    #[test]
    fn json_holds_the_same_rows() {
        let status = two_peers();
        let mut output = Vec::new();
        print(&status, ShowWhat::Peers, true, &mut output).unwrap();
        let rows: Vec<PeerRow> = serde_json::from_slice(&output).unwrap();
        assert_eq!(rows, status.peers);
    }
}
