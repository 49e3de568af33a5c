//! How packets for protected networks come into the inner interface.
//!
//! An ordinary route does for most. A network in which a peer itself lies, 0.0.0.0/0 above all, would take the tunnel's own ESP
//! as well: it is a way for packets from behind us alone ([`crate::netlink::SourceRoute`]). Behind us are the networks that an
//! SA's selectors name or, where they name none, those of the inner interface's addresses.

use crate::config::{Config, Endpoint, Interface, StaticSa};
use esplane_api::{IpPrefix, SelectorPair, TrafficSelector};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Which way each network takes.
#[derive(Debug, Default)]
pub(crate) struct Ways {
    /// Routes, with their metrics.
    pub routes: BTreeMap<IpPrefix, u32>,
    /// (local, remote): networks in which a peer itself lies.
    pub by_source: BTreeSet<(IpPrefix, IpPrefix)>,
    /// Networks without a way, and why.
    pub none: BTreeMap<IpPrefix, String>,
    /// Where ESP goes, as far as it is known.
    pub ends: Vec<IpAddr>,
}

impl Ways {
    /// The ways to all that the peers of `config` and these static SAs protect; `found` are addresses of peers that were found by
    /// their names.
    pub fn configured(
        config: &Config,
        static_sas: &[&StaticSa],
        found: impl Iterator<Item = IpAddr>,
    ) -> Self {
        let of_peers = config.peers.iter().filter_map(|peer| match peer.endpoint {
            Some(Endpoint::Address(address)) => Some(address.ip()),
            Some(Endpoint::Name { .. }) | None => None,
        });
        let of_static_sas = static_sas.iter().map(|sa| sa.path.remote());
        let mut ways = Self {
            ends: of_peers.chain(of_static_sas).chain(found).collect(),
            ..Self::default()
        };
        if !config.install_routes {
            return ways;
        }
        let of_peers = config.peers.iter().flat_map(|peer| &peer.routes);
        let of_peers = of_peers.map(|remote| SelectorPair::to(*remote));
        let of_static_sas = static_sas
            .iter()
            .flat_map(|sa| sa.selectors.iter().copied());
        for pair in of_peers.chain(of_static_sas) {
            for remote in pair.remote.prefixes() {
                if may_hold_a_peer(&remote, &ways.ends) {
                    let sources = sources(&config.interface, &pair.local).into_iter();
                    ways.by_source.extend(sources.map(|local| (local, remote)));
                } else {
                    ways.routes.insert(remote, config.route_metric);
                }
            }
        }
        ways
    }
}

/// Whether a peer lies in this network. In everything does one that nothing is known of yet, too.
pub(crate) fn may_hold_a_peer(network: &IpPrefix, ends: &[IpAddr]) -> bool {
    network.length() == 0 || ends.iter().any(|end| network.contains(*end))
}

/// The networks behind us from which packets may take a way for some sources alone.
pub(crate) fn sources(interface: &Interface, local: &TrafficSelector) -> Vec<IpPrefix> {
    let (mut named, any): (Vec<IpPrefix>, Vec<_>) = local
        .prefixes()
        .into_iter()
        .partition(|network| network.length() > 0);
    let own = interface.addresses.iter().map(|address| address.network());
    let is_like = |network: &IpPrefix| {
        let v4 = network.address().is_ipv4();
        any.iter().any(|any| any.address().is_ipv4() == v4)
    };
    named.extend(own.filter(is_like));
    named
}
