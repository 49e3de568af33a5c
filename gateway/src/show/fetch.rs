//! `GET /v1/status` of a running daemon.

use crate::{config::Api, status::Status};
use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

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

#[cfg(test)]
mod tests {
    use super::*;

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
