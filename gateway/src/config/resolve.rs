//! From a [`Document`] to a [`Config`]: every value gets its meaning, every wrong one its report.

use super::{
    Api, Config, ConfigError, DEFAULT_API_LISTEN, DEFAULT_API_SOCKET, DEFAULT_LISTEN,
    DEFAULT_LISTEN_BESIDE_CHARON, DEFAULT_STATE_DIR, Interface, InterfaceAddress, Log, LogFormat,
    Mtu, StaticSaContext, WORKER_PORTS_MAX, WorkerPorts, Workers, cross,
    document::{ApiDocument, At, Document, InterfaceDocument, LogDocument},
    drivers, peers,
    problem::Problems,
    secrets, static_sas, strongswan,
};
use std::{
    fmt,
    net::SocketAddr,
    num::NonZeroUsize,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
};
use tracing::level_filters::LevelFilter;

/// The kernel's IFNAMSIZ less the terminating zero.
const MAX_INTERFACE_NAME_BYTES: usize = 15;
const MAX_NAME_BYTES: usize = 63;
const MAX_WORKERS: u64 = 256;
const DEFAULT_ROUTE_METRIC: u32 = 100;

/// The whole document; cross-checks run on whatever could be resolved.
pub(super) fn config(file: &Path, text: &str, document: Document) -> Result<Config, ConfigError> {
    let mut problems = Problems::new(text);
    let p = &mut problems;
    let directory = file.parent().unwrap_or(Path::new("")).to_owned();
    let name = name(p, &document.name, "name");
    let strongswan = document.strongswan.as_ref();
    let listen = listen(p, document.listen.as_ref(), strongswan.is_some());
    let strongswan = strongswan.map(|document| strongswan::strongswan(p, document));
    let interface = interface(p, &document.interface);
    let workers = workers(p, document.workers.as_ref());
    let worker_ports = worker_ports(p, document.worker_ports.as_ref(), listen);
    let drivers = drivers::drivers(p, document.outer.as_ref(), document.inner.as_ref());
    let route_metric = number(
        p,
        document.route_metric.as_ref(),
        "route_metric",
        0..=u64::from(u32::MAX),
    );
    let private_key = document.private_key_file.as_ref().and_then(|file| {
        let path = directory.join(&file.value);
        report(p, file, "private_key_file", secrets::private_key(&path))
    });
    let api = api(p, &document.api);
    let log = log(p, &document.log);
    let peers = peers::all(p, &directory, &document.peers);
    let context = StaticSaContext {
        listen_port: listen.map_or(0, |listen| listen.port()),
        directory: Some(directory),
    };
    let static_sas = static_sas::all(p, &context, &document.static_sas);

    cross::check(
        p,
        &document,
        private_key.as_ref(),
        interface.as_ref(),
        &peers,
        &static_sas,
        listen.zip(strongswan.iter().flatten().next()),
    );

    let complete = problems.is_empty();
    match (
        name,
        listen,
        interface,
        workers,
        worker_ports,
        drivers,
        api,
        log,
    ) {
        (
            Some(name),
            Some(listen),
            Some(interface),
            Some(workers),
            Some(worker_ports),
            Some(drivers),
            Some(api),
            Some(log),
        ) if complete => Ok(Config {
            file: file.to_owned(),
            name,
            state_dir: document
                .state_dir
                .unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            private_key,
            listen,
            interface,
            install_routes: document.install_routes.unwrap_or(true),
            route_metric: route_metric.map_or(DEFAULT_ROUTE_METRIC, |metric| metric as u32),
            workers,
            worker_ports,
            busy_poll: document.busy_poll.unwrap_or(false),
            drivers,
            peers: peers.into_iter().flatten().collect(),
            static_sas: static_sas.into_iter().flatten().collect(),
            strongswan: strongswan.flatten(),
            api,
            log,
        }),
        _ => Err(ConfigError::Wrong {
            file: file.to_owned(),
            problems: problems.into_vec(),
        }),
    }
}

/// Only where the daemon answers.
pub(super) fn api_only(
    file: &Path,
    text: &str,
    document: &ApiDocument,
) -> Result<Api, ConfigError> {
    let mut problems = Problems::new(text);
    api(&mut problems, document).ok_or_else(|| ConfigError::Wrong {
        file: file.to_owned(),
        problems: problems.into_vec(),
    })
}

/// Names go into metrics, URLs and logs: letters, digits, `.`, `_`, `-`.
pub(super) fn name(p: &mut Problems<'_>, at: &At<String>, path: &str) -> Option<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let text = &at.value;
    if (1..=MAX_NAME_BYTES).contains(&text.len()) && text.chars().all(fits) {
        return Some(text.clone());
    }
    p.add(
        at.referenced,
        path,
        format_args!(
            "`{text}` cannot be a name; use 1 to {MAX_NAME_BYTES} letters, digits, `.`, `_` or `-`"
        ),
    );
    None
}

