//! The importer's public face, and the way of a fact to the tunnel it concerns.

use super::{
    charon::{Charon, Child, ChildId, Ike, Presence},
    kernel::{Kernel, Sa, Serial},
    notice::{ChildLabel, ImportEvent, ImportNotice},
    numbers::Numbers,
    output::ImportOutput,
    settings::ImportSettings,
    tunnel::{Lingering, Mirror, Origin, Tunnel, TunnelKey},
};
use crate::{
    vici::{Trap, ViciEvent, ViciRequest},
    xfrm::{SaKey, XfrmEvent, XfrmReply, XfrmSa},
};
use esplane_api::{Direction, IpPrefix, Now, SaEvent, SaStatus, TunnelId};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// How long an inbound SA outlives its DELSA while charon has its child: a MOBIKE's NEWSA follows in milliseconds.
const LINGER: Duration = Duration::from_millis(500);
/// How long charon may take for a negotiation whose outcome it never tells: by default it gives up after 165 s.
const NEGOTIATION: Duration = Duration::from_secs(200);
/// How long packets wait after a failed negotiation until they ask for another.
const NEGOTIATION_PAUSE: Duration = Duration::from_secs(5);

/// Imports what charon negotiates. See the [module](super).
///
/// Call a `handle_…` function when something has happened, then [`Self::poll_output`] until it is empty, then wait until
/// [`Self::poll_timeout`]. Nothing here waits, sends or reads a clock.
pub struct Importer {
    pub(super) settings: ImportSettings,
    pub(super) charon: Charon,
    pub(super) kernel: Kernel,
    pub(super) numbers: Numbers,
    pub(super) tunnels: BTreeMap<TunnelId, Tunnel>,
    pub(super) by_key: BTreeMap<TunnelKey, TunnelId>,
    /// Tunnels something has happened to.
    pub(super) dirty: BTreeSet<TunnelId>,
    pub(super) outputs: VecDeque<ImportOutput>,
    /// What the dataplane had before each list of commands that has not been taken yet, and before the one taken last.
    pub(super) undo: VecDeque<Vec<(TunnelId, Mirror)>>,
    /// Tunnels whose commands go in a list of their own, after a refusal.
    pub(super) one_by_one: BTreeSet<TunnelId>,
    pub(super) wake_at: Option<Duration>,
    seen_kernel: bool,
    seen_charon: bool,
    made: u32,
}

impl Importer {
    /// Knows nothing yet.
    pub fn new(settings: ImportSettings) -> Self {
        Self {
            settings,
            charon: Charon::default(),
            kernel: Kernel::default(),
            numbers: Numbers::default(),
            tunnels: BTreeMap::new(),
            by_key: BTreeMap::new(),
            dirty: BTreeSet::new(),
            outputs: VecDeque::new(),
            undo: VecDeque::new(),
            one_by_one: BTreeSet::new(),
            wake_at: None,
            seen_kernel: false,
            seen_charon: false,
            made: 0,
        }
    }

    /// Something charon has told.
    pub fn handle_vici(&mut self, now: Now, event: ViciEvent) {
        match &event {
            ViciEvent::Snapshot(all) if !self.charon.connected => {
                let children = all.iter().map(|ike| ike.children.len()).sum();
                self.notice(None, ImportEvent::CharonFound { children });
            }
            ViciEvent::Lost if self.charon.connected || !self.seen_charon => {
                self.notice(None, ImportEvent::CharonLost);
            }
            ViciEvent::InitiateEnded { ike, child, done } => {
                self.negotiation_ended(now, ike, child, *done);
            }
            _ => {}
        }
        self.seen_charon = true;
        let went = match &event {
            ViciEvent::ChildUpDown { up: false, ike } => {
                ike.children.iter().map(|child| child.unique_id).collect()
            }
            _ => Vec::new(),
        };
        let traps = matches!(event, ViciEvent::Traps(_));
        let all = matches!(event, ViciEvent::Snapshot(_));
        let touched: BTreeSet<ChildId> = self.charon.take(event).into_iter().collect();
        if traps {
            self.follow_traps();
        }
        for child in &touched {
            self.tell_left_out_selectors(*child);
        }
        self.place_again(&touched, all);
        for child in went {
            self.tell_if_ended_in_use(now, child);
        }
        self.settle(now);
        let kernel = &self.kernel;
        let used: BTreeSet<ChildId> = kernel.iter().filter_map(|(_, sa)| sa.child).collect();
        self.charon.forget(|child| used.contains(&child));
    }

