//! `esplane show tunnels`: each tunnel at length; those of a strongSwan as `swanctl --list-sas` shows them.

use super::{state, traffic};
use crate::status::{ChildRow, PeerRow, SaRow, Status, StrongswanRow};
use serde::Serialize;
use std::io::{self, Write};

/// The same as JSON.
#[derive(Serialize)]
pub(super) struct Rows<'a> {
    strongswan: &'a Option<StrongswanRow>,
    peers: &'a [PeerRow],
}

impl<'a> Rows<'a> {
    pub(super) fn of(status: &'a Status) -> Self {
        Self {
            strongswan: &status.strongswan,
            peers: &status.peers,
        }
    }
}

pub(super) fn write(status: &Status, output: &mut impl Write) -> io::Result<()> {
    let mut any = false;
    if let Some(strongswan) = &status.strongswan {
        if !strongswan.charon_answers {
            writeln!(
                output,
                "charon does not answer at {}; what it has negotiated is carried on",
                printable(&strongswan.vici)
            )?;
        }
        let mut children: Vec<&ChildRow> = strongswan.children.iter().collect();
        children.sort_by_key(|child| (&child.connection, child.ike_unique_id));
        for same_ike in children
            .chunk_by(|a, b| (&a.connection, a.ike_unique_id) == (&b.connection, b.ike_unique_id))
        {
            any = true;
            connection(same_ike, output)?;
            for one in same_ike {
                child(one, status, output)?;
            }
        }
    }
    for peer in status
        .peers
        .iter()
        .filter(|peer| peer.keyed_by != "strongswan")
    {
        any = true;
        let (name, keyed_by) = (printable(&peer.name), printable(&peer.keyed_by));
        writeln!(
            output,
            "{name}: keyed by {keyed_by}, {}",
            printable(&state(peer))
        )?;
        if let Some(endpoint) = &peer.endpoint {
            writeln!(output, "  remote {}", printable(endpoint))?;
        }
        if !peer.worker_ports.is_empty() {
            let ports: Vec<String> = peer.worker_ports.iter().map(u16::to_string).collect();
            writeln!(output, "  workers send from ports {} too", ports.join(", "))?;
        }
        sas(status, &peer.name, "  ", output)?;
    }
    match any {
        true => Ok(()),
        false => writeln!(output, "there is no tunnel"),
    }
}

fn connection(children: &[&ChildRow], output: &mut impl Write) -> io::Result<()> {
    let Some(first) = children.first() else {
        return Ok(());
    };
    let name = printable(&first.connection);
    match first.ike_unique_id {
        Some(number) => writeln!(output, "{name}: #{number}")?,
        None => writeln!(output, "{name}: no IKE_SA")?,
    }
    for (side, id, address) in [
        ("local ", &first.local_id, &first.local),
        ("remote", &first.remote_id, &first.remote),
    ] {
        if let Some(address) = address {
            writeln!(
                output,
                "  {side} '{}' @ {}",
                printable(id),
                printable(address)
            )?;
        }
    }
    Ok(())
}

fn child(child: &ChildRow, status: &Status, output: &mut impl Write) -> io::Result<()> {
    let mut line = format!("  {}:", printable(&child.child));
    for number in &child.unique_ids {
        line += &format!(" #{number}");
    }
    if child.reqid != 0 {
        line += &format!(", reqid {}", child.reqid);
    }
    line += &format!(", {}", printable(&child.state));
    let sa = status.sas.iter().find(|sa| sa.peer == child.name);
    if let Some(sa) = sa {
        let over = if sa.encapsulation == "udp" {
            "TUNNEL-in-UDP"
        } else {
            "TUNNEL"
        };
        let esn = if sa.esn { "/ESN" } else { "" };
        line += &format!(", {over}, ESP:{}{esn}", printable(&sa.suite));
    }
    writeln!(output, "{}", line.replace(":,", ":"))?;
    sas(status, &child.name, "    ", output)?;
    for (side, networks) in [("local ", &child.local_ts), ("remote", &child.remote_ts)] {
        writeln!(output, "    {side} {}", printable(&networks.join(" ")))?;
    }
    for problem in &child.problems {
        writeln!(output, "    ! {}", printable(problem))?;
    }
    Ok(())
}

