//! A tunnel of the dataplane: what it should hold, what it holds, and the commands between the two.

use super::{charon::ChildId, kernel::Serial, numbers::KeyName};
use esplane_api::{
    DfPolicy, Direction, IpPrefix, OuterPath, Policy, PolicyAction, SaCommand, SaId, SaParams,
    SelectorPair, Spi, TrafficSelector, TunnelId, TunnelParams,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

/// What the SAs of one tunnel have in common. CHILD_SAs that follow each other (rekeying, reauthentication) share it;
/// two peers who got the same networks, and so the same reqid, do not.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TunnelKey {
    pub connection: String,
    pub child: String,
    pub origin: Origin,
}

/// Where a tunnel comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// CHILD_SAs.
    Sas { reqid: u32, remote_id: String },
    /// A trap: it has no SAs, and its policies come after those of tunnels that do.
    Trap,
}

/// One tunnel.
pub(super) struct Tunnel {
    pub key: TunnelKey,
    pub name: String,
    /// Tunnels made later have higher ones; among equal policies they decide, as in Linux.
    pub order: u32,
    /// The kernel's SAs that belong to it.
    pub members: BTreeSet<Serial>,
    /// charon's number of the newest CHILD_SA that had SAs here.
    pub newest_child: Option<ChildId>,
    /// The newest of those with which the peer has sent.
    pub confirmed: Option<ChildId>,
    pub selectors: Vec<SelectorPair>,
    /// Where the peer's packets have shown it to be, and where charon had it then.
    pub roamed: Option<Roamed>,
    /// What the dataplane has.
    pub mirror: Mirror,
    /// Whether a change of the peer's address is followed.
    pub follows: bool,
    /// The outbound SA that the operator knows as the one that sends.
    pub active_told: Option<Spi>,
    pub carried_told: bool,
    /// Until when charon is not asked again to negotiate it.
    pub wanted_until: Option<Duration>,
    /// When an SA of it last carried something.
    pub last_carried: Option<Duration>,
}

/// An inbound SA that has just left the kernel while charon has its child: a MOBIKE brings it back at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lingering {
    pub tunnel: TunnelId,
    pub name: KeyName,
    pub child: ChildId,
    pub until: Duration,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Roamed {
    pub stated: SocketAddr,
    pub observed: SocketAddr,
}

/// What the dataplane has of a tunnel.
#[derive(Clone, Debug, Default)]
pub(super) struct Mirror {
    pub params: Option<TunnelParams>,
    pub inbound: BTreeMap<Spi, InstalledInbound>,
    /// In the order of installation.
    pub outbound: Vec<InstalledOutbound>,
    pub active: Option<Spi>,
}

/// An inbound SA of the dataplane.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct InstalledInbound {
    pub spi: Spi,
    /// The kernel's SA; `None` while it lingers.
    pub serial: Option<Serial>,
    pub name: KeyName,
    pub path: OuterPath,
    pub selectors: Vec<SelectorPair>,
    /// Packets and bytes its key had carried before this installation.
    pub base: (u64, u64),
}

/// An outbound SA of the dataplane.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct InstalledOutbound {
    pub spi: Spi,
    pub serial: Serial,
    pub path: OuterPath,
    /// Packets and bytes its key had carried before this installation.
    pub base: (u64, u64),
}

/// What the dataplane should have of a tunnel.
pub(super) struct Wanted {
    /// `None`: no tunnel at all.
    pub params: Option<TunnelParams>,
    /// With the parameters to install it by; those that linger are there and have none.
    pub inbound: Vec<(InstalledInbound, Option<Box<SaParams>>)>,
    /// Those to be installed come with their parameters.
    pub outbound: Vec<(InstalledOutbound, Option<Box<SaParams>>)>,
    /// Which one sends.
    pub sender: Option<Spi>,
}

impl Wanted {
    /// No tunnel at all.
    pub const NOTHING: Self = Self {
        params: None,
        inbound: Vec::new(),
        outbound: Vec::new(),
        sender: None,
    };
}

