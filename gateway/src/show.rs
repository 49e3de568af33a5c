//! `esplane show`: asks the daemon for its status and prints it for people, or as JSON.

use crate::{
    cli::ShowWhat,
    config::Api,
    status::{PeerRow, SaRow, Status, Traffic},
};
use esplane_api::DropReason;
use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

mod tunnels;

const TIMEOUT: Duration = Duration::from_secs(3);
/// Ten thousands of SAs fit.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// Where a daemon answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// HTTP over TCP, by address or name.
    Tcp(String),
    /// HTTP over a unix socket.
    Socket(PathBuf),
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// Neither ADDRESS:PORT nor a path.
    #[error(
        "`{0}` is neither ADDRESS:PORT nor a socket; write 127.0.0.1:9470 or /run/esplane/esplane.sock"
    )]
    Target(String),
    /// Both are `off`.
    #[error("this configuration turns the API off; set `api.socket` or `api.listen`")]
    ApiOff,
    /// Nobody is there.
    #[error("no daemon answers at {target} ({error}); is it running? (esplane run -c FILE)")]
    NoDaemon {
        /// Where.
        target: Target,
        /// Why not.
        error: io::Error,
    },
    /// Somebody is there, and not for us.
    #[error(
        "permission denied at {0}; run this as the user that runs the daemon, or ask its TCP address with --api"
    )]
    Denied(Target),
    /// It does not answer to the end.
    #[error("the daemon at {target} accepted the connection and did not answer ({error})")]
    Silent {
        /// Where.
        target: Target,
        /// Why not.
        error: io::Error,
    },
    /// It says it cannot.
    #[error("the daemon at {target} answered `{answer}`")]
    Refused {
        /// Where.
        target: Target,
        /// The status line.
        answer: String,
    },
    /// It is no Esplane, or of another version.
    #[error("what answers at {target} is no esplane of this version: {error}")]
    Foreign {
        /// Where.
        target: Target,
        /// Why not.
        error: String,
    },
}

impl Target {
    /// The socket of a configuration, else its TCP address.
    pub fn of(api: &Api) -> Result<Self, ShowError> {
        match (&api.socket, api.listen) {
            (Some(socket), _) => Ok(Self::Socket(socket.clone())),
            (None, Some(address)) => Ok(Self::Tcp(reachable(address).to_string())),
            (None, None) => Err(ShowError::ApiOff),
        }
    }
}

/// A daemon that listens on every address is asked on loopback.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

impl FromStr for Target {
    type Err = ShowError;
    fn from_str(text: &str) -> Result<Self, ShowError> {
        let port = text.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
        match port {
            _ if text.contains('/') => Ok(Self::Socket(text.into())),
            Some(Ok(port)) if port != 0 => Ok(Self::Tcp(text.to_owned())),
            _ => Err(ShowError::Target(text.to_owned())),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Socket(path) => path.display().fmt(f),
        }
    }
}