fn sas(status: &Status, tunnel: &str, indent: &str, output: &mut impl Write) -> io::Result<()> {
    for sa in status.sas.iter().filter(|sa| sa.peer == tunnel) {
        let spi = printable(sa.spi.trim_start_matches("0x"));
        let way = if sa.direction == "inbound" {
            "in "
        } else {
            "out"
        };
        let role = role(sa);
        writeln!(
            output,
            "{indent}{way} {spi}, {}{role}",
            traffic(&sa.traffic)
        )?;
    }
    Ok(())
}

fn role(sa: &SaRow) -> &'static str {
    match sa.active {
        true => "",
        false => ", stands by",
    }
}

/// What came over the network must not move the terminal's cursor.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Traffic;

    #[test]
    fn strongswans_tunnels_stand_by_connection_and_child_and_others_below() {
        let sa = |direction: &str, spi: &str, active| SaRow {
            peer: "gw/net".to_owned(),
            direction: direction.to_owned(),
            spi: spi.to_owned(),
            suite: "aes256gcm16".to_owned(),
            esn: true,
            active,
            encapsulation: "udp".to_owned(),
            traffic: Traffic {
                packets: 3,
                bytes: 252,
                ..Traffic::default()
            },
            ..SaRow::default()
        };
        let child = |child: &str| ChildRow {
            name: format!("gw/{child}"),
            connection: "gw".to_owned(),
            child: child.to_owned(),
            ike_unique_id: Some(1),
            local_id: "berlin".to_owned(),
            remote_id: "paris\u{1b}[2J".to_owned(),
            local: Some("192.0.2.1:4500".to_owned()),
            remote: Some("192.0.2.2:4500".to_owned()),
            local_ts: vec!["10.1.0.0/16".to_owned()],
            remote_ts: vec!["10.2.0.0/16".to_owned(), "10.3.0.0/16".to_owned()],
            ..ChildRow::default()
        };
        let status = Status {
            strongswan: Some(StrongswanRow {
                charon_answers: true,
                children: vec![
                    ChildRow {
                        unique_ids: vec![3],
                        reqid: 1,
                        state: "INSTALLED".to_owned(),
                        ..child("net")
                    },
                    ChildRow {
                        ike_unique_id: None,
                        state: "ON DEMAND".to_owned(),
                        problems: vec!["it is in transport mode".to_owned()],
                        ..child("host")
                    },
                ],
                ..StrongswanRow::default()
            }),
            sas: vec![
                sa("outbound", "0xc2", true),
                sa("outbound", "0xc3", false),
                sa("inbound", "0xc1", true),
            ],
            peers: vec![
                PeerRow {
                    name: "gw/net".to_owned(),
                    keyed_by: "strongswan".to_owned(),
                    ..PeerRow::default()
                },
                PeerRow {
                    name: "rome".to_owned(),
                    keyed_by: "noise".to_owned(),
                    state: "connecting".to_owned(),
                    endpoint: Some("192.0.2.9:4501".to_owned()),
                    worker_ports: vec![20001, 20002],
                    ..PeerRow::default()
                },
            ],
            ..Status::default()
        };
        let mut output = Vec::new();
        write(&status, &mut output).unwrap();
        assert_eq!(
            String::from_utf8(output).unwrap(),
            "\
gw: no IKE_SA
  local  'berlin' @ 192.0.2.1:4500
  remote 'paris?[2J' @ 192.0.2.2:4500
  host: ON DEMAND
    local  10.1.0.0/16
    remote 10.2.0.0/16 10.3.0.0/16
    ! it is in transport mode
gw: #1
  local  'berlin' @ 192.0.2.1:4500
  remote 'paris?[2J' @ 192.0.2.2:4500
  net: #3, reqid 1, INSTALLED, TUNNEL-in-UDP, ESP:aes256gcm16/ESN
    out 0xc2, 252 B (3 packets)
    out 0xc3, 252 B (3 packets), stands by
    in  0xc1, 252 B (3 packets)
    local  10.1.0.0/16
    remote 10.2.0.0/16 10.3.0.0/16
rome: keyed by noise, connecting
  remote 192.0.2.9:4501
  workers send from ports 20001, 20002 too
"
            .replace("0xc", "c")
        );
    }
}
