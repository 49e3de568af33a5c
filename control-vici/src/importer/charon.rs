//! What charon has told: its IKE_SAs, CHILD_SAs and traps.

use super::settings::ImportSettings;
use crate::vici::{ChildSa, ChildState, IkeSa, Trap, ViciEvent};
use esplane_api::Spi;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

/// A child's number: charon's unique id of a CHILD_SA, and before it how many charons there have been: each counts from 1.
pub(super) type ChildId = u64;
/// An IKE_SA's number, in the same way.
type IkeId = u64;

/// What charon itself calls it.
pub(super) fn unique_id(id: u64) -> u32 {
    (id & u64::from(u32::MAX)) as u32
}

/// What charon has told.
#[derive(Default)]
pub(super) struct Charon {
    /// Whether it can be asked.
    pub connected: bool,
    /// How often a charon was found that knew nothing of what the one before it had.
    restarts: u32,
    ikes: BTreeMap<IkeId, Ike>,
    children: BTreeMap<ChildId, Child>,
    by_spi_in: BTreeMap<Spi, ChildId>,
    by_spi_out: BTreeSet<(Spi, ChildId)>,
    pub traps: Vec<Trap>,
    /// The outbound SPIs that were there when charon was first asked: nobody here saw them being born.
    listed_at_start: Option<BTreeSet<Spi>>,
}

/// An IKE_SA, without its children.
#[derive(Clone, Debug)]
pub(super) struct Ike {
    pub name: String,
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
    pub local_id: String,
    pub remote_id: String,
    nat_local: bool,
    nat_remote: bool,
}

/// A CHILD_SA.
#[derive(Clone, Debug)]
pub(super) struct Child {
    pub ike: IkeId,
    pub sa: ChildSa,
    pub presence: Presence,
    /// Whether the operator knows of the selectors that were left out.
    pub left_out_told: bool,
}

/// Whether charon has a CHILD_SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// It does.
    There,
    /// It said that it ended it.
    Ended,
    /// A full list did not hold it: charon has restarted, and nobody will ever rekey or delete its SAs.
    Forgotten,
}

impl Charon {
    /// Takes note; answers which children are to be looked at again.
    pub fn take(&mut self, event: ViciEvent) -> Vec<ChildId> {
        match event {
            ViciEvent::Snapshot(all) => self.replace(all),
            ViciEvent::ChildUpDown { up, ike } => {
                let touched = self.put_ike(ike);
                if !up {
                    touched.iter().for_each(|id| self.end(*id));
                }
                touched
            }
            ViciEvent::ChildRekey { ike, old, new } => {
                let number = self.number(ike.unique_id);
                self.put_ike(ike);
                vec![self.put_child(number, old), self.put_child(number, new)]
            }
            ViciEvent::IkeUpDown { up, ike } => {
                let number = self.number(ike.unique_id);
                let mut touched = self.put_ike(ike);
                if !up {
                    touched.extend(self.children_of(number));
                    touched.iter().for_each(|id| self.end(*id));
                }
                touched
            }
            ViciEvent::IkeRekey { old, new } => {
                let (old_number, new_number) =
                    (self.number(old.unique_id), self.number(new.unique_id));
                self.put_ike(old);
                self.put_ike(new);
                let moved = self.children_of(old_number);
                for id in &moved {
                    if let Some(child) = self.children.get_mut(id) {
                        child.ike = new_number;
                    }
                }
                moved
            }
            ViciEvent::IkeUpdate(ike) => {
                let number = self.number(ike.unique_id);
                let mut touched = self.put_ike(ike);
                touched.extend(self.children_of(number));
                touched
            }
            ViciEvent::Traps(traps) => {
                self.traps = traps;
                Vec::new()
            }
            ViciEvent::InitiateEnded { .. } => Vec::new(),
            ViciEvent::Lost => {
                self.connected = false;
                self.children.keys().copied().collect()
            }
        }
    }

    pub fn child(&self, id: ChildId) -> Option<&Child> {
        self.children.get(&id)
    }

    pub fn child_mut(&mut self, id: ChildId) -> Option<&mut Child> {
        self.children.get_mut(&id)
    }

    pub fn children(&self) -> impl Iterator<Item = (ChildId, &Child)> {
        self.children.iter().map(|(id, child)| (*id, child))
    }

    pub fn ike_of(&self, child: &Child) -> Option<&Ike> {
        self.ikes.get(&child.ike)
    }

    /// The child that receives with this SPI.
    pub fn by_spi_in(&self, spi: Spi) -> Option<ChildId> {
        self.by_spi_in.get(&spi).copied()
    }

    /// The children that send with this SPI; peers choose it, so two may have chosen the same.
    pub fn by_spi_out(&self, spi: Spi) -> impl Iterator<Item = ChildId> {
        let range = (spi, 0)..=(spi, ChildId::MAX);
        self.by_spi_out.range(range).map(|(_, id)| *id)
    }

