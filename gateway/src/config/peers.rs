//! The `peers` of a configuration, each by itself.

use super::{
    Endpoint, Peer,
    document::{At, PeerDocument, RekeyDocument},
    problem::Problems,
    resolve::{choice, name, number, report, text},
    secrets,
};
use esplane_api::{AeadSuite, DfPolicy, Esn, IpPrefix, WindowSize};
use esplane_control_noise::{Initiate, KemPolicy, RekeyPolicy};
use std::{net::SocketAddr, path::Path};

const DEFAULT_DEAD_AFTER_SECONDS: u16 = 15;
const DAY_SECONDS: u64 = 86_400;
/// So many SPIs does a handshake have room for.
const PARALLEL_SAS_MAX: u64 = 16;

/// In the document's order; `None` where a peer was wrong and has been reported.
pub(super) fn all(
    p: &mut Problems<'_>,
    directory: &Path,
    documents: &[At<PeerDocument>],
) -> Vec<Option<Peer>> {
    documents
        .iter()
        .enumerate()
        .map(|(index, document)| peer(p, directory, &format!("peers[{index}]"), &document.value))
        .collect()
}

fn peer(
    p: &mut Problems<'_>,
    directory: &Path,
    path: &str,
    document: &PeerDocument,
) -> Option<Peer> {
    let at = |key: &str| format!("{path}.{key}");
    let name = name(p, &document.name, &at("name"));
    let public_key = text(p, &document.public_key, &at("public_key"));
    let endpoint = match &document.endpoint {
        None => Some(None),
        Some(value) => report(p, value, &at("endpoint"), endpoint(&value.value)).map(Some),
    };
    let psk = match &document.psk_file {
        None => Some(None),
        Some(file) => {
            let key = secrets::preshared_key(&directory.join(&file.value));
            report(p, file, &at("psk_file"), key).map(Some)
        }
    };
    let initiate = choice(
        p,
        document.initiate.as_ref(),
        &at("initiate"),
        &[("start", Initiate::AtStart), ("demand", Initiate::OnDemand)],
        Initiate::OnDemand,
    );
    if let (Some(value), Initiate::AtStart, None) =
        (&document.initiate, initiate, &document.endpoint)
    {
        p.add(value.referenced, at("initiate"),
            "a handshake cannot start without knowing where the peer is; add its `endpoint`, or use demand");
    }
    let kem = choice(
        p,
        document.kem.as_ref(),
        &at("kem"),
        &[
            ("mlkem768", KemPolicy::MlKem768),
            ("mlkem512", KemPolicy::MlKem512),
            ("off", KemPolicy::Off),
        ],
        KemPolicy::MlKem768,
    );
    let keepalive = number(
        p,
        document.keepalive_seconds.as_ref(),
        &at("keepalive_seconds"),
        1..=3600,
    );
    let dead_after = number(
        p,
        document.dead_after_seconds.as_ref(),
        &at("dead_after_seconds"),
        3..=3600,
    );
    let routes = routes(p, &document.routes, &at("routes"));
    let suites = suites(p, document.suites.as_ref(), &at("suites"));
    let rekey = rekey(p, &document.rekey, &at("rekey"));
    let window = window(p, document.window_packets.as_ref(), &at("window_packets"));
    let parallel_sas = number(
        p,
        document.parallel_sas.as_ref(),
        &at("parallel_sas"),
        1..=PARALLEL_SAS_MAX,
    );
    let df = df(p, document.df.as_ref(), &at("df"));
    Some(Peer {
        name: name?,
        public_key: public_key?,
        psk: psk?,
        endpoint: endpoint?,
        routes: routes?,
        suites: suites?,
        kem,
        initiate,
        keepalive_seconds: keepalive.map(|seconds| seconds as u16),
        dead_after_seconds: dead_after.map_or(DEFAULT_DEAD_AFTER_SECONDS, |seconds| seconds as u16),
        rekey,
        esn: esn(document.esn),
        window,
        parallel_sas: parallel_sas.map_or(1, |sas| sas as u8),
        df,
    })
}

pub(super) fn esn(written: Option<bool>) -> Esn {
    match written {
        Some(false) => Esn::Off,
        Some(true) | None => Esn::On,
    }
}