impl Roamed {
    /// Where an SA's packets travel: charon's word counts as long as it is not the one we have seen to be outdated.
    pub fn apply(&self, stated: OuterPath) -> OuterPath {
        if stated.remote_socket() == self.stated {
            stated.moved_to(self.observed).unwrap_or(stated)
        } else {
            stated
        }
    }
}

impl Mirror {
    /// The commands that make the dataplane have what it should, for one list: within it order matters only to
    /// the checks. Afterwards the mirror shows what the dataplane then has.
    pub fn bring_to(&mut self, tunnel: TunnelId, wanted: Wanted) -> Vec<SaCommand> {
        let mut commands = Vec::new();
        let Some(params) = wanted.params else {
            if self.params.is_some() {
                commands.push(SaCommand::RemoveTunnel(tunnel));
            }
            *self = Self::default();
            return commands;
        };
        self.remove_unwanted(tunnel, &wanted.inbound, &wanted.outbound, &mut commands);
        if self.params.as_ref() != Some(&params) {
            commands.push(SaCommand::DefineTunnel(params.clone()));
            self.params = Some(params);
        }
        // New inbound before outbound: the peer may answer the first packet at once.
        for (sa, params) in wanted.inbound {
            let base = self.inbound.get(&sa.spi).map(|has| has.base);
            if let (None, Some(params)) = (base, params) {
                commands.push(SaCommand::Install(*params));
            }
            let base = base.unwrap_or(sa.base);
            self.inbound.insert(sa.spi, InstalledInbound { base, ..sa });
        }
        for (sa, params) in wanted.outbound {
            let Some(params) = params else {
                continue;
            };
            commands.push(SaCommand::Install(*params));
            self.active = self.active.or(Some(sa.spi));
            self.outbound.push(sa);
        }
        if let Some(spi) = wanted.sender
            && self.active != Some(spi)
        {
            commands.push(SaCommand::Activate { tunnel, spi });
            self.active = Some(spi);
        }
        commands
    }

    fn remove_unwanted(
        &mut self,
        tunnel: TunnelId,
        inbound: &[(InstalledInbound, Option<Box<SaParams>>)],
        outbound: &[(InstalledOutbound, Option<Box<SaParams>>)],
        commands: &mut Vec<SaCommand>,
    ) {
        let id = |direction, spi| SaId {
            tunnel,
            direction,
            spi,
        };
        self.inbound.retain(|spi, has| {
            let as_it_is = |sa: &InstalledInbound| (sa.spi, sa.name, sa.path, sa.selectors.clone());
            let mut wanted = inbound.iter();
            let stays = wanted.any(|(wanted, _)| as_it_is(wanted) == as_it_is(has));
            if !stays {
                commands.push(SaCommand::Remove(id(Direction::Inbound, *spi)));
            }
            stays
        });
        self.outbound.retain(|has| {
            let mut wanted = outbound.iter();
            let stays = wanted.any(|(wanted, params)| wanted == has && params.is_none());
            if !stays {
                commands.push(SaCommand::Remove(id(Direction::Outbound, has.spi)));
            }
            stays
        });
        self.promote();
    }

    /// As it is after these removals.
    pub fn without(&mut self, removals: &[SaCommand]) {
        for command in removals {
            match command {
                SaCommand::Remove(sa) if sa.direction == Direction::Inbound => {
                    self.inbound.remove(&sa.spi);
                }
                SaCommand::Remove(sa) => self.outbound.retain(|has| has.spi != sa.spi),
                _ => *self = Self::default(),
            }
        }
        self.promote();
    }

    /// As the dataplane does it: if what sent is gone, the oldest one standing by takes over.
    fn promote(&mut self) {
        let is_there = |spi: &Spi| self.outbound.iter().any(|sa| sa.spi == *spi);
        self.active = self.active.filter(is_there);
        self.active = self.active.or(self.outbound.first().map(|sa| sa.spi));
    }
}

