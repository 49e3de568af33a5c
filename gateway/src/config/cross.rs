//! What no value shows by itself: duplicates, contradictions and loops over the whole document.

use super::{
    Endpoint, Interface, Peer, StaticSa, Strongswan,
    document::{At, Document},
    problem::Problems,
};
use crate::ways::{may_hold_a_peer, sources};
use esplane_api::{IpPrefix, KeyMaterial, SelectorPair, TrafficSelector};
use esplane_control_noise::StaticSecretKey;
use serde_saphyr::Location;
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    hash::{BuildHasher, RandomState},
    net::{IpAddr, SocketAddr},
};

/// `peers` and `static_sas` are in the document's order, `None` where one was wrong by itself.
pub(super) fn check(
    p: &mut Problems<'_>,
    document: &Document,
    private_key: Option<&StaticSecretKey>,
    interface: Option<&Interface>,
    peers: &[Option<Peer>],
    static_sas: &[Option<StaticSa>],
    beside: Option<(SocketAddr, &Strongswan)>,
) {
    if let Some((listen, strongswan)) = beside {
        shared_port(p, document, listen, strongswan);
    }
    worker_ports(p, document, peers);
    names(p, document);
    public_keys(p, document, private_key, peers);
    spis(p, document, static_sas);
    keys(p, document, static_sas);
    let routes = routes(document, peers, static_sas);
    duplicate_routes(p, &routes);
    own_addresses(p, &routes, interface);
    if document.install_routes != Some(false) {
        routing_loops(p, document, &routes, interface, peers, static_sas);
    }
}

/// Only SAs of single workers leave from ports of their own.
fn worker_ports(p: &mut Problems<'_>, document: &Document, peers: &[Option<Peer>]) {
    let Some(at) = &document.worker_ports else {
        return;
    };
    let has_several = |peer: &Option<Peer>| peer.as_ref().is_none_or(|peer| peer.parallel_sas > 1);
    if !peers.iter().any(has_several) {
        p.add(
            at.referenced,
            "worker_ports",
            format_args!(
                "no peer has SAs for single workers, which alone leave from such ports; give one `parallel_sas: 2` or more, or leave this out"
            ),
        );
    }
}

/// charon has its port for itself; peers and static SAs in UDP arrive at another.
fn shared_port(
    p: &mut Problems<'_>,
    document: &Document,
    listen: SocketAddr,
    strongswan: &Strongswan,
) {
    if listen.port() != strongswan.port {
        return;
    }
    let port = strongswan.port;
    let (at, path) = match (
        &document.listen,
        document.strongswan.as_ref().and_then(|it| it.port.as_ref()),
    ) {
        (Some(at), _) => (at.referenced, "listen"),
        (None, Some(at)) => (at.referenced, "strongswan.port"),
        (None, None) => (Location::UNKNOWN, "listen"),
    };
    p.add(at, path, format_args!(
        "strongSwan's charon has port {port}, where its tunnels' ESP arrives; peers and static SAs need another: write `listen: \"[::]:{}\"`, and that port at their far ends",
        if port == 4501 { 4502 } else { 4501 }
    ));
}

/// Finds the second place of each value.
struct Seen<K> {
    first: BTreeMap<K, Location>,
}

impl<K: Ord> Seen<K> {
    fn new() -> Self {
        Self {
            first: BTreeMap::new(),
        }
    }

    /// Where the value stood before.
    fn earlier(&mut self, value: K, at: Location) -> Option<u64> {
        match self.first.entry(value) {
            std::collections::btree_map::Entry::Occupied(first) => Some(first.get().line()),
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(at);
                None
            }
        }
    }
}

fn names(p: &mut Problems<'_>, document: &Document) {
    let peers = document
        .peers
        .iter()
        .enumerate()
        .map(|(i, peer)| (format!("peers[{i}].name"), &peer.value.name));
    let static_sas = document
        .static_sas
        .iter()
        .enumerate()
        .map(|(i, sa)| (format!("static_sas[{i}].name"), &sa.value.name));
    let mut seen = Seen::new();
    for (path, name) in peers.chain(static_sas) {
        if let Some(line) = seen.earlier(&name.value, name.referenced) {
            p.add(name.referenced, path, format_args!(
                "`{}` is the name of the tunnel in line {line} already; each tunnel needs its own name", name.value
            ));
        }
    }
}