/// The default, having reported it, if the window is wrong.
pub(super) fn window(p: &mut Problems<'_>, at: Option<&At<u64>>, path: &str) -> WindowSize {
    let Some(at) = at else {
        return WindowSize::DEFAULT;
    };
    let packets = u32::try_from(at.value).unwrap_or(u32::MAX);
    report(p, at, path, WindowSize::new(packets)).unwrap_or_default()
}

pub(super) fn df(p: &mut Problems<'_>, at: Option<&At<String>>, path: &str) -> DfPolicy {
    let words = [
        ("clear", DfPolicy::Clear),
        ("set", DfPolicy::Set),
        ("copy", DfPolicy::Copy),
    ];
    choice(p, at, path, &words, DfPolicy::Clear)
}

fn endpoint(text: &str) -> Result<Endpoint, String> {
    let advice = "write ADDRESS:PORT or NAME:PORT, such as 192.0.2.1:4500, [2001:db8::1]:4500 or vpn.example.net:4500";
    if let Ok(address) = text.parse::<SocketAddr>() {
        let ip = address.ip();
        return match ip.is_unspecified() || ip.is_multicast() || address.port() == 0 {
            true => Err(format!("nothing can be sent to {text}; {advice}")),
            false => Ok(Endpoint::Address(address)),
        };
    }
    let wrong = || format!("`{text}` is no endpoint; {advice}");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    match port.parse() {
        Ok(port) if port != 0 && is_host_name(host) => Ok(Endpoint::Name {
            host: host.to_owned(),
            port,
        }),
        _ => Err(wrong()),
    }
}

/// Letters, digits, hyphens and (in practice) underscores in labels of 1 to 63 (RFC 1123 §2.1),
/// and not all numeric, which would be a mistyped address.
fn is_host_name(host: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let host = host.strip_suffix('.').unwrap_or(host);
    host.len() <= 253
        && host
            .split('.')
            .all(|label| (1..=63).contains(&label.len()) && label.chars().all(fits))
        && host.chars().any(|c| c.is_ascii_alphabetic())
}

fn routes(p: &mut Problems<'_>, at: &At<Vec<At<String>>>, path: &str) -> Option<Vec<IpPrefix>> {
    if at.value.is_empty() {
        p.add(at.referenced, path, "a peer without routes carries nothing; list the networks behind it, such as [10.2.0.0/16]");
    }
    let found: Vec<Option<IpPrefix>> = at
        .value
        .iter()
        .enumerate()
        .map(|(index, route)| text(p, route, &format!("{path}[{index}]")))
        .collect();
    found.into_iter().collect()
}

fn suites(
    p: &mut Problems<'_>,
    at: Option<&At<Vec<At<String>>>>,
    path: &str,
) -> Option<Vec<AeadSuite>> {
    let Some(at) = at else {
        return Some(AeadSuite::ALL.to_vec());
    };
    if at.value.is_empty() {
        p.add(
            at.referenced,
            path,
            "no suite is left to choose from; name at least one, or leave `suites` out for all",
        );
    }
    let mut suites = Vec::new();
    for (index, value) in at.value.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let suite = text(p, value, &path)?;
        if suites.contains(&suite) {
            p.add(
                value.referenced,
                path,
                format_args!("{suite} stands here a second time; keep one"),
            );
        }
        suites.push(suite);
    }
    Some(suites)
}

fn rekey(p: &mut Problems<'_>, document: &RekeyDocument, path: &str) -> RekeyPolicy {
    let mut limit =
        |at: Option<&At<u64>>, key: &str, range| number(p, at, &format!("{path}.{key}"), range);
    let default = RekeyPolicy::default();
    RekeyPolicy {
        seconds: limit(document.seconds.as_ref(), "seconds", 1..=DAY_SECONDS)
            .map_or(default.seconds, |seconds| seconds as u32),
        bytes: limit(document.bytes.as_ref(), "bytes", 1..=u64::MAX).or(default.bytes),
        packets: limit(document.packets.as_ref(), "packets", 1..=u64::MAX).or(default.packets),
    }
}