    /// Something the kernel has told.
    pub fn handle_xfrm(&mut self, now: Now, event: XfrmEvent) {
        match event {
            XfrmEvent::Snapshot(all) => self.replace_all(now, all),
            XfrmEvent::Installed(sa) => self.installed(now, sa, true),
            // After a hard limit the kernel has removed it, without a DELSA.
            XfrmEvent::Removed(key) | XfrmEvent::Expired { key, hard: true } => {
                self.removed(now, &key);
            }
            // charon hears of that as well.
            XfrmEvent::Expired { hard: false, .. } => {}
            XfrmEvent::Flushed => {
                for key in self.kernel.keys() {
                    self.removed(now, &key);
                }
            }
            XfrmEvent::Reply(reply) => self.replied(now, &reply),
        }
        self.settle(now);
    }

    /// Something the dataplane has seen. Events of tunnels that are not the importer's are ignored.
    pub fn handle_event(&mut self, now: Now, event: SaEvent) {
        match event {
            SaEvent::SaNeeded { tunnel } => self.wanted_by_packets(now, tunnel),
            SaEvent::SoftExpired { sa, .. } => self.limit_reached(now, sa, false),
            SaEvent::HardExpired { sa, .. } | SaEvent::SequenceExhausted { sa } => {
                self.limit_reached(now, sa, true);
            }
            SaEvent::SequenceLow { sa, next } => self.extend(now, sa, next),
            SaEvent::EndpointMoved { tunnel, remote } => self.endpoint_moved(tunnel, remote),
            SaEvent::FirstReceived { .. } => {}
        }
        self.settle(now);
    }

    /// What the SAs have carried, about once a second.
    pub fn handle_usage(&mut self, now: Now, sas: &[SaStatus]) {
        for sa in sas {
            self.used(now, sa);
        }
        self.settle(now);
    }

    /// The dataplane has refused the commands that were taken last; nothing of them was carried out.
    pub fn handle_refusal(&mut self, now: Now, reason: &dyn fmt::Display) {
        self.refused(reason);
        self.settle(now);
    }

