//! What the control side does for imported tunnels besides their SAs.

use super::{Fact, Link};
use crate::{
    config::{Config, Mode, Strongswan},
    io::AddressFilter,
    node::Node,
};
use esplane_api::{IpPrefix, OuterPath, SaStatus, TunnelId};
use esplane_control_vici::importer::{Database, ImportSettings, Importer};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};
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

/// Imported networks become routes, but for those that the peer itself lies in: ESP would run in circles.
/// Answers what becomes a route, and why the others do not.
pub(crate) fn routes(
    config: &Config,
    wanted: Vec<IpPrefix>,
    paths: &[OuterPath],
) -> (BTreeMap<IpPrefix, u32>, BTreeMap<IpPrefix, String>) {
    let (mut good, mut bad) = (BTreeMap::new(), BTreeMap::new());
    for prefix in wanted {
        match paths.iter().find(|path| prefix.contains(path.remote())) {
            _ if !config.install_routes => {
                bad.insert(prefix, "install_routes is off".to_owned());
            }
            _ if !config.strongswan.as_ref().is_some_and(|it| it.routes) => {
                bad.insert(prefix, "strongswan.routes is off".to_owned());
            }
            Some(path) => {
                let problem = format!(
                    "the peer's own address {} lies inside, so ESP would run in circles; set a narrower route yourself",
                    path.remote()
                );
                bad.insert(prefix, problem);
            }
            None => {
                good.insert(prefix, config.route_metric);
            }
        }
    }
    (good, bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_network_that_holds_the_peer_itself_is_no_route_and_says_so() {
        let config = |more: &str| {
            let text = format!("name: n\ninterface: {{ name: esp0 }}\nstrongswan: {more}\n");
            Config::from_text(Path::new("esplane.yaml"), &text).unwrap()
        };
        let prefix = |text: &str| -> IpPrefix { text.parse().unwrap() };
        let wanted = vec![IpPrefix::ALL_V4, prefix("10.2.0.0/16"), IpPrefix::ALL_V6];
        let (here, peer) = ("192.0.2.1".parse().unwrap(), "203.0.113.1".parse().unwrap());
        let paths = [OuterPath::new(here, peer, None).unwrap()];
        let (good, bad) = routes(&config("{}"), wanted.clone(), &paths);
        let good: Vec<IpPrefix> = good.into_keys().collect();
        assert_eq!(good, [prefix("10.2.0.0/16"), IpPrefix::ALL_V6]);
        assert!(
            bad[&IpPrefix::ALL_V4].contains("203.0.113.1 lies inside"),
            "{bad:?}"
        );
        let (good, bad) = routes(&config("{ routes: false }"), wanted, &paths);
        assert!(good.is_empty() && bad.len() == 3, "{good:?} {bad:?}");
    }
}