    /// Whether this outbound SPI was there when charon was first asked.
    pub fn had_at_start(&self, spi: Spi) -> bool {
        let listed = self.listed_at_start.as_ref();
        listed.is_some_and(|listed| listed.contains(&spi))
    }

    /// Whether charon has the child and may go on with it.
    pub fn is_there(&self, id: ChildId) -> bool {
        let child = self.children.get(&id);
        child.is_some_and(|child| {
            child.presence == Presence::There
                && matches!(child.sa.state, ChildState::Coming | ChildState::Installed)
        })
    }

    /// Whether charon has the child and goes on with it, so that what happens to its SAs is not their end.
    pub fn is_current(&self, id: ChildId) -> bool {
        let child = self.children.get(&id);
        self.connected
            && child.is_some_and(|child| {
                child.presence == Presence::There && child.sa.state == ChildState::Installed
            })
    }

    /// Whether charon has lost a child that it had.
    pub fn has_forgotten(&self, id: ChildId) -> bool {
        let child = self.children.get(&id);
        child.is_some_and(|child| child.presence == Presence::Forgotten)
    }

    /// Forgets what is over and of no use any more.
    pub fn forget(&mut self, is_used: impl Fn(ChildId) -> bool) {
        let over: Vec<ChildId> = (self.children.iter())
            .filter(|(id, child)| {
                // Of a replaced child's end no event tells.
                let over =
                    child.presence != Presence::There || child.sa.state == ChildState::Replaced;
                over && !is_used(**id)
            })
            .map(|(id, _)| *id)
            .collect();
        over.iter().for_each(|id| self.remove(*id));
        let used: BTreeSet<IkeId> = self.children.values().map(|child| child.ike).collect();
        self.ikes.retain(|id, _| used.contains(id));
    }

    fn replace(&mut self, all: Vec<IkeSa>) -> Vec<ChildId> {
        self.connected = true;
        let known: Vec<ChildId> = self.children.keys().copied().collect();
        if !known.is_empty() && !all.iter().any(|ike| self.has_any_of(ike)) {
            // Else a new charon's first child would be taken for the old one's.
            self.restarts += 1;
        }
        let mut there = BTreeSet::new();
        for ike in all {
            there.extend(self.put_ike(ike));
        }
        for id in known.iter().filter(|id| !there.contains(id)) {
            if let Some(child) = self.children.get_mut(id)
                && child.presence == Presence::There
            {
                child.presence = Presence::Forgotten;
            }
        }
        if self.listed_at_start.is_none() {
            let listed = self.by_spi_out.iter().map(|(spi, _)| *spi);
            self.listed_at_start = Some(listed.collect());
        }
        there.extend(known);
        there.into_iter().collect()
    }

    /// The number of what this charon calls so.
    pub fn number(&self, unique_id: u32) -> u64 {
        u64::from(self.restarts) << 32 | u64::from(unique_id)
    }

    /// Whether a child of an IKE_SA was known before.
    fn has_any_of(&self, ike: &IkeSa) -> bool {
        ike.children.iter().any(|child| {
            let known = self.children.get(&self.number(child.unique_id));
            known.is_some_and(|known| known.sa.spi_in == child.spi_in)
        })
    }

    fn put_ike(&mut self, ike: IkeSa) -> Vec<ChildId> {
        let number = self.number(ike.unique_id);
        let old_name = self.ikes.get(&number).map(|known| known.name.clone());
        let unnamed = ike.name.is_empty() || ike.name == "(unnamed)"; // ike-update, sometimes
        let name = match old_name {
            Some(known) if unnamed => known,
            _ => ike.name,
        };
        let entry = Ike {
            name,
            local: ike.local,
            remote: ike.remote,
            local_id: ike.local_id,
            remote_id: ike.remote_id,
            nat_local: ike.nat_local,
            nat_remote: ike.nat_remote,
        };
        self.ikes.insert(number, entry);
        let children = ike.children.into_iter();
        children
            .map(|child| self.put_child(number, child))
            .collect()
    }

    fn put_child(&mut self, ike: IkeId, mut sa: ChildSa) -> ChildId {
        let id = self.number(sa.unique_id);
        let mut left_out_told = false;
        if let Some(known) = self.children.get(&id) {
            left_out_told = known.left_out_told;
            // Some events leave fields out that do not change.
            let before = &known.sa;
            sa.spi_in = sa.spi_in.or(before.spi_in);
            sa.spi_out = sa.spi_out.or(before.spi_out);
            if sa.local_ts.is_empty() && sa.remote_ts.is_empty() && sa.unsupported_ts.is_empty() {
                sa.local_ts = before.local_ts.clone();
                sa.remote_ts = before.remote_ts.clone();
            }
            if sa.reqid == 0 {
                sa.reqid = before.reqid;
            }
            self.remove(id);
        }
        if let Some(spi) = sa.spi_in {
            self.by_spi_in.insert(spi, id);
        }
        if let Some(spi) = sa.spi_out {
            self.by_spi_out.insert((spi, id));
        }
        let child = Child {
            ike,
            sa,
            presence: Presence::There,
            left_out_told,
        };
        self.children.insert(id, child);
        id
    }