/// Parses a text whose type's own error says what would be right.
pub(super) fn text<T: FromStr<Err: fmt::Display>>(
    p: &mut Problems<'_>,
    at: &At<String>,
    path: &str,
) -> Option<T> {
    report(p, at, path, at.value.parse())
}

/// Reports an error at its value.
pub(super) fn report<T, V, E: fmt::Display>(
    p: &mut Problems<'_>,
    at: &At<V>,
    path: &str,
    result: Result<T, E>,
) -> Option<T> {
    result
        .inspect_err(|error| p.add(at.referenced, path, error))
        .ok()
}

/// A number within its range.
pub(super) fn number(
    p: &mut Problems<'_>,
    at: Option<&At<u64>>,
    path: &str,
    range: RangeInclusive<u64>,
) -> Option<u64> {
    let at = at?;
    if range.contains(&at.value) {
        return Some(at.value);
    }
    let (low, high) = range.into_inner();
    p.add(
        at.referenced,
        path,
        format_args!("{} is out of range; use {low} to {high}", at.value),
    );
    None
}

/// One of a few words; `default` if nothing is written, and, having reported it, for a wrong word.
pub(super) fn choice<T: Copy>(
    p: &mut Problems<'_>,
    at: Option<&At<String>>,
    path: &str,
    choices: &[(&str, T)],
    default: T,
) -> T {
    let Some(at) = at else { return default };
    if let Some((_, value)) = choices.iter().find(|(word, _)| *word == at.value) {
        return *value;
    }
    let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
    p.add(
        at.referenced,
        path,
        format_args!(
            "`{}` is not possible here; use {}",
            at.value,
            words.join(", ")
        ),
    );
    default
}

fn listen(
    p: &mut Problems<'_>,
    at: Option<&At<String>>,
    beside_charon: bool,
) -> Option<SocketAddr> {
    let default = match beside_charon {
        true => DEFAULT_LISTEN_BESIDE_CHARON,
        false => DEFAULT_LISTEN,
    };
    match at {
        None => default.parse().ok(),
        Some(at) => socket_address(p, at, "listen", default),
    }
}

fn socket_address(
    p: &mut Problems<'_>,
    at: &At<String>,
    path: &str,
    example: &str,
) -> Option<SocketAddr> {
    let parsed: Result<SocketAddr, _> = at.value.parse();
    match parsed {
        Ok(address) if address.port() != 0 => return Some(address),
        Ok(_) => p.add(
            at.referenced,
            path,
            format_args!("port 0 cannot be used; write a fixed port, such as {example}"),
        ),
        Err(_) => p.add(
            at.referenced,
            path,
            format_args!(
                "`{}` is no ADDRESS:PORT; write one such as {example} or 192.0.2.1:4500",
                at.value
            ),
        ),
    }
    None
}

fn interface(p: &mut Problems<'_>, document: &InterfaceDocument) -> Option<Interface> {
    let name = interface_name(p, &document.name, "interface.name");
    let mut addresses = Vec::new();
    for (index, at) in document.addresses.iter().enumerate() {
        let path = format!("interface.addresses[{index}]");
        match interface_address(&at.value) {
            Err(error) => p.add(at.referenced, path, error),
            Ok(address) if addresses.contains(&address) => {
                p.add(
                    at.referenced,
                    path,
                    format_args!("{address} stands here a second time; keep one"),
                );
            }
            Ok(address) => addresses.push(address),
        }
    }
    // RFC 8200 §5: a link that carries IPv6 takes packets of 1280 bytes; RFC 791: IPv4 hosts take 576.
    let smallest = match addresses.iter().any(|address| address.address.is_ipv6()) {
        true => 1280,
        false => 576,
    };
    let mtu = auto_or_number(p, document.mtu.as_ref(), "interface.mtu", smallest..=9000)?;
    Some(Interface {
        name: name?,
        addresses,
        mtu: mtu.map_or(Mtu::Auto, |bytes| Mtu::Bytes(bytes as u16)),
    })
}

/// As the kernel's `dev_valid_name`, and printable ASCII besides.
pub(super) fn interface_name(p: &mut Problems<'_>, at: &At<String>, path: &str) -> Option<String> {
    let text = &at.value;
    let fits = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
    if (1..=MAX_INTERFACE_NAME_BYTES).contains(&text.len())
        && text.chars().all(fits)
        && !matches!(text.as_str(), "." | "..")
    {
        return Some(text.clone());
    }
    p.add(at.referenced, path, format_args!(
        "`{text}` cannot name an interface; use 1 to {MAX_INTERFACE_NAME_BYTES} characters without spaces, `/`, `:` and `%`, such as esp0"
    ));
    None
}

