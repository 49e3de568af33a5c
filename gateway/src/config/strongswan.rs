//! The section `strongswan`: tunnels that an unmodified strongSwan negotiates.

use super::{
    document::{At, StrongswanDocument},
    peers::{df, window},
    problem::Problems,
    resolve::{choice, number, report, socket_path},
};
use esplane_api::{DfPolicy, WindowSize};
use esplane_control_vici::{
    importer::{ImportName, ImportSettings},
    vici::Mark,
};
use std::path::PathBuf;

/// Where charon answers unless the configuration says otherwise.
pub const DEFAULT_VICI_SOCKET: &str = "/var/run/charon.vici";
/// Where charon's preloaded library finds us unless the configuration says otherwise.
pub const DEFAULT_XFRM_SOCKET: &str = "/run/esplane/xfrm.sock";
/// charon's port for ESP in UDP (`charon.port_nat_t`).
const DEFAULT_PORT: u16 = 4500;

/// How the tunnels of a strongSwan are taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strongswan {
    /// Where charon hands over its keys.
    pub mode: Mode,
    /// The mark of SAs that the kernel does not use.
    pub mark: Mark,
    /// charon's socket for names and networks.
    pub vici: PathBuf,
    /// charon's port for ESP in UDP.
    pub port: u16,
    /// Whether the networks behind its tunnels become routes.
    pub routes: bool,
    /// The Don't Fragment bit of outer IPv4 headers.
    pub df: DfPolicy,
    /// The replay window, where it shall be larger than what charon asks for.
    pub window: Option<WindowSize>,
    /// Only these connections or children, if any are named.
    pub connections: Vec<ImportName>,
}

/// Where charon hands over its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To the kernel, as inert SAs.
    Kernel,
    /// To us, by a library preloaded into charon.
    Preload {
        /// Where the library finds us.
        socket: PathBuf,
    },
}

impl Strongswan {
    /// Whether all that cannot change while the daemon runs is the same.
    pub(super) fn same_but_routes(&self, other: &Self) -> bool {
        let others = Self {
            routes: self.routes,
            ..other.clone()
        };
        *self == others
    }
}

pub(super) fn strongswan(
    p: &mut Problems<'_>,
    document: &StrongswanDocument,
) -> Option<Strongswan> {
    let words = [("kernel", false), ("preload", true)];
    let preload = choice(p, document.mode.as_ref(), "strongswan.mode", &words, false);
    let socket = path(
        p,
        document.socket.as_ref(),
        "strongswan.socket",
        DEFAULT_XFRM_SOCKET,
    );
    if let (Some(at), false) = (&document.socket, preload) {
        p.add(
            at.referenced,
            "strongswan.socket",
            "only `mode: preload` has this socket; leave it out, or write that mode",
        );
    }
    let vici = path(
        p,
        document.vici.as_ref(),
        "strongswan.vici",
        DEFAULT_VICI_SOCKET,
    );
    let port = number(p, document.port.as_ref(), "strongswan.port", 1..=65_535);
    let window_packets = document.window_packets.as_ref();
    let connections = document.connections.iter().map(|at| import_name(&at.value));
    let mark = document.mark.as_ref();
    let mark = mark.map_or(Some(ImportSettings::MARK), |at| {
        report(p, at, "strongswan.mark", parse_mark(&at.value))
    });
    Some(Strongswan {
        mode: match preload {
            false => Mode::Kernel,
            true => Mode::Preload { socket: socket? },
        },
        mark: mark?,
        vici: vici?,
        port: port.map_or(DEFAULT_PORT, |port| port as u16),
        routes: document.routes.unwrap_or(true),
        df: df(p, document.df.as_ref(), "strongswan.df"),
        window: window_packets.map(|at| window(p, Some(at), "strongswan.window_packets")),
        connections: connections.collect(),
    })
}

/// `CONNECTION` or `CONNECTION/CHILD`.
pub(crate) fn import_name(text: &str) -> ImportName {
    let (connection, child) = match text.split_once('/') {
        Some((connection, child)) => (connection, Some(child.to_owned())),
        None => (text, None),
    };
    ImportName {
        connection: connection.to_owned(),
        child,
    }
}

/// As in swanctl.conf: `VALUE` or `VALUE/MASK`.
fn parse_mark(text: &str) -> Result<Mark, String> {
    let number = |text: &str| {
        let parsed = match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16),
            None => text.parse(),
        };
        parsed.map_err(|_| {
            format!("`{text}` is no mark; write what swanctl.conf has in mark_in, such as 0x00dead00/0xffffffff")
        })
    };
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    let mark = Mark {
        value: number(value)?,
        mask: number(mask)?,
    };
    match mark.value & mark.mask {
        0 => Err("every packet without a mark has the mark 0, so the kernel would use these SAs itself; choose another, such as 0x00dead00/0xffffffff".to_owned()),
        _ => Ok(mark),
    }
}

fn path(
    p: &mut Problems<'_>,
    at: Option<&At<String>>,
    path: &str,
    default: &str,
) -> Option<PathBuf> {
    match at {
        Some(at) => socket_path(p, at, path, default),
        None => Some(default.into()),
    }
}
