//! Which tunnel an SA belongs to: by its SPI charon's word decides; before that word, its key, its reqid and its ends.

use super::{
    charon::{Child, ChildId, Ike},
    engine::Importer,
    kernel::{Sa, Serial},
    tunnel::{Origin, Tunnel, TunnelKey},
};
use esplane_api::{Direction, TunnelId};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

impl Importer {
    /// Looks again at SAs that charon has told something about.
    pub(super) fn place_again(&mut self, touched: &BTreeSet<ChildId>, all: bool) {
        let mut spis = BTreeSet::new();
        for child in touched.iter().filter_map(|id| self.charon.child(*id)) {
            spis.extend(child.sa.spi_in);
            spis.extend(child.sa.spi_out);
        }
        let concerned = |sa: &Sa| {
            all || spis.contains(&sa.fact.key.spi)
                || sa.child.is_some_and(|child| touched.contains(&child))
        };
        let serials: Vec<Serial> = (self.kernel.iter())
            .filter(|(_, sa)| concerned(sa))
            .map(|(serial, _)| serial)
            .collect();
        for serial in serials {
            self.place(serial);
        }
        let charon = &self.charon;
        let ended = self
            .lingering
            .extract_if(.., |_, sa| !charon.is_current(sa.child));
        self.dirty.extend(ended.map(|(_, sa)| sa.tunnel));
        // A tunnel may have lost its last reason to be.
        let without = self
            .tunnels
            .iter()
            .filter(|(_, tunnel)| tunnel.members.is_empty());
        self.dirty.extend(without.map(|(id, _)| *id));
    }

    /// Finds the child, the direction and the tunnel of an SA, as far as the facts tell.
    pub(super) fn place(&mut self, serial: Serial) {
        let Some(sa) = self.kernel.get(serial) else {
            return;
        };
        if sa.is_larval() {
            return;
        }
        let known = sa.name.and_then(|name| self.numbers.get(name)).copied();
        let found = self
            .child_by_spi(sa)
            .map(|(child, direction)| (Some(child), direction))
            // The same key under another address: a MOBIKE.
            .or_else(|| known.and_then(|known| Some((known.child, known.direction?))));
        let (child, direction, tunnel) = match found {
            Some((child, direction)) => {
                let own = child.and_then(|child| self.tunnel_of_child(child));
                // charon has forgotten the child: its SA stays where it was.
                let before = known.and_then(|known| known.tunnel);
                (child, Some(direction), own.or(before))
            }
            None => match self.tunnel_by_reqid(sa) {
                Some((tunnel, direction)) => (sa.child, Some(direction), Some(tunnel)),
                None => (sa.child, sa.direction, sa.tunnel),
            },
        };
        let tunnel = tunnel.filter(|id| self.tunnels.contains_key(id));
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let before = std::mem::replace(&mut sa.tunnel, tunnel);
        let spi = sa.fact.key.spi;
        sa.child = child;
        sa.direction = direction;
        if let Some(known) = sa.name.and_then(|name| self.numbers.get_mut(name)) {
            known.child = child.or(known.child);
            known.direction = direction.or(known.direction);
            known.tunnel = tunnel.or(known.tunnel);
        }
        if before != tunnel
            && let Some(old) = before.and_then(|id| self.tunnels.get_mut(&id))
        {
            old.members.remove(&serial);
        }
        if let Some(new) = tunnel.and_then(|id| self.tunnels.get_mut(&id)) {
            new.members.insert(serial);
            new.newest_child = new.newest_child.max(child);
        }
        self.dirty.extend(before);
        self.dirty.extend(tunnel);
        // It has come back, or elsewhere.
        if direction == Some(Direction::Inbound)
            && let (Some(id), Some(waited)) = (tunnel, self.lingering.get(&spi))
            && waited.tunnel != id
        {
            self.dirty.insert(waited.tunnel);
            self.lingering.remove(&spi);
        }
    }

    /// The child whose SPI this is. Where an SPI fits both ways or two peers' children, addresses decide.
    fn child_by_spi(&self, sa: &Sa) -> Option<(ChildId, Direction)> {
        let spi = sa.fact.key.spi;
        let weigh = |id: ChildId, direction| {
            if sa.fact.direction.is_some_and(|known| known != direction) {
                return None;
            }
            let child = self.charon.child(id)?;
            if child.sa.reqid != sa.fact.reqid {
                return None;
            }
            let ike = self.charon.ike_of(child)?;
            let (local, remote) = sa.ends(direction);
            let same =
                |end: Option<SocketAddr>, other: IpAddr| end.is_some_and(|end| end.ip() == other);
            Some(u32::from(same(ike.local, local)) + u32::from(same(ike.remote, remote)))
        };
        let inbound = self
            .charon
            .by_spi_in(spi)
            .map(|id| (id, Direction::Inbound));
        let outbound = (self.charon.by_spi_out(spi)).map(|id| (id, Direction::Outbound));
        let candidates = inbound.into_iter().chain(outbound);
        let weighed =
            candidates.filter_map(|(id, direction)| Some((weigh(id, direction)?, id, direction)));
        // The newest of equals: an SPI used again.
        let best = weighed.max_by_key(|(score, id, _)| (*score, *id));
        best.map(|(_, id, direction)| (id, direction))
    }

