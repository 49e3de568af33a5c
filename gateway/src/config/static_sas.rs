//! Manually keyed tunnels: from the file or the HTTP API to what the dataplane takes.

use super::{
    document::{
        At, KeyDocument, LifetimeDocument, SelectorDocument, StaticSaDocument, UdpDocument,
    },
    peers::{df, esn, window},
    problem::{Problem, Problems},
    resolve::{name, number, report, text},
    secrets, yaml,
};
use esplane_api::{
    AeadSuite, DfPolicy, Direction, Esn, IpPrefix, KeyMaterial, Lifetime, OuterPath, PathError,
    Policy, PolicyAction, SaPair, SaParams, SelectorPair, SequenceStart, Spi, TrafficSelector,
    TunnelId, TunnelParams, UdpEncap, WindowSize,
};
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// RFC 3948's port.
const DEFAULT_UDP_PORT: u16 = 4500;

/// One manually keyed tunnel: a pair of SAs that nobody renews.
#[derive(Clone, Debug)]
pub struct StaticSa {
    /// Its name, and its tunnel's.
    pub name: String,
    /// Where its packets travel.
    pub path: OuterPath,
    /// The DF bit of outer IPv4 headers.
    pub df: DfPolicy,
    /// Sequence numbers of 64 bits.
    pub esn: Esn,
    /// The replay window.
    pub window: WindowSize,
    /// What we receive with.
    pub inbound: StaticKey,
    /// What we send with.
    pub outbound: StaticKey,
    /// Which packets it carries.
    pub selectors: Vec<SelectorPair>,
    /// When it ends.
    pub lifetime: Lifetime,
}

/// One direction's name and secret.
#[derive(Clone, Debug)]
pub struct StaticKey {
    /// Its name on the wire.
    pub spi: Spi,
    /// Suite, key and salt.
    pub key: KeyMaterial,
}

/// What the checks of one static SA need to know of the rest.
#[derive(Clone, Debug)]
pub struct StaticSaContext {
    /// The port on which ESP in UDP arrives.
    pub listen_port: u16,
    /// Where relative key files start from; a request over HTTP has no such place.
    pub directory: Option<PathBuf>,
}

impl StaticSa {
    /// From the body of `POST /v1/static-sas`: JSON with the keys of the file's `static_sas`.
    pub fn from_request(context: &StaticSaContext, body: &str) -> Result<Self, Vec<Problem>> {
        let document = yaml::parse_static_sa(body)?;
        let mut problems = Problems::new(body);
        match one(&mut problems, context, "", &document) {
            Some(sa) if problems.is_empty() => Ok(sa),
            _ => Err(problems.into_vec()),
        }
    }

    /// The far networks, to be routed into the tunnel.
    pub fn routes(&self) -> Vec<IpPrefix> {
        let mut routes: Vec<IpPrefix> = self
            .selectors
            .iter()
            .flat_map(|pair| pair.remote.prefixes())
            .collect();
        routes.sort_unstable();
        routes.dedup();
        routes
    }

    /// The tunnel to define before its SAs are installed.
    pub fn tunnel_params(&self, id: TunnelId) -> TunnelParams {
        let protect = |selectors: &SelectorPair| Policy {
            selectors: *selectors,
            action: PolicyAction::Protect(id),
            priority: 0,
        };
        TunnelParams {
            id,
            name: self.name.clone(),
            policies: self.selectors.iter().map(protect).collect(),
            // Whoever keys by hand names the addresses by hand: a static SA stays where it is.
            roaming: false,
            df: self.df,
        }
    }

    /// Both SAs. `sequence` must come from a durable reservation: the key outlives the daemon.
    pub fn sa_pair(&self, tunnel: TunnelId, sequence: SequenceStart) -> SaPair {
        let sa = |direction, key: &StaticKey, sequence| SaParams {
            tunnel,
            direction,
            spi: key.spi,
            key: key.key.clone(),
            esn: self.esn,
            window: self.window,
            path: self.path,
            selectors: self.selectors.clone(),
            lifetime: self.lifetime,
            sequence,
            worker: None,
        };
        SaPair {
            inbound: sa(Direction::Inbound, &self.inbound, SequenceStart::FRESH),
            outbound: sa(Direction::Outbound, &self.outbound, sequence),
        }
    }

    /// Whether nothing differs, secrets included: then a reload leaves its SAs alone.
    pub fn same_as(&self, other: &Self) -> bool {
        let same_key = |a: &StaticKey, b: &StaticKey| a.spi == b.spi && a.key.same_secret(&b.key);
        let settings = |sa: &Self| (sa.path, sa.df, sa.esn, sa.window, sa.lifetime);
        self.name == other.name
            && settings(self) == settings(other)
            && self.selectors == other.selectors
            && same_key(&self.inbound, &other.inbound)
            && same_key(&self.outbound, &other.outbound)
    }
}

/// The tunnels' numbers by their names: stable while a name stays, never used twice in a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunnelIds {
    by_name: BTreeMap<String, TunnelId>,
    used: u32,
}