fn public_keys(
    p: &mut Problems<'_>,
    document: &Document,
    private_key: Option<&StaticSecretKey>,
    peers: &[Option<Peer>],
) {
    if let (Some(first), None) = (document.peers.first(), &document.private_key_file) {
        p.add(first.value.name.referenced, "private_key_file",
            "peers need this node's own key; add `private_key_file: …` (make one with `esplane keygen -o FILE`)");
    }
    let own = private_key.map(StaticSecretKey::public_key);
    let mut seen = Seen::new();
    for (index, (peer, at)) in peers.iter().zip(&document.peers).enumerate() {
        let Some(peer) = peer else { continue };
        let at = at.value.public_key.referenced;
        let path = format!("peers[{index}].public_key");
        if Some(peer.public_key) == own {
            p.add(at, path, "this is this node's own public key; write that of the other machine (there: esplane pubkey FILE)");
        } else if let Some(line) = seen.earlier(peer.public_key, at) {
            p.add(at, path, format_args!(
                "the peer in line {line} has this public key already; each machine needs a key of its own"
            ));
        }
    }
}

/// Inbound SPIs are ours and must differ.
fn spis(p: &mut Problems<'_>, document: &Document, static_sas: &[Option<StaticSa>]) {
    let mut seen = Seen::new();
    for (index, (sa, at)) in static_sas.iter().zip(&document.static_sas).enumerate() {
        let Some(sa) = sa else { continue };
        let (spi, at) = (sa.inbound.spi, at.value.inbound.spi.referenced);
        if let Some(line) = seen.earlier(spi, at) {
            p.add(at, format!("static_sas[{index}].inbound.spi"), format_args!(
                "the inbound SA in line {line} has the SPI {spi} already; each inbound SA needs its own"
            ));
        }
    }
}

/// No key may serve two SAs: both would count from 1 and use the same nonces. (Both directions of one
/// SA have been compared where it was resolved.)
fn keys(p: &mut Problems<'_>, document: &Document, static_sas: &[Option<StaticSa>]) {
    // By a fingerprint under a random key of this run: it tells nothing of the secret.
    let random = RandomState::new();
    let mut seen: HashMap<u64, Vec<(usize, &KeyMaterial, u64)>> = HashMap::new();
    for (index, (sa, at)) in static_sas.iter().zip(&document.static_sas).enumerate() {
        let Some(sa) = sa else { continue };
        let at = &at.value;
        for (direction, key, at) in [
            ("inbound", &sa.inbound.key, at.inbound.spi.referenced),
            ("outbound", &sa.outbound.key, at.outbound.spi.referenced),
        ] {
            let alike = seen
                .entry(random.hash_one(key.dangerous_key()))
                .or_default();
            let earlier = alike
                .iter()
                .find(|(other, earlier, _)| *other != index && earlier.same_secret(key));
            if let Some((_, _, line)) = earlier {
                p.add(at, format!("static_sas[{index}].{direction}.key"), format_args!(
                    "the SA in line {line} has the same key, so the same nonces would be used twice; make a key of its own"
                ));
            }
            alike.push((index, key, at.line()));
        }
    }
}

/// One protected network and where it is written.
struct Route<'a> {
    prefix: IpPrefix,
    /// The selectors it belongs to: same network, other ports, is no duplicate.
    key: String,
    tunnel: &'a str,
    at: Location,
    path: String,
    /// What of ours may send there.
    local: TrafficSelector,
}

fn routes<'a>(
    document: &'a Document,
    peers: &'a [Option<Peer>],
    static_sas: &'a [Option<StaticSa>],
) -> Vec<Route<'a>> {
    let mut routes = Vec::new();
    for (i, at) in document.peers.iter().enumerate() {
        if peers[i].is_none() {
            continue;
        }
        let tunnel = &at.value.name.value;
        let parsed = written(&at.value.routes.value, format!("peers[{i}].routes"));
        routes.extend(parsed.map(|(prefix, at, path)| Route {
            prefix,
            key: prefix.to_string(),
            tunnel,
            at,
            path,
            local: SelectorPair::to(prefix).local,
        }));
    }
    for (i, at) in document.static_sas.iter().enumerate() {
        let Some(sa) = &static_sas[i] else { continue };
        let tunnel = &at.value.name.value;
        let parsed = written(&at.value.routes, format!("static_sas[{i}].routes"));
        routes.extend(parsed.map(|(prefix, at, path)| Route {
            prefix,
            key: prefix.to_string(),
            tunnel,
            at,
            path,
            local: SelectorPair::to(prefix).local,
        }));
        let pairs = sa.selectors.iter().skip(at.value.routes.len());
        for (j, (pair, selector)) in pairs.zip(&at.value.selectors).enumerate() {
            routes.extend(pair.remote.prefixes().into_iter().map(|prefix| Route {
                prefix,
                key: pair.to_string(),
                tunnel,
                at: selector.value.remote.referenced,
                path: format!("static_sas[{i}].selectors[{j}].remote"),
                local: pair.local,
            }));
        }
    }
    routes
}

