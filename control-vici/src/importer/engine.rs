//! The importer's public face, and the way of a fact to the tunnel it concerns.

use super::{
    charon::{Charon, ChildId, Presence, unique_id},
    kernel::Kernel,
    notice::{ChildLabel, ImportEvent, ImportNotice},
    numbers::Numbers,
    output::ImportOutput,
    place::tunnel_key,
    settings::ImportSettings,
    tunnel::{Lingering, Mirror, Tunnel, TunnelKey},
};
use crate::{
    vici::ViciEvent,
    xfrm::{SaKey, XfrmEvent, XfrmReply, XfrmSa},
};
use esplane_api::{Direction, IpPrefix, Now, SaEvent, SaStatus, Spi, TunnelId};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    time::Duration,
};

/// How long a child may be without SAs: a MOBIKE takes milliseconds.
const BEREFT: Duration = Duration::from_secs(10);
/// Of how many SAs the kernel is told every second what they have carried; with more, each has its turn less often.
const SAS_PER_SECOND: u64 = 1024;
/// How long an inbound SA outlives its DELSA while charon has its child: a MOBIKE's NEWSA follows in milliseconds.
const LINGER: Duration = Duration::from_millis(500);

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
    /// By their SPIs.
    pub(super) lingering: BTreeMap<Spi, Lingering>,
    pub(super) by_key: BTreeMap<TunnelKey, TunnelId>,
    /// Tunnels something has happened to.
    pub(super) dirty: BTreeSet<TunnelId>,
    pub(super) outputs: VecDeque<ImportOutput>,
    /// What the dataplane had before each list of commands that has not been taken yet, and before the one taken last.
    pub(super) undo: VecDeque<Vec<(TunnelId, Mirror)>>,
    /// Whether each tunnel's commands go in a list of their own, after a refusal.
    pub(super) one_by_one: bool,
    pub(super) wake_at: Option<Duration>,
    /// Children that have lost an SA, and when to look whether they have any.
    bereft: BTreeMap<ChildId, Duration>,
    seen_kernel: bool,
    seen_charon: bool,
    /// How many tunnels there have been.
    pub(super) made: u32,
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
            lingering: BTreeMap::new(),
            by_key: BTreeMap::new(),
            dirty: BTreeSet::new(),
            outputs: VecDeque::new(),
            undo: VecDeque::new(),
            one_by_one: false,
            wake_at: None,
            bereft: BTreeMap::new(),
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
                let numbers = ike.children.iter();
                numbers
                    .map(|child| self.charon.number(child.unique_id))
                    .collect()
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
        self.forget_children();
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
            SaEvent::FirstReceived { sa } => self.peer_has_keys(sa),
        }
        self.settle(now);
    }

    /// What the SAs have carried, about once a second.
    pub fn handle_usage(&mut self, now: Now, sas: &[SaStatus]) {
        let spread = Duration::from_secs(sas.len() as u64 / SAS_PER_SECOND);
        for sa in sas {
            self.used(now, sa, spread);
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
        let stored = fact.sequence_sent;
        sa.direction = fact.direction.or(sa.direction);
        sa.fact = fact;
        if let Some(name) = self.kernel.get(serial).and_then(|sa| sa.name) {
            self.numbers.seen(name, stored);
        }
        self.lift_stored_number(now, serial);
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
        if let Some(child) = sa.child {
            let until = now.monotonic + BEREFT;
            self.bereft.insert(child, until);
            self.wake(until);
        }
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
            let lingering = Lingering {
                tunnel: id,
                name,
                child,
                until,
            };
            self.lingering.insert(key.spi, lingering);
            self.wake(until);
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
                unique_id: child.map(unique_id),
            });
        }
        let key = &self.tunnels.get(&tunnel?)?.key;
        Some(ChildLabel {
            connection: key.connection.clone(),
            child: key.child.clone(),
            unique_id: child.map(unique_id),
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

    /// Ends those inbound SAs that stay for a while without one of the kernel's.
    pub(super) fn end_lingering(&mut self, over: impl Fn(&Lingering) -> bool) {
        let ended = self.lingering.extract_if(.., |_, sa| over(sa));
        self.dirty.extend(ended.map(|(_, sa)| sa.tunnel));
    }

    /// Of some children's end charon tells by no event, such as one of two rekeyings that collided: without SAs for
    /// a while they are over.
    fn end_bereft(&mut self, now: Now) {
        let due = self
            .bereft
            .extract_if(.., |_, until| *until <= now.monotonic);
        let due: BTreeSet<ChildId> = due.map(|(child, _)| child).collect();
        if !due.is_empty() {
            let used: BTreeSet<ChildId> =
                self.kernel.iter().filter_map(|(_, sa)| sa.child).collect();
            due.difference(&used)
                .for_each(|child| self.charon.end(*child));
            let without = self
                .tunnels
                .iter()
                .filter(|(_, tunnel)| tunnel.members.is_empty());
            self.dirty.extend(without.map(|(id, _)| *id));
            self.forget_children();
        }
        if let Some(next) = self.bereft.values().min() {
            self.wake(*next);
        }
    }

    fn forget_children(&mut self) {
        // Before the kernel's first word every SA may be one of theirs.
        if self.seen_kernel {
            let used: BTreeSet<ChildId> =
                self.kernel.iter().filter_map(|(_, sa)| sa.child).collect();
            self.charon.forget(|child| used.contains(&child));
        }
    }

    /// What only time makes happen.
    fn look_at_clock(&mut self, now: Now) {
        self.end_bereft(now);
        self.end_lingering(|sa| sa.until <= now.monotonic);
        let ends: Vec<Duration> = self.lingering.values().map(|sa| sa.until).collect();
        for at in ends {
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

fn aead(fact: &XfrmSa) -> Option<&esplane_api::KeyMaterial> {
    match &fact.cipher {
        crate::xfrm::XfrmCipher::Aead(key) => Some(key),
        _ => None,
    }
}