impl TunnelIds {
    /// The numbers for exactly these names, those of `self` kept.
    #[must_use]
    pub fn assign<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut assigned = Self {
            by_name: BTreeMap::new(),
            used: self.used,
        };
        for name in names {
            let id = self.get(name).or_else(|| assigned.get(name));
            let id = id.unwrap_or_else(|| {
                assigned.used += 1;
                TunnelId(assigned.used)
            });
            assigned.by_name.insert(name.to_owned(), id);
        }
        assigned
    }

    /// The number of one name.
    pub fn get(&self, name: &str) -> Option<TunnelId> {
        self.by_name.get(name).copied()
    }

    /// The name of one number.
    pub fn name(&self, id: TunnelId) -> Option<&str> {
        self.iter()
            .find_map(|(name, other)| (other == id).then_some(name))
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, TunnelId)> {
        self.by_name.iter().map(|(name, id)| (name.as_str(), *id))
    }
}

/// In the document's order; `None` where one was wrong and has been reported.
pub(super) fn all(
    p: &mut Problems<'_>,
    context: &StaticSaContext,
    documents: &[At<StaticSaDocument>],
) -> Vec<Option<StaticSa>> {
    documents
        .iter()
        .enumerate()
        .map(|(index, document)| {
            one(
                p,
                context,
                &format!("static_sas[{index}]."),
                &document.value,
            )
        })
        .collect()
}

/// `prefix` is empty or ends in a dot.
fn one(
    p: &mut Problems<'_>,
    context: &StaticSaContext,
    prefix: &str,
    document: &StaticSaDocument,
) -> Option<StaticSa> {
    let at = |key: &str| format!("{prefix}{key}");
    let name = name(p, &document.name, &at("name"));
    let suite: Option<AeadSuite> = text(p, &document.suite, &at("suite"));
    let path = path(p, context, prefix, document);
    let inbound = key(p, context, &at("inbound"), &document.inbound, suite);
    let outbound = key(p, context, &at("outbound"), &document.outbound, suite);
    if let (Some(inbound), Some(outbound)) = (&inbound, &outbound)
        && inbound.key.same_secret(&outbound.key)
    {
        // RFC 4106 §2: "If an IV is used with the same key twice, confidentiality is lost": both ends
        // count from 1, so one key for both directions does just that.
        let place = &document.outbound;
        let place = place
            .key
            .as_ref()
            .map(|at| at.referenced)
            .or(place.key_file.as_ref().map(|at| at.referenced));
        p.add(
            place.unwrap_or(document.name.referenced),
            at("outbound.key"),
            "both directions have the same key, so both ends would use the same nonces and give the traffic away; make a second key",
        );
    }
    let selectors = selectors(p, prefix, document);
    let lifetime = match &document.lifetime {
        None => Some(Lifetime::UNLIMITED),
        Some(value) => {
            let LifetimeDocument { soft, hard } = value.value;
            report(p, value, &at("lifetime"), Lifetime::new(soft, hard))
        }
    };
    let window = window(p, document.window_packets.as_ref(), &at("window_packets"));
    let df = df(p, document.df.as_ref(), &at("df"));
    Some(StaticSa {
        name: name?,
        path: path?,
        df,
        esn: esn(document.esn),
        window,
        inbound: inbound?,
        outbound: outbound?,
        selectors: selectors?,
        lifetime: lifetime?,
    })
}