fn written(
    routes: &[At<String>],
    path: String,
) -> impl Iterator<Item = (IpPrefix, Location, String)> {
    routes.iter().enumerate().filter_map(move |(index, at)| {
        Some((
            at.value.parse().ok()?,
            at.referenced,
            format!("{path}[{index}]"),
        ))
    })
}

fn duplicate_routes(p: &mut Problems<'_>, routes: &[Route<'_>]) {
    let mut first: BTreeMap<&str, &Route<'_>> = BTreeMap::new();
    for route in routes {
        match first.get(route.key.as_str()) {
            // One selector of several prefixes.
            Some(earlier) if earlier.path == route.path => {}
            Some(earlier) => p.add(
                route.at,
                &route.path,
                format_args!(
                    "{} leads to `{}` already (line {}); a packet can go one way only",
                    route.key,
                    earlier.tunnel,
                    earlier.at.line()
                ),
            ),
            None => {
                first.insert(&route.key, route);
            }
        }
    }
}

/// A peer may live in our own network (an overlay), but not at our own address.
fn own_addresses(p: &mut Problems<'_>, routes: &[Route<'_>], interface: Option<&Interface>) {
    for address in interface.iter().flat_map(|interface| &interface.addresses) {
        let host = IpPrefix::host(address.address);
        for route in routes.iter().filter(|route| route.prefix == host) {
            p.add(route.at, &route.path, format_args!(
                "{} is this node's own address on the inner interface; write the network behind `{}`", address.address, route.tunnel
            ));
        }
    }
}

/// A network in which a peer itself lies is led into the tunnel for packets from behind us alone (`ways.rs`): there must be
/// such networks, and ESP must not come from one.
fn routing_loops(
    p: &mut Problems<'_>,
    document: &Document,
    routes: &[Route<'_>],
    interface: Option<&Interface>,
    peers: &[Option<Peer>],
    static_sas: &[Option<StaticSa>],
) {
    let Some(interface) = interface else { return };
    let mut ends = Vec::new();
    let mut check = |end: IpAddr, at: Location, path: String, written: &dyn fmt::Display| {
        ends.push(end);
        let around = routes.iter().filter(|route| route.prefix.contains(end));
        let ours = around.flat_map(|route| {
            let sources = sources(interface, &route.local).into_iter();
            sources.map(move |own| (route, own))
        });
        if let Some((route, own)) = ours.into_iter().find(|(_, own)| own.contains(end)) {
            p.add(at, path, format_args!(
                "{written} lies inside {}, which is routed into the tunnel `{}` for what comes from {own}, and inside that, too: ESP would run in circles; narrow that route, or set `install_routes: false` and route yourself",
                route.prefix, route.tunnel
            ));
        }
    };
    for (i, (peer, document)) in peers.iter().zip(&document.peers).enumerate() {
        if let (
            Some(Peer {
                endpoint: Some(Endpoint::Address(end)),
                ..
            }),
            Some(at),
        ) = (peer, &document.value.endpoint)
        {
            check(end.ip(), at.referenced, format!("peers[{i}].endpoint"), end);
        }
    }
    for (i, (sa, document)) in static_sas.iter().zip(&document.static_sas).enumerate() {
        if let Some(sa) = sa {
            let remote = sa.path.remote();
            check(
                remote,
                document.value.remote.referenced,
                format!("static_sas[{i}].remote"),
                &remote,
            );
        }
    }
    for route in routes {
        let sources = sources(interface, &route.local);
        if sources.is_empty() && may_hold_a_peer(&route.prefix, &ends) {
            p.add(route.at, &route.path, format_args!(
                "the peer itself lies in {}, so only packets from networks behind this node can be led there, and `interface.addresses` names none; add this node's address in such a network, as `{}`, or set `install_routes: false` and route yourself",
                route.prefix,
                if route.prefix.address().is_ipv4() { "10.1.0.1/16" } else { "fd01::1/64" }
            ));
        }
    }
}
