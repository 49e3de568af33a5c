//! Peers in the words of control-noise.

use super::{Config, Endpoint, Peer, TunnelIds};
use esplane_api::TunnelId;
use esplane_control_noise::PeerConfig;
use std::net::SocketAddr;

impl Peer {
    /// For [`esplane_control_noise::Engine::set_peers`]. `resolved` is the endpoint's address where
    /// it is a DNS name and has been resolved.
    pub fn to_noise(&self, id: TunnelId, resolved: Option<SocketAddr>) -> PeerConfig {
        PeerConfig {
            id,
            name: self.name.clone(),
            public_key: self.public_key,
            psk: self.psk.clone(),
            endpoint: match self.endpoint {
                Some(Endpoint::Address(address)) => Some(address),
                _ => resolved,
            },
            selectors: self.selectors(),
            suites: self.suites.clone(),
            esn: self.esn,
            window: self.window,
            parallel_sas: self.parallel_sas,
            df: self.df,
            kem: self.kem,
            initiate: self.initiate,
            rekey: self.rekey,
            keepalive_seconds: self.keepalive_seconds,
            dead_after_seconds: Some(self.dead_after_seconds),
        }
    }
}

impl Config {
    /// The names of all tunnels, for [`TunnelIds::assign`].
    pub fn tunnel_names(&self) -> impl Iterator<Item = &str> {
        let peers = self.peers.iter().map(|peer| peer.name.as_str());
        peers.chain(self.static_sas.iter().map(|sa| sa.name.as_str()))
    }

    /// All peers for [`esplane_control_noise::Engine::set_peers`]; `resolve` is
    /// asked for peers whose endpoint is a DNS name.
    /// A peer whose name `ids` does not know is left out.
    pub fn noise_peers(
        &self,
        ids: &TunnelIds,
        resolve: impl Fn(&Peer) -> Option<SocketAddr>,
    ) -> Vec<PeerConfig> {
        self.peers
            .iter()
            .filter_map(|peer| {
                let resolved = match &peer.endpoint {
                    Some(Endpoint::Name { .. }) => resolve(peer),
                    Some(Endpoint::Address(_)) | None => None,
                };
                Some(peer.to_noise(ids.get(&peer.name)?, resolved))
            })
            .collect()
    }
}