fn interface_address(text: &str) -> Result<InterfaceAddress, String> {
    let syntax = || {
        format!(
            "`{text}` is no interface address; write ADDRESS/LENGTH, such as 10.1.0.1/16 or 2001:db8:1::1/64"
        )
    };
    let (address, length) = text.split_once('/').ok_or_else(syntax)?;
    let address: std::net::IpAddr = address.parse().map_err(|_| syntax())?;
    let prefix_length: u8 = length.parse().map_err(|_| syntax())?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    if prefix_length > bits {
        return Err(format!(
            "prefix length {prefix_length} is too long; this address family has {bits} bits"
        ));
    }
    if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
        return Err(format!(
            "{address} cannot be an interface's own address; use a unicast address of the private network"
        ));
    }
    Ok(InterfaceAddress {
        address,
        prefix_length,
    })
}

/// `auto` (or nothing) is `Some(None)`; a wrong value is reported and `None`.
pub(super) fn auto_or_number(
    p: &mut Problems<'_>,
    at: Option<&At<String>>,
    path: &str,
    range: RangeInclusive<u64>,
) -> Option<Option<u64>> {
    let Some(at) = at.filter(|at| at.value != "auto") else {
        return Some(None);
    };
    match at.value.parse() {
        Ok(number) if range.contains(&number) => Some(Some(number)),
        _ => {
            let (low, high) = range.into_inner();
            p.add(
                at.referenced,
                path,
                format_args!(
                    "`{}` is not possible here; use auto or {low} to {high}",
                    at.value
                ),
            );
            None
        }
    }
}

fn workers(p: &mut Problems<'_>, at: Option<&At<String>>) -> Option<Workers> {
    let count = auto_or_number(p, at, "workers", 1..=MAX_WORKERS)?;
    Some(
        count
            .and_then(|count| NonZeroUsize::new(count as usize))
            .map_or(Workers::Auto, Workers::Count),
    )
}

/// As many ports as may be in use must lie beside the one on which all listen.
fn worker_ports(
    p: &mut Problems<'_>,
    at: Option<&At<String>>,
    listen: Option<SocketAddr>,
) -> Option<WorkerPorts> {
    let Some(at) = at else {
        return Some(WorkerPorts::None);
    };
    let most = WORKER_PORTS_MAX as u64;
    let highest = u64::from(u16::MAX) + 1 - most;
    let Some(first) = auto_or_number(p, Some(at), "worker_ports", 1..=highest)? else {
        return Some(WorkerPorts::Auto);
    };
    let all = first..first + most;
    if let Some(port) = listen.map(|listen| listen.port())
        && all.contains(&port.into())
    {
        p.add(
            at.referenced,
            "worker_ports",
            format_args!(
                "workers may use the ports {first} to {}, and all listen on {port}; begin above {port} or so far below",
                all.end - 1
            ),
        );
        return None;
    }
    Some(WorkerPorts::From(first as u16))
}

fn api(p: &mut Problems<'_>, document: &ApiDocument) -> Option<Api> {
    let listen = match &document.listen {
        None => Some(DEFAULT_API_LISTEN.parse().ok()?),
        Some(at) if at.value == "off" => None,
        Some(at) => Some(socket_address(p, at, "api.listen", DEFAULT_API_LISTEN)?),
    };
    let socket = match &document.socket {
        None => Some(PathBuf::from(DEFAULT_API_SOCKET)),
        Some(at) if at.value == "off" => None,
        Some(at) => {
            let example = format!("{DEFAULT_API_SOCKET}, or off");
            Some(socket_path(p, at, "api.socket", &example)?)
        }
    };
    Some(Api { listen, socket })
}

/// A unix socket.
pub(super) fn socket_path(
    p: &mut Problems<'_>,
    at: &At<String>,
    name: &str,
    example: &str,
) -> Option<PathBuf> {
    /// `sun_path` of unix(7) less the terminating zero.
    const MAX_BYTES: usize = 107;
    let path = Path::new(&at.value);
    if path.is_absolute() && at.value.len() <= MAX_BYTES && path.file_name().is_some() {
        return Some(path.to_owned());
    }
    p.add(at.referenced, name, format_args!(
        "`{}` cannot be a socket; write an absolute path of at most {MAX_BYTES} bytes, such as {example}", at.value
    ));
    None
}

fn log(p: &mut Problems<'_>, document: &LogDocument) -> Option<Log> {
    let levels = [
        ("off", LevelFilter::OFF),
        ("error", LevelFilter::ERROR),
        ("warn", LevelFilter::WARN),
        ("info", LevelFilter::INFO),
        ("debug", LevelFilter::DEBUG),
        ("trace", LevelFilter::TRACE),
    ];
    let formats = [("human", LogFormat::Human), ("json", LogFormat::Json)];
    Some(Log {
        level: choice(
            p,
            document.level.as_ref(),
            "log.level",
            &levels,
            LevelFilter::INFO,
        ),
        format: choice(
            p,
            document.format.as_ref(),
            "log.format",
            &formats,
            LogFormat::Human,
        ),
    })
}
