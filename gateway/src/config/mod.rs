//! The configuration: a YAML file becomes a [`Config`] of validated values, or a list of
//! everything that is wrong with it, each at its place.
//!
//! ```text
//!   file ──read──▶ text ──yaml.rs──▶ Document ──resolve.rs──▶ Config ──noise.rs──────▶ PeerConfig
//!        bounded        shape, names   values with   meaning,           static_sas.rs──▶ TunnelParams, SaPair
//!                       bounded        their places  cross-checks
//! ```
//!
//! A configuration is valid as a whole or not at all: [`Config::load`] also reads the key files it
//! names, so that a daemon that has a `Config` needs no further file to start.
//!
//! # Reload (SIGHUP)
//!
//! | live | needs a restart ([`Config::restart_needed`]) |
//! |---|---|
//! | `peers`, `static_sas`, `strongswan.routes`, `log.level`, `install_routes`, `route_metric` | `name`, `private_key_file`, `state_dir`, `listen`, `interface`, `workers`, `worker_ports`, `busy_poll`, `outer`, `inner`, the rest of `strongswan`, `api`, `log.format`, the first static SA in plain ESP, beside strongSwan the first peer or static SA in UDP |
//!
//! Peers whose settings did not change keep their SAs.

mod cross;
mod document;
mod drivers;
mod noise;
mod peers;
mod problem;
mod resolve;
mod secrets;
mod static_sas;
mod strongswan;
#[cfg(test)]
mod tests;
mod yaml;

pub use drivers::{Drivers, XdpInterface};
pub use problem::{AtLength, ConfigError, Problem, SHOWN_PROBLEMS};
pub use static_sas::{StaticSa, StaticSaContext, TunnelIds};
pub(crate) use strongswan::import_name;
pub use strongswan::{DEFAULT_VICI_SOCKET, DEFAULT_XFRM_SOCKET, Mode, Strongswan};

use esplane_api::{AeadSuite, DfPolicy, Esn, IpPrefix, SelectorPair, WindowSize};
use esplane_control_noise::{
    Initiate, KemPolicy, PresharedKey, PublicKey, RekeyPolicy, StaticSecretKey,
};
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

/// Where ESP in UDP and handshakes arrive unless the configuration says otherwise: every address of
/// both families, on the port of RFC 3948.
pub const DEFAULT_LISTEN: &str = "[::]:4500";
/// The same beside a strongSwan, whose charon has that port.
pub const DEFAULT_LISTEN_BESIDE_CHARON: &str = "[::]:4501";
/// Where `/metrics` is served unless the configuration says otherwise.
pub const DEFAULT_API_LISTEN: &str = "127.0.0.1:9470";
/// Where `esplane show` finds the daemon unless the configuration says otherwise.
pub const DEFAULT_API_SOCKET: &str = "/run/esplane/esplane.sock";
/// Where sequence reservations are kept unless the configuration says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/esplane";

/// A valid configuration with all its secrets.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it came from.
    pub file: PathBuf,
    /// This node's name, for people.
    pub name: String,
    /// Where state lives that must survive a restart.
    pub state_dir: PathBuf,
    /// Noise's static key; always there when there are peers.
    pub private_key: Option<StaticSecretKey>,
    /// The UDP address for ESP in UDP and handshakes. An unspecified IPv6 address means both families.
    pub listen: SocketAddr,
    /// The interface of the private network.
    pub interface: Interface,
    /// Whether the daemon sets routes to what its tunnels protect.
    pub install_routes: bool,
    /// Their metric.
    pub route_metric: u32,
    /// How many worker threads.
    pub workers: Workers,
    /// Ports of their own from which workers send.
    pub worker_ports: WorkerPorts,
    /// Whether workers look for packets all the time instead of sleeping.
    pub busy_poll: bool,
    /// Network cards that packets pass without the kernel's stack.
    pub drivers: Drivers,
    /// The tunnels keyed by Noise.
    pub peers: Vec<Peer>,
    /// The tunnels keyed by hand.
    pub static_sas: Vec<StaticSa>,
    /// The tunnels that strongSwan negotiates.
    pub strongswan: Option<Strongswan>,
    /// Metrics and API.
    pub api: Api,
    /// Logging.
    pub log: Log,
}

/// The TUN interface towards the private network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<InterfaceAddress>,
    /// Its MTU.
    pub mtu: Mtu,
}

/// A host address within its network, such as `10.1.0.1/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The host's address.
    pub address: IpAddr,
    /// The network's length.
    pub prefix_length: u8,
}

impl InterfaceAddress {
    /// The network it lies in.
    pub fn network(&self) -> IpPrefix {
        IpPrefix::truncated(self.address, self.prefix_length)
    }
}