fn path(
    p: &mut Problems<'_>,
    context: &StaticSaContext,
    prefix: &str,
    document: &StaticSaDocument,
) -> Option<OuterPath> {
    let remote = address(p, &document.remote, &format!("{prefix}remote"));
    let local = match &document.local {
        Some(at) => address(p, at, &format!("{prefix}local")).map(Some),
        None => Some(None),
    };
    let encap = match &document.udp {
        Some(udp) => Some(udp_encap(p, context, &format!("{prefix}udp"), udp)?),
        None => None,
    };
    let (remote, local) = (remote?, local?);
    let any: IpAddr = match remote {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let path = OuterPath::new(local.unwrap_or(any), remote, encap);
    match (&path, &document.local) {
        (Err(PathError::MixedFamilies { .. }), Some(at)) => {
            report(p, at, &format!("{prefix}local"), path)
        }
        _ => report(p, &document.remote, &format!("{prefix}remote"), path),
    }
}

fn address(p: &mut Problems<'_>, at: &At<String>, path: &str) -> Option<IpAddr> {
    let parsed = at.value.parse().map_err(|_| {
        format!(
            "`{}` is no address; write an IPv4 or IPv6 address, such as 192.0.2.2",
            at.value
        )
    });
    report(p, at, path, parsed)
}

fn udp_encap(
    p: &mut Problems<'_>,
    context: &StaticSaContext,
    path: &str,
    document: &UdpDocument,
) -> Option<UdpEncap> {
    let local_path = format!("{path}.local_port");
    let remote_path = format!("{path}.remote_port");
    let local = number(p, document.local_port.as_ref(), &local_path, 1..=65_535);
    let remote = number(p, document.remote_port.as_ref(), &remote_path, 1..=65_535);
    if let (Some(at), Some(port)) = (&document.local_port, local)
        && port != u64::from(context.listen_port)
        && context.listen_port != 0
    {
        p.add(at.referenced, local_path, format_args!(
            "ESP in UDP arrives on the port of `listen`, {}; leave `local_port` out or write that", context.listen_port
        ));
        return None;
    }
    let wrong = (document.local_port.is_some() && local.is_none())
        || (document.remote_port.is_some() && remote.is_none());
    (!wrong).then_some(UdpEncap {
        local_port: local.map_or(context.listen_port, |port| port as u16),
        remote_port: remote.map_or(DEFAULT_UDP_PORT, |port| port as u16),
    })
}

fn key(
    p: &mut Problems<'_>,
    context: &StaticSaContext,
    path: &str,
    document: &KeyDocument,
    suite: Option<AeadSuite>,
) -> Option<StaticKey> {
    let spi = text(p, &document.spi, &format!("{path}.spi"));
    let key = match (&document.key, &document.key_file) {
        (Some(at), None) => {
            let parsed = key_material(suite?, at.value.dangerous_text());
            report(p, at, &format!("{path}.key"), parsed)
        }
        (None, Some(at)) => {
            let path = format!("{path}.key_file");
            let file = report(p, at, &path, key_file(context, &at.value))?;
            let advice = "write the key and salt into it as hexadecimal digits";
            let content = report(p, at, &path, secrets::text(&file, advice))?;
            report(p, at, &path, key_material(suite?, content.trim()))
        }
        (Some(_), Some(at)) => {
            p.add(
                at.referenced,
                format!("{path}.key_file"),
                "`key` and `key_file` stand here both; keep one",
            );
            None
        }
        (None, None) => {
            p.add(
                document.spi.referenced,
                path,
                "this direction has no key; add `key_file: …` (or `key: …`)",
            );
            None
        }
    };
    Some(StaticKey {
        spi: spi?,
        key: key?,
    })
}

fn key_file(context: &StaticSaContext, file: &Path) -> Result<PathBuf, String> {
    match &context.directory {
        Some(directory) => Ok(directory.join(file)),
        None if file.is_absolute() => Ok(file.to_owned()),
        None => Err(format!(
            "`{0}` is a relative path, and a request has no directory; write the whole path, such as /etc/esplane/{0}",
            file.display()
        )),
    }
}

/// Hexadecimal digits of key ‖ salt, with or without `0x`, as `ip xfrm` and strongSwan write them.
fn key_material(suite: AeadSuite, text: &str) -> Result<KeyMaterial, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text).as_bytes();
    let value = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
    let bytes: Option<Vec<u8>> = digits
        .chunks(2)
        .map(|pair| match *pair {
            [high, low] => Some(value(high)? << 4 | value(low)?),
            _ => None,
        })
        .collect();
    let bytes = Zeroizing::new(bytes.ok_or(format!(
        "the key is not an even number of hexadecimal digits; {suite} takes {} (key, then salt)",
        2 * suite.keying_material_bytes()
    ))?);
    KeyMaterial::new(suite, &bytes).map_err(|error| error.to_string())
}

fn selectors(
    p: &mut Problems<'_>,
    prefix: &str,
    document: &StaticSaDocument,
) -> Option<Vec<SelectorPair>> {
    let mut found = Vec::new();
    for (index, at) in document.routes.iter().enumerate() {
        let route = text(p, at, &format!("{prefix}routes[{index}]"));
        found.push(route.map(SelectorPair::to));
    }
    for (index, at) in document.selectors.iter().enumerate() {
        found.push(selector(p, &format!("{prefix}selectors[{index}]"), at));
    }
    if found.is_empty() {
        p.add(
            document.name.referenced,
            format!("{prefix}routes"),
            "this SA carries nothing; add `routes: [10.2.0.0/16]` or `selectors`",
        );
    }
    found.into_iter().collect()
}

fn selector(p: &mut Problems<'_>, path: &str, at: &At<SelectorDocument>) -> Option<SelectorPair> {
    let local: Option<TrafficSelector> = text(p, &at.value.local, &format!("{path}.local"));
    let remote: Option<TrafficSelector> = text(p, &at.value.remote, &format!("{path}.remote"));
    let pair = SelectorPair {
        local: local?,
        remote: remote?,
    };
    if is_v4(&pair.local) != is_v4(&pair.remote) {
        p.add(
            at.value.remote.referenced,
            format!("{path}.remote"),
            "`local` and `remote` are of different address families; no packet could fit",
        );
        return None;
    }
    Some(pair)
}

fn is_v4(selector: &TrafficSelector) -> bool {
    selector
        .prefixes()
        .iter()
        .all(|prefix| prefix.address().is_ipv4())
}

impl fmt::Display for StaticSa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "static SA `{}` to {}", self.name, self.path.remote())
    }
}