/// `GET /v1/status`.
pub fn fetch(target: &Target) -> Result<Status, ShowError> {
    let no_daemon = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => ShowError::Denied(target.clone()),
        _ => ShowError::NoDaemon {
            target: target.clone(),
            error,
        },
    };
    let answer = match target {
        Target::Tcp(address) => {
            let stream = connect(address).map_err(no_daemon)?;
            let timed = stream
                .set_read_timeout(Some(TIMEOUT))
                .and_then(|()| stream.set_write_timeout(Some(TIMEOUT)));
            timed.and_then(|()| ask(stream))
        }
        Target::Socket(path) => {
            let stream = UnixStream::connect(path).map_err(no_daemon)?;
            let timed = stream
                .set_read_timeout(Some(TIMEOUT))
                .and_then(|()| stream.set_write_timeout(Some(TIMEOUT)));
            timed.and_then(|()| ask(stream))
        }
    };
    let answer = answer.map_err(|error| ShowError::Silent {
        target: target.clone(),
        error,
    })?;
    understand(target, &answer)
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// HTTP/1.0, so that the answer ends where the connection does.
fn ask(mut stream: impl Read + Write) -> io::Result<Vec<u8>> {
    stream.write_all(b"GET /v1/status HTTP/1.0\r\nHost: esplane\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
    Ok(answer)
}

fn understand(target: &Target, answer: &[u8]) -> Result<Status, ShowError> {
    let foreign = |error: String| ShowError::Foreign {
        target: target.clone(),
        error,
    };
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.ok_or_else(|| foreign("the answer is not HTTP".to_owned()))?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let status_line = head.lines().next().unwrap_or_default();
    match status_line.split(' ').nth(1) {
        Some("200") if status_line.starts_with("HTTP/1.") => {}
        Some(_) if status_line.starts_with("HTTP/1.") => {
            return Err(ShowError::Refused {
                target: target.clone(),
                answer: status_line.escape_debug().to_string(),
            });
        }
        _ => return Err(foreign("the answer is not HTTP".to_owned())),
    }
    serde_json::from_slice(&answer[end + 4..]).map_err(|error| foreign(error.to_string()))
}

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

/// Three digits and a binary unit.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut value, mut unit) = (count as f64 / 1024.0, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// The two largest units.
fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Columns as wide as their widest cell.
struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
    empty: &'static str,
}

impl Table {
    fn new(head: &[&str], empty: &'static str) -> Self {
        Self {
            head: head.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
            empty,
        }
    }

    /// What came over the network must not move the terminal's cursor.
    fn row<const N: usize>(&mut self, cells: [String; N]) {
        let printable = |cell: String| {
            cell.chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect()
        };
        self.rows.push(cells.map(printable).into());
    }

    fn write(&self, output: &mut impl Write) -> io::Result<()> {
        if self.rows.is_empty() {
            return writeln!(output, "{}", self.empty);
        }
        let lines = || [&self.head].into_iter().chain(&self.rows);
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| {
                lines()
                    .map(|line| line[column].chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        for line in lines() {
            let mut text = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                text.push_str(&format!("{cell:<width$}  "));
            }
            writeln!(output, "{}", text.trim_end())?;
        }
        Ok(())
    }
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

    #[test]
    fn quantities_keep_three_digits() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10_239, "10.0 KiB"),
            (1_048_575, "1.00 MiB"),
            (123 << 30, "123 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        for (seconds, text) in [
            (59, "59s"),
            (3599, "59m 59s"),
            (3600, "1h 0m"),
            (86_400, "1d 0h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn what_is_no_esplane_is_told_apart() {
        let target: Target = "127.0.0.1:9470".parse().unwrap();
        for (answer, phrase) in [
            (&b"SSH-2.0-OpenSSH_9.2\r\n\r\n"[..], "is no esplane"),
            (b"", "not HTTP"),
            (b"HTTP/1.1 200 OK\r\n\r\n<html>", "is no esplane"),
            (
                b"HTTP/1.1 403 Forbidden\x1b\r\n\r\n",
                "403 Forbidden\\u{1b}",
            ),
        ] {
            let error = understand(&target, answer).unwrap_err().to_string();
            assert!(error.contains(phrase), "{error}");
        }
        for text in ["", "localhost", "localhost:0", "localhost:http"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_daemon_on_every_address_is_asked_on_loopback() {
        let api = |listen: &str| Api {
            listen: Some(listen.parse().unwrap()),
            socket: None,
        };
        assert_eq!(
            Target::of(&api("0.0.0.0:9470")).unwrap(),
            Target::Tcp("127.0.0.1:9470".to_owned())
        );
        assert_eq!(
            Target::of(&api("[::]:9470")).unwrap(),
            Target::Tcp("[::1]:9470".to_owned())
        );
        assert!(
            Target::of(&Api {
                listen: None,
                socket: None
            })
            .is_err()
        );
    }
}