impl fmt::Display for InterfaceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_length)
    }
}

/// The inner interface's MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mtu {
    /// The largest that leaves ESP packets unfragmented on the way to every peer.
    Auto,
    /// As given.
    Bytes(u16),
}

/// How many worker threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workers {
    /// One per core this process may use.
    Auto,
    /// As given.
    Count(NonZeroUsize),
}

/// UDP ports from which workers from the second on send with SAs that are theirs alone (`parallel_sas`), so that the other end's
/// network card and kernel, which tell flows by ports, spread one tunnel over their queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerPorts {
    /// All send from the port on which they listen.
    None,
    /// The kernel chooses them.
    Auto,
    /// The second worker's; the next one has the next.
    From(u16),
}

/// As many as workers that can have SAs of their own: 16, and the first one sends with the fallback SA.
pub const WORKER_PORTS_MAX: usize = 15;

impl WorkerPorts {
    /// Of a worker, by its number from 0; port 0 leaves the choice to the kernel.
    pub fn of_worker(self, worker: usize) -> Option<u16> {
        let place = worker.checked_sub(1)?;
        if place >= WORKER_PORTS_MAX {
            return None;
        }
        match self {
            Self::None => None,
            Self::Auto => Some(0),
            Self::From(first) => first.checked_add(u16::try_from(place).ok()?),
        }
    }
}

impl Workers {
    /// The number of threads.
    pub fn count(self) -> usize {
        match self {
            Self::Auto => std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            Self::Count(count) => count.get(),
        }
    }
}

/// One peer with which Noise negotiates.
#[derive(Clone, Debug)]
pub struct Peer {
    /// For people, metrics and the tunnel's number.
    pub name: String,
    /// Who it is.
    pub public_key: PublicKey,
    /// A secret both ends know besides.
    pub psk: Option<PresharedKey>,
    /// Where it is; a peer without one must come to us.
    pub endpoint: Option<Endpoint>,
    /// The networks behind it.
    pub routes: Vec<IpPrefix>,
    /// The AEADs it may choose from, best first.
    pub suites: Vec<AeadSuite>,
    /// The post-quantum half of the handshake.
    pub kem: KemPolicy,
    /// When to start a handshake.
    pub initiate: Initiate,
    /// How often to keep a NAT's mapping alive.
    pub keepalive_seconds: Option<u16>,
    /// After how much silence an unanswered peer counts as dead.
    pub dead_after_seconds: u16,
    /// When to negotiate fresh keys.
    pub rekey: RekeyPolicy,
    /// Sequence numbers of 64 bits.
    pub esn: Esn,
    /// The replay window.
    pub window: WindowSize,
    /// SAs each way, one for each worker that sends.
    pub parallel_sas: u8,
    /// The DF bit of outer IPv4 headers.
    pub df: DfPolicy,
}

impl Peer {
    /// Anything of ours to and from each of its networks.
    pub fn selectors(&self) -> Vec<SelectorPair> {
        self.routes.iter().copied().map(SelectorPair::to).collect()
    }
}

