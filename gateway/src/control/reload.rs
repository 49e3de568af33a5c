//! What is asked of the control side, and the way from one configuration to the next.
//!
//! A reload is all or nothing. Each step can be taken back, in this order:
//!
//! 1. routes: new ones before stale ones go, so that nothing meets the default route in between;
//! 2. static SAs that changed leave, peers change, new static SAs come: a network may move
//!    from one to the other.

use super::{
    Control, Request,
    statics::{Source, StaticError},
};
use crate::{
    config::{Config, ConfigError, StaticSa},
    http::ApplyError,
    netlink::NetlinkError,
    strongswan::{Takeover, is_imported},
    ways::Ways,
};
use tracing::{error, info};

/// Why the old configuration stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What cannot change while the daemon runs.
    #[error("{} changed, which takes a restart of the daemon", .0.join(", "))]
    RestartNeeded(Vec<&'static str>),
    /// The kernel refused a route.
    #[error(transparent)]
    Routes(#[from] NetlinkError),
    /// The key exchange refused a peer.
    #[error(transparent)]
    Peers(#[from] esplane_control_noise::ConfigError),
    /// A static SA cannot be installed.
    #[error(transparent)]
    Statics(#[from] StaticError),
}

impl Control {
    pub(super) async fn answer(&mut self, request: Request) {
        match request {
            Request::Status(answer) => {
                let _ = answer.send(self.overview());
            }
            Request::InstallStatic(sa, answer) => {
                let _ = answer.send(self.install_by_api(*sa).await);
            }
            Request::RemoveStatic(name, answer) => {
                let _ = answer.send(self.remove_by_api(name).await);
            }
            Request::Reload => self.reload().await,
            Request::Stop => {} // ends the loop before it gets here
        }
    }

    async fn reload(&mut self) {
        let file = self.config.file.clone();
        let adopted = match Config::load(&file) {
            Ok(config) => self.adopt(config).await,
            Err(error) => Err(error.into()),
        };
        match adopted {
            Ok(()) => {
                self.reloads.succeeded += 1;
                info!("{}: in force now", file.display());
            }
            Err(error) => {
                self.reloads.failed += 1;
                error!("the configuration in force stays as it is: {error}");
            }
        }
    }

    async fn adopt(&mut self, new: Config) -> Result<(), ReloadError> {
        let restart_needed = self.config.restart_needed(&new);
        if !restart_needed.is_empty() {
            return Err(ReloadError::RestartNeeded(restart_needed));
        }
        let ways = self.set_ways(self.ways_with(&new)).await;
        if let Err(error) = ways
            .map_err(ReloadError::from)
            .and_then(|()| self.adopt_tunnels(&new))
        {
            if let Err(error) = self.set_ways(self.ways_with(&self.config)).await {
                error!("{error}");
            }
            return Err(error);
        }
        self.log.reload(&new.log);
        self.resolver.follow(&new);
        self.config = new;
        self.ask(Takeover::look_again);
        Ok(())
    }

    fn adopt_tunnels(&mut self, new: &Config) -> Result<(), ReloadError> {
        let now = self.clock.now();
        let by_api: Vec<&str> = self
            .statics
            .iter()
            .filter(|installed| installed.source == Source::Api)
            .map(|installed| installed.sa.name.as_str())
            .collect();
        let ids = self.ids.assign(new.tunnel_names().chain(by_api));
        let wanted = |sa: &StaticSa| new.static_sas.iter().any(|other| other.same_as(sa));
        let stale: Vec<StaticSa> = self
            .statics
            .iter()
            .filter(|installed| installed.source == Source::File && !wanted(&installed.sa))
            .map(|installed| installed.sa.clone())
            .collect();
        let fresh: Vec<StaticSa> = new
            .static_sas
            .iter()
            .filter(|sa| {
                !self
                    .statics
                    .iter()
                    .any(|installed| installed.sa.same_as(sa))
            })
            .cloned()
            .collect();
        let stale_names: Vec<String> = stale.iter().map(|sa| sa.name.clone()).collect();
        let node = &mut self.node;

        self.statics
            .change(node, now, &self.ids, &stale_names, Vec::new(), Source::File)?;
        let resolved = &self.resolved;
        let resolve = |peer: &crate::config::Peer| resolved.get(&peer.name).copied();
        let outcome = match node.set_peers(now, new.noise_peers(&ids, resolve)) {
            Ok(()) => self
                .statics
                .change(node, now, &ids, &[], fresh, Source::File)
                .map_err(ReloadError::from),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            if let Err(error) = node.set_peers(now, self.config.noise_peers(&self.ids, resolve)) {
                error!("{error}");
            }
            if let Err(error) = self
                .statics
                .change(node, now, &self.ids, &[], stale, Source::File)
            {
                error!("{error}");
            }
            return Err(error);
        }
        self.ids = ids;
        let ids = &self.ids;
        self.node
            .retain_traffic(|tunnel| ids.name(tunnel).is_some() || is_imported(tunnel));
        Ok(())
    }

    async fn install_by_api(&mut self, sa: StaticSa) -> Result<(), ApplyError> {
        let conflict = |path: &str, message: String| ApplyError::Conflict {
            path: path.to_owned(),
            message,
        };
        let name = sa.name.clone();
        if self.ids.get(&name).is_some() {
            let message = format!(
                "there is a tunnel `{name}` already; remove that one first, or choose another name"
            );
            return Err(conflict("name", message));
        }
        if sa.path.encap().is_none() && !self.config.uses_plain_esp() {
            let message = "this daemon has no raw sockets for plain ESP, as its file had no such SA at start; \
                           add `udp: {}`, or put the SA into the file and restart";
            return Err(conflict("udp", message.to_owned()));
        }
        if sa.path.encap().is_some() && !self.config.uses_own_port() {
            let message = "this daemon has no UDP port of its own beside strongSwan's, as its file had no such SA at start; \
                           leave `udp` out, or put the SA into the file and restart";
            return Err(conflict("udp", message.to_owned()));
        }
        let names: Vec<String> = self.ids.iter().map(|(name, _)| name.to_owned()).collect();
        let ids = self
            .ids
            .assign(names.iter().map(String::as_str).chain([name.as_str()]));
        let now = self.clock.now();
        self.statics
            .change(&mut self.node, now, &ids, &[], vec![sa], Source::Api)
            .map_err(|error| match error {
                StaticError::Refused(error) => conflict("", error.to_string()),
                StaticError::Reservation(error) => ApplyError::Failed(error.to_string()),
            })?;
        self.ids = ids;
        if let Err(error) = self.set_ways(self.ways_with(&self.config)).await {
            let undone = self.remove_by_api(name).await;
            return Err(undone
                .err()
                .unwrap_or_else(|| conflict("routes", error.to_string())));
        }
        Ok(())
    }

    async fn remove_by_api(&mut self, name: String) -> Result<(), ApplyError> {
        if self.statics.get(&name).is_none() {
            return Err(ApplyError::Unknown(name));
        }
        let now = self.clock.now();
        self.statics
            .change(
                &mut self.node,
                now,
                &self.ids,
                std::slice::from_ref(&name),
                Vec::new(),
                Source::Api,
            )
            .map_err(|error| ApplyError::Failed(error.to_string()))?;
        let rest: Vec<String> = self
            .ids
            .iter()
            .filter(|(other, _)| *other != name)
            .map(|(other, _)| other.to_owned())
            .collect();
        self.ids = self.ids.assign(rest.iter().map(String::as_str));
        let ids = &self.ids;
        self.node
            .retain_traffic(|tunnel| ids.name(tunnel).is_some() || is_imported(tunnel));
        self.set_ways(self.ways_with(&self.config))
            .await
            .map_err(|error| ApplyError::Failed(error.to_string()))
    }

    /// The ways that `config` and the tunnels installed by the API or by strongSwan want.
    pub(super) fn ways_with(&self, config: &Config) -> Ways {
        let installed = self.statics.iter();
        let by_api = installed.filter(|installed| installed.source == Source::Api);
        let by_api = by_api.map(|installed| &installed.sa);
        let static_sas: Vec<_> = config.static_sas.iter().chain(by_api).collect();
        let found = self.resolved.values().map(|found| found.ip());
        let mut ways = Ways::configured(config, &static_sas, found);
        let imported = self.imported_ways(config);
        ways.routes.extend(imported.routes);
        ways.by_source.extend(imported.by_source);
        ways
    }

    /// Makes these the ways into the interface. On an error some may be there: set the old ones again.
    pub(super) async fn set_ways(&mut self, ways: Ways) -> Result<(), NetlinkError> {
        self.network.check_circles(&ways).await?;
        self.network.set_routes(ways.routes).await?;
        let mut refused = self.network.set_by_source(&ways.by_source).await;
        refused.pop_first().map_or(Ok(()), |(_, error)| Err(error))
    }
}
