//! What the control side does for imported tunnels besides their SAs.

use super::{Fact, Link};
use crate::{
    config::{Config, Mode, Strongswan},
    io::AddressFilter,
    node::Node,
    ways::{Ways, may_hold_a_peer},
};
use esplane_api::{IpPrefix, OuterPath, SaStatus, TrafficSelector, TunnelId};
use esplane_control_vici::importer::{Database, ImportSettings, Importer};
use std::{collections::BTreeSet, net::IpAddr};
use tracing::{debug, error};

/// Numbers of imported tunnels start here; those of the configuration never get so far.
const FIRST_TUNNEL: TunnelId = TunnelId(1 << 31);

/// The sockets' side of the import.
pub(crate) struct Takeover {
    pub link: Link,
    filter: AddressFilter,
    /// Whether children, networks or ways may have changed.
    news: bool,
    /// The ways of the SAs that are installed.
    paths: BTreeSet<PathKey>,
    /// Whether charon and the kernel have told what there is, once.
    heard_charon: bool,
    heard_kernel: bool,
    /// Whether charon answers now.
    pub charon_answers: bool,
}

type PathKey = (IpAddr, IpAddr, Option<(u16, u16)>);

impl Takeover {
    pub fn new(link: Link, filter: AddressFilter) -> Self {
        Self {
            link,
            filter,
            news: true,
            paths: BTreeSet::new(),
            heard_charon: false,
            heard_kernel: false,
            charon_answers: false,
        }
    }

    /// The importer for a configuration.
    pub fn importer(config: &Strongswan) -> Importer {
        let defaults = ImportSettings::default();
        Importer::new(ImportSettings {
            first_tunnel: FIRST_TUNNEL,
            database: match config.mode {
                Mode::Kernel => Database::Kernel { inert: config.mark },
                Mode::Preload { .. } => Database::Esplane,
            },
            only: config.connections.clone(),
            window: config.window.unwrap_or(defaults.window),
            df: config.df,
            ..defaults
        })
    }

    /// Hands a fact to the node.
    pub fn hear(&mut self, node: &mut Node, now: esplane_api::Now, fact: Fact) {
        use esplane_control_vici::{vici::ViciEvent, xfrm::XfrmEvent};
        match fact {
            Fact::Vici(event) => {
                self.charon_answers = !matches!(event, ViciEvent::Lost);
                self.news = true;
                self.heard_charon |= matches!(event, ViciEvent::Snapshot(_));
                node.handle_vici(now, event);
            }
            Fact::Xfrm(event) => {
                self.news |= !matches!(event, XfrmEvent::Reply(_));
                self.heard_kernel |= matches!(event, XfrmEvent::Snapshot(_));
                node.handle_xfrm(now, event);
            }
        }
    }

    /// Lets the sockets listen where the SAs of imported tunnels end.
    pub fn follow(&mut self, sas: &[SaStatus]) {
        let imported = sas.iter().filter(|sa| is_imported(sa.id.tunnel));
        let paths: BTreeSet<PathKey> = imported.map(|sa| key(&sa.path)).collect();
        self.news = true;
        if paths == self.paths {
            return;
        }
        let in_udp = paths.iter().filter(|(_, _, encap)| encap.is_some());
        let addresses: BTreeSet<IpAddr> = in_udp.map(|(local, _, _)| *local).collect();
        debug!(?addresses, "ESP in UDP is taken at");
        match self.filter.listen_at(addresses) {
            Ok(_) => self.paths = paths,
            // Tried again with the next change.
            Err(error) => error!("cannot receive ESP in UDP at the tunnels' addresses: {error}"),
        }
    }

    /// Routes are to be looked at again: what is configured has changed.
    pub fn look_again(&mut self) {
        self.news = true;
    }

    /// Whether there was news since the last time.
    pub fn news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// The ways to all peers.
    pub fn paths(&self) -> Vec<OuterPath> {
        let path = |(local, remote, encap): &PathKey| {
            let encap = encap.map(|(local_port, remote_port)| esplane_api::UdpEncap {
                local_port,
                remote_port,
            });
            OuterPath::new(*local, *remote, encap).ok()
        };
        self.paths.iter().filter_map(path).collect()
    }

    /// Why packets of imported tunnels cannot flow yet. A charon that goes away later leaves its SAs, which
    /// are carried on.
    pub fn not_ready_because(&self, config: &Strongswan) -> Option<String> {
        match (&config.mode, self.heard_kernel, self.heard_charon) {
            (Mode::Kernel, false, _) => Some("the kernel has not told its SAs yet".to_owned()),
            (Mode::Preload { socket }, false, _) => Some(format!(
                "charon's preloaded library has not come to {} yet",
                socket.display()
            )),
            (_, true, false) => Some(format!(
                "charon has not answered at {} yet",
                config.vici.display()
            )),
            (_, true, true) => None,
        }
    }
}

/// Whether a tunnel is the importer's.
pub(crate) fn is_imported(tunnel: TunnelId) -> bool {
    tunnel >= FIRST_TUNNEL
}