    /// To be called when [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Now) {
        if self.wake_at.is_some_and(|at| at <= now.monotonic) {
            self.wake_at = None;
            self.look_at_clock(now);
            self.settle(now);
        }
    }

    /// When [`Self::handle_timeout`] wants to be called, on [`Now::monotonic`].
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.wake_at
    }

    /// The next thing to do, until `None`.
    pub fn poll_output(&mut self) -> Option<ImportOutput> {
        let output = self.outputs.pop_front()?;
        if matches!(output, ImportOutput::Commands(_)) && self.undo.len() > self.lists_waiting() + 1
        {
            self.undo.pop_front();
        }
        Some(output)
    }

    /// The remote networks of all tunnels, to be routed to the inner interface. They may hold the peers' own
    /// addresses: ESP's and IKE's own packets must not follow them.
    pub fn routes(&self) -> Vec<IpPrefix> {
        let all = self.tunnels.values().flat_map(Tunnel::routes);
        let sorted: BTreeSet<IpPrefix> = all.collect();
        sorted.into_iter().collect()
    }

    /// Everything there is now.
    fn replace_all(&mut self, now: Now, mut all: Vec<XfrmSa>) {
        let there: BTreeSet<SaKey> = all.iter().map(|sa| sa.key).collect();
        let gone = self
            .kernel
            .keys()
            .into_iter()
            .filter(|key| !there.contains(key));
        let gone: Vec<SaKey> = gone.collect();
        // What was there before us is in an order that tells nothing.
        all.sort_by_key(|sa| sa.added_unix_seconds);
        let born = std::mem::replace(&mut self.seen_kernel, true);
        // Those that came tell where they belong by those that went.
        for sa in all {
            self.installed(now, sa, born);
        }
        for key in gone {
            self.removed(now, &key);
        }
    }

    fn installed(&mut self, now: Now, fact: XfrmSa, born: bool) {
        let key = fact.key;
        let Some(serial) = self.kernel.serial(&key) else {
            return self.appeared(fact, born);
        };
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let same = match (sa.key(), aead(&fact)) {
            (Some(old), Some(new)) => old.same_secret(new),
            (None, None) => {
                sa.is_larval() == matches!(fact.cipher, crate::xfrm::XfrmCipher::Larval)
            }
            _ => false,
        };
        if !same {
            // An SPI that was reserved becomes an SA, which is ours to receive with; or it is used again.
            let was_larval = sa.is_larval();
            self.removed(now, &key);
            self.appeared(fact, born);
            if was_larval
                && let Some(serial) = self.kernel.serial(&key)
                && let Some(sa) = self.kernel.get_mut(serial)
                && sa.direction.is_none()
            {
                sa.direction = Some(Direction::Inbound);
                self.place(serial);
            }
            return;
        }
        sa.direction = fact.direction.or(sa.direction);
        sa.fact = fact;
        self.lift_stored_number(serial);
        self.place(serial);
    }

    fn appeared(&mut self, fact: XfrmSa, born: bool) {
        let born = born && !self.charon.had_at_start(fact.key.spi);
        let name = aead(&fact).map(|key| self.numbers.name(fact.key.spi, key));
        if let Some(name) = name {
            self.numbers.appeared(name, &fact, born);
        }
        let serial = self.kernel.insert(fact, name);
        self.place(serial);
    }

    fn removed(&mut self, now: Now, key: &SaKey) {
        let Some((serial, sa)) = self.kernel.remove(key) else {
            return;
        };
        if let Some(name) = sa.name {
            self.numbers.disappeared(name);
        }
        let Some(id) = sa.tunnel else {
            return;
        };
        self.dirty.insert(id);
        let Some(tunnel) = self.tunnels.get_mut(&id) else {
            return;
        };
        tunnel.members.remove(&serial);
        let current = sa.child.filter(|child| self.charon.is_current(*child));
        if let (Some(child), Some(name)) = (current, sa.name)
            && sa.direction == Some(Direction::Inbound)
            && tunnel.mirror.inbound.contains_key(&key.spi)
        {
            let until = now.monotonic + LINGER;
            tunnel.lingering.push(Lingering {
                spi: key.spi,
                name,
                child,
                until,
            });
            self.wake(until);
        }
    }

    /// Looks again at SAs that charon has told something about.
    fn place_again(&mut self, touched: &BTreeSet<ChildId>, all: bool) {
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
        for (id, tunnel) in &mut self.tunnels {
            let before = tunnel.lingering.len();
            tunnel
                .lingering
                .retain(|sa| self.charon.is_current(sa.child));
            // A tunnel may have lost its last reason to be.
            if tunnel.members.is_empty() || tunnel.lingering.len() != before {
                self.dirty.insert(*id);
            }
        }
    }

    /// Finds the child, the direction and the tunnel of an SA, as far as the facts tell.
    fn place(&mut self, serial: Serial) {
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
            Some((Some(child), direction)) => {
                (Some(child), Some(direction), self.tunnel_of_child(child))
            }
            Some((None, direction)) => {
                (None, Some(direction), known.and_then(|known| known.tunnel))
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
            new.refused = false;
        }
        self.dirty.extend(before);
        self.dirty.extend(tunnel);
    }

    /// The child whose SPI this is. Where an SPI fits both ways or two peers' children, addresses decide.
    fn child_by_spi(&self, sa: &Sa) -> Option<(ChildId, Direction)> {
        let spi = sa.fact.key.spi;
        let weigh = |id: ChildId, direction| {
            if sa.direction.is_some_and(|known| known != direction) {
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
            if *reqid != sa.fact.reqid {
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

    fn tunnel_with(&mut self, key: TunnelKey) -> TunnelId {
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

    /// Traps become tunnels without SAs, whose packets wait and ask.
    fn follow_traps(&mut self) {
        let fits = |trap: &&Trap| {
            self.settings.imports(&trap.ike, &trap.child)
                && (trap.mode.is_empty() || trap.mode == "TUNNEL")
        };
        let traps: Vec<Trap> = self.charon.traps.iter().filter(fits).cloned().collect();
        let mut listed = BTreeSet::new();
        for trap in traps {
            let selectors = trap.selectors();
            let id = self.tunnel_with(TunnelKey {
                connection: trap.ike,
                child: trap.child,
                origin: Origin::Trap,
            });
            if let Some(tunnel) = self.tunnels.get_mut(&id) {
                tunnel.selectors = selectors;
            }
            listed.insert(id);
        }
        let mut all = self.tunnels.iter_mut();
        for (id, tunnel) in all.by_ref().filter(|(_, tunnel)| tunnel.is_trap()) {
            if !listed.contains(id) {
                tunnel.selectors.clear();
            }
            self.dirty.insert(*id);
        }
    }

    /// Packets wait and no SA can carry them.
    fn wanted_by_packets(&mut self, now: Now, id: TunnelId) {
        let connected = self.charon.connected;
        let Some(tunnel) = self.tunnels.get_mut(&id) else {
            return;
        };
        let asked = tunnel
            .wanted_until
            .is_some_and(|until| now.monotonic < until);
        // Without charon the next packet asks again. SAs that are there come by themselves.
        if !tunnel.is_trap() || !connected || asked {
            return;
        }
        tunnel.wanted_until = Some(now.monotonic + NEGOTIATION);
        let (ike, child) = (tunnel.key.connection.clone(), tunnel.key.child.clone());
        let label = ChildLabel {
            connection: ike.clone(),
            child: child.clone(),
            unique_id: None,
        };
        let request = ViciRequest::Initiate { ike, child };
        self.outputs.push_back(ImportOutput::Vici(request));
        self.notice(Some(label), ImportEvent::Wanted);
    }

    fn negotiation_ended(&mut self, now: Now, ike: &str, child: &str, done: bool) {
        let key = TunnelKey {
            connection: ike.to_owned(),
            child: child.to_owned(),
            origin: Origin::Trap,
        };
        let tunnel = self
            .by_key
            .get(&key)
            .and_then(|id| self.tunnels.get_mut(id));
        let Some(tunnel) = tunnel else {
            return;
        };
        tunnel.wanted_until = Some(now.monotonic + NEGOTIATION_PAUSE);
        if !done {
            let label = ChildLabel {
                connection: key.connection,
                child: key.child,
                unique_id: None,
            };
            self.notice(Some(label), ImportEvent::NotNegotiated);
        }
    }

    fn tell_left_out_selectors(&mut self, id: ChildId) {
        let Some(child) = self.charon.child_mut(id) else {
            return;
        };
        if child.left_out_told || child.sa.unsupported_ts.is_empty() {
            return;
        }
        child.left_out_told = true;
        let selectors = child.sa.unsupported_ts.iter().map(|left| left.text.clone());
        let selectors = selectors.collect();
        self.notice(
            self.label(Some(id), None),
            ImportEvent::SelectorsLeftOut { selectors },
        );
    }

    /// charon's `inactivity` sees no packets of ours, so it ends children that carry some.
    fn tell_if_ended_in_use(&mut self, now: Now, id: ChildId) {
        const RECENTLY: Duration = Duration::from_secs(5);
        let Some(child) = self.charon.child(id) else {
            return;
        };
        let Some(key) = self.charon.ike_of(child).map(|ike| tunnel_key(ike, child)) else {
            return;
        };
        let goes_on = self.charon.children().any(|(_, other)| {
            let ike = self.charon.ike_of(other);
            other.presence == Presence::There
                && ike.is_some_and(|ike| tunnel_key(ike, other) == key)
        });
        let tunnel = self.by_key.get(&key).and_then(|id| self.tunnels.get(id));
        let last = tunnel.and_then(|tunnel| tunnel.last_carried);
        if !goes_on && last.is_some_and(|last| now.monotonic <= last + RECENTLY) {
            self.notice(self.label(Some(id), None), ImportEvent::EndedInUse);
        }
    }

    /// The operator's name of a child; of a tunnel's, where charon has not told yet.
    pub(super) fn label(
        &self,
        child: Option<ChildId>,
        tunnel: Option<TunnelId>,
    ) -> Option<ChildLabel> {
        let known = child.and_then(|id| self.charon.child(id));
        if let Some(known) = known
            && let Some(ike) = self.charon.ike_of(known)
        {
            return Some(ChildLabel {
                connection: ike.name.clone(),
                child: known.sa.name.clone(),
                unique_id: child,
            });
        }
        let key = &self.tunnels.get(&tunnel?)?.key;
        Some(ChildLabel {
            connection: key.connection.clone(),
            child: key.child.clone(),
            unique_id: child,
        })
    }

    pub(super) fn notice(&mut self, child: Option<ChildLabel>, event: ImportEvent) {
        let notice = ImportNotice { child, event };
        self.outputs.push_back(ImportOutput::Notice(notice));
    }

    /// Whether charon has a CHILD_SA of this tunnel and goes on with it.
    pub(super) fn has_child(&self, tunnel: &Tunnel) -> bool {
        self.charon.children().any(|(id, child)| {
            let ike = self.charon.ike_of(child);
            self.charon.is_there(id) && ike.is_some_and(|ike| tunnel_key(ike, child) == tunnel.key)
        })
    }

    /// Has [`Self::handle_timeout`] called by then.
    pub(super) fn wake(&mut self, at: Duration) {
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }

    fn lists_waiting(&self) -> usize {
        let lists = self.outputs.iter();
        lists
            .filter(|output| matches!(output, ImportOutput::Commands(_)))
            .count()
    }

    /// What only time makes happen.
    fn look_at_clock(&mut self, now: Now) {
        let mut later = Vec::new();
        for (id, tunnel) in &mut self.tunnels {
            let before = tunnel.lingering.len();
            tunnel.lingering.retain(|sa| sa.until > now.monotonic);
            if tunnel.lingering.len() != before {
                self.dirty.insert(*id);
            }
            later.extend(tunnel.lingering.iter().map(|sa| sa.until));
        }
        for at in later {
            self.wake(at);
        }
        self.retry(now);
    }

    fn replied(&mut self, now: Now, reply: &XfrmReply) {
        if let Some(serial) = self.kernel.serial(&reply.key) {
            self.stored(now, serial, reply);
        }
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

fn aead(fact: &XfrmSa) -> Option<&esplane_api::KeyMaterial> {
    match &fact.cipher {
        crate::xfrm::XfrmCipher::Aead(key) => Some(key),
        _ => None,
    }
}