    /// Before charon tells: an SA with the reqid and the ends of exactly one tunnel is that tunnel's next.
    fn tunnel_by_reqid(&self, sa: &Sa) -> Option<(TunnelId, Direction)> {
        let mut found = None;
        for (id, tunnel) in &self.tunnels {
            let Origin::Sas { reqid, .. } = &tunnel.key.origin else {
                continue;
            };
            // A charon that was started again gives old reqids to other children.
            let forgotten = |child| self.charon.has_forgotten(child);
            if *reqid != sa.fact.reqid || tunnel.newest_child.is_some_and(forgotten) {
                continue;
            }
            let Some(direction) = self.direction_within(tunnel, sa) else {
                continue;
            };
            if found.is_some() {
                return None; // several peers share the reqid: charon will tell
            }
            found = Some((*id, direction));
        }
        found
    }

    /// Which way an SA goes if it belongs to the tunnel: as another one with these ends, ports included, or as IKE.
    fn direction_within(&self, tunnel: &Tunnel, sa: &Sa) -> Option<Direction> {
        let ends = sa.socket_ends();
        let from_to = |local: SocketAddr, remote: SocketAddr| {
            if ends == (local, remote) {
                Some(Direction::Outbound)
            } else if ends == (remote, local) {
                Some(Direction::Inbound)
            } else {
                None
            }
        };
        let mut members = (tunnel.members.iter()).filter_map(|serial| self.kernel.get(*serial));
        let by_member = members.find_map(|member| {
            let (source, destination) = member.socket_ends();
            match member.direction? {
                Direction::Outbound => from_to(source, destination),
                Direction::Inbound => from_to(destination, source),
            }
        });
        let by_ike = || {
            let ike = self
                .charon
                .ike_of(self.charon.child(tunnel.newest_child?)?)?;
            let (mut local, mut remote) = (ike.local?, ike.remote?);
            if sa.fact.encap.is_none() {
                local.set_port(0);
                remote.set_port(0);
            }
            from_to(local, remote)
        };
        let found = by_member.or_else(by_ike)?;
        sa.direction
            .is_none_or(|known| known == found)
            .then_some(found)
    }

    /// The tunnel of a child's SAs, made where there is none yet. `None` if the child is not to be imported.
    fn tunnel_of_child(&mut self, id: ChildId) -> Option<TunnelId> {
        let child = self.charon.child(id)?;
        let ike = self.charon.ike_of(child)?;
        if !self.settings.imports(&ike.name, &child.sa.name) {
            return None;
        }
        let key = tunnel_key(ike, child);
        Some(self.tunnel_with(key))
    }

    pub(super) fn tunnel_with(&mut self, key: TunnelKey) -> TunnelId {
        if let Some(id) = self.by_key.get(&key) {
            return *id;
        }
        let mut id = self.settings.first_tunnel.0.wrapping_add(self.made);
        while self.tunnels.contains_key(&TunnelId(id)) {
            id = id.wrapping_add(1).max(self.settings.first_tunnel.0);
        }
        self.made = self.made.wrapping_add(1);
        let name = self.free_name(&key);
        let tunnel = Tunnel::new(key.clone(), name, self.made);
        self.tunnels.insert(TunnelId(id), tunnel);
        self.by_key.insert(key, TunnelId(id));
        TunnelId(id)
    }

    /// `CONNECTION/CHILD`, with a number behind it where that is taken: road warriors share a child's name.
    fn free_name(&self, key: &TunnelKey) -> String {
        let trap = if key.origin == Origin::Trap {
            " (on demand)"
        } else {
            ""
        };
        let plain = format!("{}/{}{trap}", key.connection, key.child);
        let taken: BTreeSet<&str> = (self.tunnels.values())
            .filter(|tunnel| {
                (&tunnel.key.connection, &tunnel.key.child) == (&key.connection, &key.child)
            })
            .map(|tunnel| tunnel.name.as_str())
            .collect();
        if !taken.contains(plain.as_str()) {
            return plain;
        }
        let numbered = (2..).map(|number: u64| format!("{plain}#{number}"));
        let mut free = numbered.filter(|name| !taken.contains(name.as_str()));
        free.next().unwrap_or(plain)
    }
}

pub(super) fn tunnel_key(ike: &Ike, child: &Child) -> TunnelKey {
    TunnelKey {
        connection: ike.name.clone(),
        child: child.sa.name.clone(),
        origin: Origin::Sas {
            reqid: child.sa.reqid,
            remote_id: ike.remote_id.clone(),
        },
    }
}