fn key(path: &OuterPath) -> PathKey {
    let encap = path
        .encap()
        .map(|encap| (encap.local_port, encap.remote_port));
    (path.local(), path.remote(), encap)
}

/// The ways to `wanted`. `pairs` are what children protect: a remote network, and what may send there; `paths` where ESP goes.
pub(crate) fn ways(
    config: &Config,
    wanted: Vec<IpPrefix>,
    pairs: &[(IpPrefix, TrafficSelector)],
    paths: &[OuterPath],
) -> Ways {
    let mut ways = Ways::default();
    let ends: Vec<IpAddr> = paths.iter().map(OuterPath::remote).collect();
    for remote in wanted {
        let mut inside = paths.iter().filter(|path| remote.contains(path.remote()));
        let locals = || {
            pairs
                .iter()
                .filter(|pair| pair.0 == remote)
                .map(|pair| pair.1)
        };
        let ours_inside = inside.find(|path| locals().any(|local| local.contains(path.local())));
        if !config.install_routes {
            let problem = "install_routes is off".to_owned();
            ways.none.insert(remote, problem);
        } else if !config.strongswan.as_ref().is_some_and(|it| it.routes) {
            let problem = "strongswan.routes is off".to_owned();
            ways.none.insert(remote, problem);
        } else if let Some(path) = ours_inside {
            let problem = format!(
                "the peer's own address {} lies inside, and ours, {}, in local_ts, so ESP would run in circles; set narrower routes yourself",
                path.remote(),
                path.local()
            );
            ways.none.insert(remote, problem);
        } else if may_hold_a_peer(&remote, &ends) {
            let prefixes = locals().flat_map(|local| local.prefixes());
            ways.by_source.extend(prefixes.map(|local| (local, remote)));
        } else {
            ways.routes.insert(remote, config.route_metric);
        }
    }
    ways
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(more: &str) -> Config {
        let text = format!("name: n\ninterface: {{ name: esp0 }}\nstrongswan: {more}\n");
        Config::from_text(Path::new("esplane.yaml"), &text).unwrap()
    }

    fn prefix(text: &str) -> IpPrefix {
        text.parse().unwrap()
    }

    fn path(here: &str, there: &str) -> OuterPath {
        OuterPath::new(here.parse().unwrap(), there.parse().unwrap(), None).unwrap()
    }

    #[test]
    fn a_network_that_holds_the_peer_itself_is_a_route_for_what_comes_from_behind_us_alone() {
        let (all, site, lan) = (
            IpPrefix::ALL_V4,
            prefix("10.2.0.0/16"),
            prefix("203.0.113.0/24"),
        );
        let pairs = [
            (all, "10.1.0.0-10.1.2.255"),
            (site, "10.1.0.0/16"),
            (lan, "10.1.0.0/16"),
        ];
        let pairs = pairs.map(|(remote, local)| (remote, local.parse().unwrap()));
        let paths = [path("192.0.2.1", "203.0.113.1")];
        let found = ways(&config("{}"), vec![all, site, lan], &pairs, &paths);
        assert_eq!(Vec::from_iter(found.routes.into_keys()), [site]);
        let by_source = [
            ("10.1.0.0/16", lan),
            ("10.1.0.0/23", all),
            ("10.1.2.0/24", all),
        ];
        let by_source = by_source.map(|(local, remote)| (prefix(local), remote));
        assert_eq!(found.by_source, BTreeSet::from(by_source));
        assert!(found.none.is_empty(), "{:?}", found.none);
    }

    #[test]
    fn everything_is_no_route_before_a_peer_is_known_either() {
        let pairs = [(IpPrefix::ALL_V6, "fd01::/64".parse().unwrap())];
        let found = ways(&config("{}"), vec![IpPrefix::ALL_V6], &pairs, &[]);
        assert!(found.routes.is_empty() && found.none.is_empty());
        let by_source = (prefix("fd01::/64"), IpPrefix::ALL_V6);
        assert_eq!(found.by_source, BTreeSet::from([by_source]));
    }

    #[test]
    fn where_esp_itself_would_be_protected_there_is_no_route_and_it_says_so() {
        let pairs = [(IpPrefix::ALL_V4, "0.0.0.0/0".parse().unwrap())];
        let paths = [path("192.0.2.1", "203.0.113.1")];
        let wanted = vec![IpPrefix::ALL_V4];
        let found = ways(&config("{}"), wanted.clone(), &pairs, &paths);
        assert!(found.routes.is_empty() && found.by_source.is_empty());
        let problem = &found.none[&IpPrefix::ALL_V4];
        assert!(
            problem.contains("203.0.113.1 lies inside, and ours, 192.0.2.1"),
            "{problem}"
        );
        let found = ways(&config("{ routes: false }"), wanted, &pairs, &paths);
        assert_eq!(found.none[&IpPrefix::ALL_V4], "strongswan.routes is off");
    }
}