/// Where a peer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// By address.
    Address(SocketAddr),
    /// By DNS name, resolved at start and again when the peer does not answer.
    Name {
        /// The host's name.
        host: String,
        /// Its UDP port.
        port: u16,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Where metrics and API are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Api {
    /// Read-only HTTP over TCP.
    pub listen: Option<SocketAddr>,
    /// HTTP over a unix socket, which may also change things.
    pub socket: Option<PathBuf>,
}

/// Logging to stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// The least severe level that is written.
    pub level: tracing::level_filters::LevelFilter,
    /// For people or for machines.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

impl Config {
    /// Reads, checks and resolves `file`, and every key file it names.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = yaml::read(file)?;
        Self::from_text(file, &text)
    }

    /// The same from a text; `file` is what errors call it and what relative key files start from.
    pub fn from_text(file: &Path, text: &str) -> Result<Self, ConfigError> {
        let document = yaml::parse(file, text)?;
        resolve::config(file, text, document)
    }

    /// Where a configuration's daemon answers, without reading the keys (for `esplane show -c`).
    pub fn load_api(file: &Path) -> Result<Api, ConfigError> {
        let text = yaml::read(file)?;
        let document = yaml::parse(file, &text)?;
        resolve::api_only(file, &text, &document.api)
    }

    /// What a static SA from the HTTP API is checked against.
    pub fn static_sa_context(&self) -> StaticSaContext {
        StaticSaContext {
            listen_port: self.listen.port(),
            directory: None,
        }
    }

    /// The names of all settings that differ in `new` and cannot change while the daemon runs.
    pub fn restart_needed(&self, new: &Self) -> Vec<&'static str> {
        let same_key = match (&self.private_key, &new.private_key) {
            (Some(old), Some(new)) => old.public_key() == new.public_key(),
            (None, None) => true,
            _ => false,
        };
        [
            ("name", self.name == new.name),
            ("private_key_file", same_key),
            ("state_dir", self.state_dir == new.state_dir),
            ("listen", self.listen == new.listen),
            ("interface", self.interface == new.interface),
            ("workers", self.workers == new.workers),
            ("worker_ports", self.worker_ports == new.worker_ports),
            ("busy_poll", self.busy_poll == new.busy_poll),
            ("outer", self.drivers.outer == new.drivers.outer),
            ("inner", self.drivers.inner == new.drivers.inner),
            ("api", self.api == new.api),
            ("log.format", self.log.format == new.log.format),
            (
                "strongswan",
                match (&self.strongswan, &new.strongswan) {
                    (Some(old), Some(new)) => old.same_but_routes(new),
                    (old, new) => old == new,
                },
            ),
            (
                "peers or static_sas (the first one in UDP beside strongSwan)",
                self.uses_own_port() || !new.uses_own_port(),
            ),
            (
                "static_sas (the first one in plain ESP)",
                self.uses_plain_esp() || !new.uses_plain_esp(),
            ),
        ]
        .into_iter()
        .filter_map(|(name, same)| (!same).then_some(name))
        .collect()
    }

    /// Whether raw sockets are needed: they are opened at start, or not at all.
    pub fn uses_plain_esp(&self) -> bool {
        self.strongswan.is_some() || self.static_sas.iter().any(|sa| sa.path.encap().is_none())
    }

    /// Whether we listen on a UDP port of our own. Beside strongSwan only where something needs it.
    pub fn uses_own_port(&self) -> bool {
        let in_udp = |sa: &StaticSa| sa.path.encap().is_some();
        self.strongswan.is_none() || !self.peers.is_empty() || self.static_sas.iter().any(in_udp)
    }

    /// The prefixes that shall lead into the interface, each with the name of its tunnel.
    pub fn protected_routes(&self) -> impl Iterator<Item = (&str, IpPrefix)> {
        let peers = self
            .peers
            .iter()
            .flat_map(|peer| peer.routes.iter().map(|route| (peer.name.as_str(), *route)));
        let static_sas = self.static_sas.iter().flat_map(|sa| {
            sa.routes()
                .into_iter()
                .map(|route| (sa.name.as_str(), route))
        });
        peers.chain(static_sas)
    }
}

impl fmt::Display for Config {
    /// The short summary of `esplane check`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        writeln!(f, "{file}: fine")?;
        writeln!(f, "  node       {}", self.name)?;
        if let Some(key) = &self.private_key {
            writeln!(f, "  public key {}", key.public_key())?;
        }
        if self.uses_own_port() {
            writeln!(f, "  listen     {}", self.listen)?;
        }
        write!(f, "  interface  {}", self.interface.name)?;
        for address in &self.interface.addresses {
            write!(f, " {address}")?;
        }
        writeln!(f)?;
        for (side, driver) in [
            ("outer", &self.drivers.outer),
            ("inner", &self.drivers.inner),
        ] {
            if let Some(xdp) = driver {
                writeln!(f, "  {side}      {} over AF_XDP", xdp.name)?;
            }
        }
        for peer in &self.peers {
            write!(f, "  peer       {}", peer.name)?;
            match &peer.endpoint {
                Some(endpoint) => write!(f, " at {endpoint}")?,
                None => write!(f, " (comes to us)")?,
            }
            writeln!(f, ", {}", list(&peer.routes))?;
        }
        for sa in &self.static_sas {
            let remote = sa.path.remote();
            writeln!(
                f,
                "  static SA  {} to {remote}, {}",
                sa.name,
                list(&sa.selectors)
            )?;
        }
        if let Some(strongswan) = &self.strongswan {
            let vici = strongswan.vici.display();
            match &strongswan.mode {
                Mode::Kernel => writeln!(f, "  strongSwan at {vici}, keys from the kernel")?,
                Mode::Preload { socket } => {
                    writeln!(f, "  strongSwan at {vici}, keys at {}", socket.display())?;
                }
            }
        }
        let off = || "off".to_owned();
        let listen = self
            .api
            .listen
            .map_or_else(off, |address| address.to_string());
        let socket = self.api.socket.as_ref();
        let socket = socket.map_or_else(off, |path| path.display().to_string());
        write!(f, "  api        {listen}, {socket}")
    }
}

fn list(items: &[impl fmt::Display]) -> String {
    let texts: Vec<String> = items.iter().map(ToString::to_string).collect();
    texts.join(" ")
}