    /// charon has ended it, said or unsaid.
    pub fn end(&mut self, id: ChildId) {
        if let Some(child) = self.children.get_mut(&id) {
            child.presence = Presence::Ended;
        }
    }

    fn remove(&mut self, id: ChildId) {
        let Some(gone) = self.children.remove(&id) else {
            return;
        };
        if let Some(spi) = gone.sa.spi_in
            && self.by_spi_in.get(&spi) == Some(&id)
        {
            self.by_spi_in.remove(&spi);
        }
        if let Some(spi) = gone.sa.spi_out {
            self.by_spi_out.remove(&(spi, id));
        }
    }

    fn children_of(&self, ike: IkeId) -> Vec<ChildId> {
        let of = self.children.iter().filter(|(_, child)| child.ike == ike);
        of.map(|(id, _)| *id).collect()
    }
}

impl Ike {
    /// Whether a change of the peer's address is followed. RFC 7296 §2.23: a host that is not behind a NAT
    /// itself follows a peer that is.
    pub fn follows(&self, settings: &ImportSettings) -> bool {
        settings.roaming && self.nat_remote && !self.nat_local
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ike(unique_id: u32, name: &str) -> IkeSa {
        IkeSa {
            name: name.into(),
            unique_id,
            state: "ESTABLISHED".into(),
            local: None,
            remote: None,
            local_id: "us".into(),
            remote_id: "them".into(),
            nat_local: false,
            nat_remote: false,
            children: Vec::new(),
        }
    }

    #[test]
    fn an_update_without_a_name_changes_no_name() {
        let mut charon = Charon::default();
        charon.take(ViciEvent::IkeUpDown {
            up: true,
            ike: ike(1, "site"),
        });
        charon.take(ViciEvent::IkeUpdate(ike(1, "(unnamed)")));
        assert_eq!(charon.ikes[&1].name, "site");
    }

    fn child(unique_id: u32, spi_in: u32) -> ChildSa {
        ChildSa {
            name: "net".into(),
            unique_id,
            reqid: 1,
            state: ChildState::Installed,
            mode: "TUNNEL".into(),
            protocol: "ESP".into(),
            udp_encap: false,
            spi_in: Some(spi(spi_in)),
            spi_out: None,
            mark_in: None,
            mark_out: None,
            if_ids: (None, None),
            algorithm: String::new(),
            esn: true,
            local_ts: Vec::new(),
            remote_ts: Vec::new(),
            unsupported_ts: Vec::new(),
            rekey_in: None,
            expires_in: None,
        }
    }

    fn spi(value: u32) -> Spi {
        Spi::new(value).unwrap()
    }

    #[test]
    fn a_new_charon_that_counts_from_one_again_means_other_children() {
        let with_child = |spi_in: u32| IkeSa {
            children: vec![child(1, spi_in)],
            ..ike(1, "site")
        };
        let mut charon = Charon::default();
        charon.take(ViciEvent::Snapshot(vec![with_child(0x1000)]));
        let old = charon.by_spi_in(spi(0x1000)).unwrap();
        // The same charon again: nothing is forgotten, numbers stay.
        charon.take(ViciEvent::Lost);
        charon.take(ViciEvent::Snapshot(vec![with_child(0x1000)]));
        assert!(charon.is_current(old) && unique_id(old) == 1);
        // Another one, which then negotiates a child of its own.
        charon.take(ViciEvent::Lost);
        charon.take(ViciEvent::Snapshot(Vec::new()));
        let touched = charon.take(ViciEvent::ChildUpDown {
            up: true,
            ike: with_child(0x2000),
        });
        let new = charon.by_spi_in(spi(0x2000)).unwrap();
        assert_eq!(touched, [new]);
        assert_eq!(unique_id(new), 1, "as charon calls it");
        assert!(charon.is_current(new) && !charon.has_forgotten(new));
        assert!(charon.has_forgotten(old), "its SAs give way");
        assert!(new > old, "it is the newer one");
    }

    #[test]
    fn only_a_host_without_nat_follows_a_peer_behind_one() {
        let settings = ImportSettings::default();
        for (nat_local, nat_remote, follows) in [
            (false, true, true),
            (false, false, false),
            (true, true, false),
        ] {
            let mut charon = Charon::default();
            let facts = IkeSa {
                nat_local,
                nat_remote,
                ..ike(1, "site")
            };
            charon.take(ViciEvent::IkeUpdate(facts));
            assert_eq!(charon.ikes[&1].follows(&settings), follows);
        }
    }
}