impl Tunnel {
    pub fn new(key: TunnelKey, name: String, order: u32) -> Self {
        Self {
            key,
            name,
            order,
            members: BTreeSet::new(),
            newest_child: None,
            confirmed: None,
            selectors: Vec::new(),
            roamed: None,
            mirror: Mirror::default(),
            follows: false,
            active_told: None,
            carried_told: false,
            wanted_until: None,
            last_carried: None,
        }
    }

    pub fn is_trap(&self) -> bool {
        self.key.origin == Origin::Trap
    }

    /// Its definition for the dataplane.
    pub fn params(&self, id: TunnelId, roaming: bool, df: DfPolicy) -> TunnelParams {
        let policy = |selectors: &SelectorPair| Policy {
            selectors: *selectors,
            action: PolicyAction::Protect(id),
            priority: self.priority(selectors),
        };
        TunnelParams {
            id,
            name: self.name.clone(),
            policies: self.selectors.iter().map(policy).collect(),
            roaming,
            df,
        }
    }

    /// Which policy decides where several fit, below the longest remote network: SAs before traps, then the
    /// narrower one, then the newer one. No two tunnels' policies have the same, so none is ever refused for it.
    fn priority(&self, selectors: &SelectorPair) -> u32 {
        let trap = u32::from(self.is_trap()) << 30;
        let age = 0xf_ffff - (self.order & 0xf_ffff);
        trap | breadth(selectors) << 20 | age
    }

    /// The remote networks its policies lead to.
    pub fn routes(&self) -> impl Iterator<Item = IpPrefix> {
        let policies = self
            .mirror
            .params
            .iter()
            .flat_map(|params| &params.policies);
        policies.flat_map(|policy| policy.selectors.remote.prefixes())
    }
}

/// How much a policy covers, apart from its remote addresses: up to 1023, narrow ones have less.
fn breadth(selectors: &SelectorPair) -> u32 {
    let any = |selector: &TrafficSelector| u32::from(selector.any_port());
    let host_bits = match (selectors.local.first(), selectors.local.last()) {
        (std::net::IpAddr::V4(first), std::net::IpAddr::V4(last)) => {
            32 - (first.to_bits() ^ last.to_bits()).leading_zeros()
        }
        (std::net::IpAddr::V6(first), std::net::IpAddr::V6(last)) => {
            128 - (first.to_bits() ^ last.to_bits()).leading_zeros()
        }
        _ => 128,
    };
    let ports = any(&selectors.local) + any(&selectors.remote);
    host_bits * 4 + ports + u32::from(selectors.remote.protocol().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(local: &str, remote: &str) -> SelectorPair {
        SelectorPair {
            local: local.parse().unwrap(),
            remote: remote.parse().unwrap(),
        }
    }

    fn tunnel(origin: Origin, order: u32) -> Tunnel {
        let key = TunnelKey {
            connection: "site".into(),
            child: "net".into(),
            origin,
        };
        Tunnel::new(key, "site/net".into(), order)
    }

    #[test]
    fn narrower_policies_decide_first_then_newer_ones_and_traps_last() {
        let sas = Origin::Sas {
            reqid: 1,
            remote_id: String::new(),
        };
        let (old, new, trap) = (
            tunnel(sas.clone(), 1),
            tunnel(sas, 2),
            tunnel(Origin::Trap, 3),
        );
        let wide = pair("10.1.0.0/16", "10.2.0.0/16");
        let tcp = pair("10.1.0.0/16[tcp]", "10.2.0.0/16[tcp]");
        let web = pair("10.1.0.0/16[tcp]", "10.2.0.0/16[tcp/80]");
        let local = pair("10.1.1.0/24", "10.2.0.0/16");
        let in_order = [
            new.priority(&local),
            old.priority(&local),
            new.priority(&web),
            new.priority(&tcp),
            new.priority(&wide),
            old.priority(&wide),
            trap.priority(&web),
            trap.priority(&pair("::/0", "::/0")),
        ];
        assert!(in_order.is_sorted_by(|a, b| a < b), "{in_order:?}");
    }
}
