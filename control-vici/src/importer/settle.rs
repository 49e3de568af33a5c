//! From facts to commands: what each tunnel should hold, and the numbers it may use.

use super::{
    engine::Importer,
    kernel::{OutboundStage, Sa, Serial},
    notice::{ImportEvent, SaProblem},
    numbers::{Chunk, esn},
    output::ImportOutput,
    tunnel::{InstalledInbound, InstalledOutbound, Mirror, Tunnel, Wanted},
};
use crate::{
    vici::ViciRequest,
    xfrm::{XfrmReply, XfrmRequest},
};
use esplane_api::{
    Direction, KeyMaterial, Now, OuterPath, SaCommand, SaId, SaParams, SelectorPair, SequenceStart,
    Spi, TunnelId, WindowSize,
};
use std::{collections::BTreeSet, fmt, time::Duration};

/// How long a Store may take until it is sent again.
const STORE_PATIENCE: Duration = Duration::from_secs(2);
/// How long charon may take for a successor until it is asked again.
const REKEY_PATIENCE: Duration = Duration::from_secs(30);

impl Importer {
    /// Brings the dataplane's tunnels in line with the facts.
    pub(super) fn settle(&mut self, now: Now) {
        let dirty = std::mem::take(&mut self.dirty);
        for id in &dirty {
            self.judge(*id);
            self.prepare_numbers(now, *id);
        }
        for id in std::mem::take(&mut self.one_by_one) {
            self.command(&BTreeSet::from([id]));
        }
        self.command(&dirty);
    }

    /// Looks for what keeps a tunnel's SAs from being imported, and says so once.
    fn judge(&mut self, id: TunnelId) {
        let Some(tunnel) = self.tunnels.get(&id) else {
            return;
        };
        let members: Vec<Serial> = tunnel.members.iter().copied().collect();
        for serial in members {
            let Some(sa) = self.kernel.get(serial) else {
                continue;
            };
            let child = sa.child.and_then(|child| self.charon.child(child));
            let mut problem = sa.find_problem(&self.settings, child.map(|child| &child.sa));
            if problem.is_none() && child.is_some_and(|child| child.sa.selectors().is_empty()) {
                problem = Some(SaProblem::NoSelectors);
            }
            let event = problem.clone().map(|problem| ImportEvent::NotImported {
                spi: sa.fact.key.spi,
                direction: sa.direction.unwrap_or(Direction::Outbound),
                problem,
            });
            let label = self.label(sa.child, Some(id));
            let told = sa.problem_told;
            if let Some(sa) = self.kernel.get_mut(serial) {
                sa.problem = problem;
                sa.problem_told |= event.is_some();
            }
            if let Some(event) = event
                && !told
            {
                self.notice(label, event);
            }
        }
    }

    /// Has numbers stored for the outbound SAs that are to be installed.
    fn prepare_numbers(&mut self, now: Now, id: TunnelId) {
        let Some(tunnel) = self.tunnels.get(&id) else {
            return;
        };
        let members: Vec<Serial> = tunnel.members.iter().copied().collect();
        for serial in members {
            let (Some(sa), Some(tunnel)) = (self.kernel.get(serial), self.tunnels.get(&id)) else {
                continue;
            };
            if sa.direction != Some(Direction::Outbound) || sa.problem.is_some() {
                continue;
            }
            let has = tunnel
                .mirror
                .outbound
                .iter()
                .find(|has| has.serial == serial);
            let in_place = match sa.outbound {
                OutboundStage::New => false,
                // Under way, or waiting for charon.
                OutboundStage::Reserving { .. }
                | OutboundStage::Ready { .. }
                | OutboundStage::Unusable { .. } => true,
                // Another path means another installation, with numbers behind all that this one may use.
                OutboundStage::Installed { path } | OutboundStage::Extending { path, .. } => {
                    has.is_some() && sa.path().is_ok_and(|stated| stated == path)
                }
            };
            if !in_place {
                self.reserve(now, serial);
            }
        }
    }

    /// Asks the kernel to store the numbers an outbound SA is to begin with.
    fn reserve(&mut self, now: Now, serial: Serial) {
        let Some(sa) = self.kernel.get(serial) else {
            return;
        };
        let Some(name) = sa.name else {
            return;
        };
        let start = self.numbers.reserve(name, esn(&sa.fact), 0);
        let stage = match start {
            Some(start) => OutboundStage::Reserving {
                start,
                since: now.monotonic,
            },
            None => OutboundStage::Unusable { asked: None },
        };
        let past_unknown = self
            .numbers
            .get(name)
            .is_some_and(|known| known.used_until.is_none());
        let (spi, label) = (sa.fact.key.spi, self.label(sa.child, sa.tunnel));
        if let Some(sa) = self.kernel.get_mut(serial) {
            sa.outbound = stage;
        }
        if start.is_some() {
            self.store(serial);
            self.wake(now.monotonic + STORE_PATIENCE);
        } else {
            if past_unknown {
                self.notice(label, ImportEvent::PastUnknown { spi });
            }
            self.ask_for_successor(now, serial);
        }
    }

    /// Has the kernel store an SA's number and what it has carried.
    pub(super) fn store(&mut self, serial: Serial) {
        let Some(sa) = self.kernel.get(serial) else {
            return;
        };
        let Some(known) = sa.name.and_then(|name| self.numbers.get(name)) else {
            return;
        };
        let outbound = sa.direction == Some(Direction::Outbound);
        let request = XfrmRequest::Store {
            key: sa.fact.key,
            esn: sa.fact.esn,
            sequence_sent: outbound.then_some(known.requested_until),
            sequence_received: (!outbound).then_some(known.received),
            packets: sa.stored.0,
            bytes: sa.stored.1,
        };
        self.outputs.push_back(ImportOutput::Xfrm(request));
    }

    /// The kernel's copy of an outbound SA may have been replaced by one with a lower number: store again what is used.
    pub(super) fn lift_stored_number(&mut self, serial: Serial) {
        let Some(sa) = self.kernel.get(serial) else {
            return;
        };
        let lifted = matches!(
            sa.outbound,
            OutboundStage::Installed { .. } | OutboundStage::Extending { .. }
        );
        let used = sa.name.and_then(|name| self.numbers.get(name)?.used_until);
        if lifted && used.is_some_and(|used| sa.fact.sequence_sent < used) {
            self.store(serial);
        }
    }

    /// The kernel's answer to a Store.
    pub(super) fn stored(&mut self, now: Now, serial: Serial, reply: &XfrmReply) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let Some(name) = sa.name else {
            return;
        };
        let stored = reply.sequence_sent.filter(|_| reply.done);
        match sa.outbound {
            OutboundStage::Reserving { start, .. } => {
                let until = start.reserved_until.unwrap_or(u64::MAX);
                if stored.is_some_and(|stored| stored >= until) {
                    sa.outbound = OutboundStage::Ready { start };
                    self.dirty.extend(sa.tunnel);
                } else if !reply.done {
                    self.not_stored(now, serial);
                }
            }
            OutboundStage::Extending { path, until, .. } => {
                if stored.is_some_and(|stored| stored >= until) {
                    sa.outbound = OutboundStage::Installed { path };
                    self.numbers.hand_over(name, until);
                    self.command_extension(serial, until);
                } else if !reply.done {
                    self.not_stored(now, serial);
                }
            }
            OutboundStage::New
            | OutboundStage::Ready { .. }
            | OutboundStage::Installed { .. }
            | OutboundStage::Unusable { .. } => {}
        }
    }

    fn not_stored(&mut self, now: Now, serial: Serial) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        // Mostly its DELSA is on its way; only a second failure is worth a word.
        sa.store_failures += 1;
        let told = sa.store_failures == 2;
        let (spi, child, tunnel) = (sa.fact.key.spi, sa.child, sa.tunnel);
        if told {
            self.notice(self.label(child, tunnel), ImportEvent::NotStored { spi });
        }
        self.wake(now.monotonic + STORE_PATIENCE);
    }

    /// Has further numbers stored for an SA that has used half of its own.
    pub(super) fn extend(&mut self, now: Now, sa: SaId, next: u64) {
        let Some(serial) = self.serial_of(sa) else {
            return;
        };
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        let (OutboundStage::Installed { path }, Some(name)) = (sa.outbound, sa.name) else {
            return;
        };
        let width = esn(&sa.fact);
        if let Some(start) = self.numbers.reserve(name, width, 0)
            && let Some(until) = start.reserved_until
        {
            sa.outbound = OutboundStage::Extending {
                path,
                until,
                since: now.monotonic,
            };
            self.store(serial);
            self.wake(now.monotonic + STORE_PATIENCE);
        }
        if next > Chunk::nearly_all(width) {
            self.tell_limit(now, serial, false);
        }
    }

    fn command_extension(&mut self, serial: Serial, reserved_until: u64) {
        let Some(tunnel) = self.kernel.get(serial).and_then(|sa| sa.tunnel) else {
            return;
        };
        let mirror = self.tunnels.get(&tunnel).map(|tunnel| &tunnel.mirror);
        let has = mirror.and_then(|mirror| mirror.outbound.iter().find(|has| has.serial == serial));
        if let Some(has) = has {
            let sa = SaId {
                tunnel,
                direction: Direction::Outbound,
                spi: has.spi,
            };
            let command = SaCommand::ExtendSequence { sa, reserved_until };
            self.commands(Vec::new(), vec![command]);
        }
    }

    /// Asks charon for a successor of an SA that cannot send.
    fn ask_for_successor(&mut self, now: Now, serial: Serial) {
        let Some(sa) = self.kernel.get_mut(serial) else {
            return;
        };
        sa.outbound = OutboundStage::Unusable {
            asked: Some(now.monotonic),
        };
        let (key, child) = (sa.fact.key, sa.child);
        let output =
            match child.filter(|child| self.charon.connected && self.charon.is_there(*child)) {
                Some(unique_id) => ImportOutput::Vici(ViciRequest::RekeyChild { unique_id }),
                None => ImportOutput::Xfrm(XfrmRequest::Expire { key, hard: false }),
            };
        self.outputs.push_back(output);
        self.wake(now.monotonic + REKEY_PATIENCE);
    }

    /// Repeats what has had no effect for long.
    pub(super) fn retry(&mut self, now: Now) {
        let overdue = |since: Duration, patience| now.monotonic >= since + patience;
        let mut stores = Vec::new();
        let mut rekeys = Vec::new();
        let mut later = Vec::new();
        for (serial, sa) in self.kernel.iter() {
            let (since, patience, due) = match sa.outbound {
                OutboundStage::Reserving { since, .. } | OutboundStage::Extending { since, .. } => {
                    (since, STORE_PATIENCE, &mut stores)
                }
                OutboundStage::Unusable { asked: Some(since) } => {
                    (since, REKEY_PATIENCE, &mut rekeys)
                }
                _ => continue,
            };
            if overdue(since, patience) {
                due.push(serial);
            } else {
                later.push(since + patience);
            }
        }
        for serial in stores {
            if let Some(sa) = self.kernel.get_mut(serial) {
                match &mut sa.outbound {
                    OutboundStage::Reserving { since, .. }
                    | OutboundStage::Extending { since, .. } => {
                        *since = now.monotonic;
                    }
                    _ => {}
                }
            }
            self.store(serial);
            later.push(now.monotonic + STORE_PATIENCE);
        }
        for serial in rekeys {
            self.ask_for_successor(now, serial);
        }
        for at in later {
            self.wake(at);
        }
    }

    /// The commands for these tunnels, as one list; removals come first.
    fn command(&mut self, tunnels: &BTreeSet<TunnelId>) {
        let mut removals = Vec::new();
        let mut rest = Vec::new();
        let mut undo = Vec::new();
        for id in tunnels {
            let Some(before) = self.tunnels.get(id).map(|tunnel| tunnel.mirror.clone()) else {
                continue;
            };
            let commands = self.command_one(*id);
            if commands.is_empty() {
                continue;
            }
            undo.push((*id, before));
            for command in commands {
                match command {
                    SaCommand::Remove(_) | SaCommand::RemoveTunnel(_) => removals.push(command),
                    other => rest.push(other),
                }
            }
        }
        removals.append(&mut rest);
        if !removals.is_empty() {
            self.commands(undo, removals);
        }
        self.tell_changes(tunnels);
    }

    /// Has commands carried out; `undo` is what the dataplane has of the tunnels without them.
    pub(super) fn commands(&mut self, undo: Vec<(TunnelId, Mirror)>, commands: Vec<SaCommand>) {
        self.undo.push_back(undo);
        self.outputs.push_back(ImportOutput::Commands(commands));
    }

    fn command_one(&mut self, id: TunnelId) -> Vec<SaCommand> {
        let Some(tunnel) = self.tunnels.get(&id) else {
            return Vec::new();
        };
        if tunnel.refused {
            return Vec::new();
        }
        if !self.is_needed(tunnel) {
            let Some(mut gone) = self.tunnels.remove(&id) else {
                return Vec::new();
            };
            self.by_key.remove(&gone.key);
            if gone.carried_told {
                let label = super::ChildLabel {
                    connection: gone.key.connection.clone(),
                    child: gone.key.child.clone(),
                    unique_id: None,
                };
                self.notice(Some(label), ImportEvent::Ended);
            }
            return gone.mirror.bring_to(id, Wanted::NOTHING);
        }
        let wanted = self.wanted(id);
        let installs: Vec<(Serial, OuterPath, SequenceStart)> = (wanted.outbound.iter())
            .filter_map(|(sa, params)| Some((sa.serial, sa.path, params.as_ref()?.sequence)))
            .collect();
        for (serial, path, sequence) in installs {
            let Some(sa) = self.kernel.get_mut(serial) else {
                continue;
            };
            sa.outbound = OutboundStage::Installed { path };
            if let (Some(name), Some(until)) = (sa.name, sequence.reserved_until) {
                self.numbers.hand_over(name, until);
            }
        }
        match self.tunnels.get_mut(&id) {
            Some(tunnel) => tunnel.mirror.bring_to(id, wanted),
            None => Vec::new(),
        }
    }

    /// A tunnel is needed while it has SAs that can be imported, and, once it is there, while its child is.
    fn is_needed(&self, tunnel: &Tunnel) -> bool {
        if tunnel.is_trap() {
            return !tunnel.selectors.is_empty();
        }
        if !tunnel.members.is_empty() || !tunnel.lingering.is_empty() {
            return true;
        }
        let connected = self.charon.connected;
        connected && self.has_child(tunnel)
    }

    /// What the dataplane should have of a tunnel.
    fn wanted(&mut self, id: TunnelId) -> Wanted {
        let (sender, child) = self.sender_of(id);
        let Some(tunnel) = self.tunnels.get_mut(&id) else {
            return Wanted::NOTHING;
        };
        if !tunnel.is_trap() {
            let selectors = child
                .and_then(|id| self.charon.child(id))
                .map(|child| child.sa.selectors());
            if let Some(selectors) = selectors.filter(|selectors| !selectors.is_empty()) {
                tunnel.selectors = without_repetition(selectors);
            }
            let ike = child.and_then(|id| self.charon.ike_of(self.charon.child(id)?));
            if let Some(ike) = ike {
                tunnel.follows = ike.follows(&self.settings);
            }
        }
        let Some(tunnel) = self.tunnels.get(&id) else {
            return Wanted::NOTHING;
        };
        let importable = (tunnel.members.iter()).filter_map(|serial| self.kernel.get(*serial));
        let any = importable.filter(|sa| sa.problem.is_none()).count() > 0;
        let there = tunnel.mirror.params.is_some() || any || tunnel.is_trap();
        if !there || tunnel.selectors.is_empty() {
            return Wanted::NOTHING;
        }
        let in_udp = (tunnel.members.iter())
            .filter_map(|serial| self.kernel.get(*serial))
            .any(|sa| sa.fact.encap.is_some());
        Wanted {
            params: Some(tunnel.params(id, tunnel.follows && in_udp, self.settings.df)),
            inbound: self.wanted_inbound(id, tunnel),
            outbound: self.wanted_outbound(id, tunnel),
            sender,
        }
    }

    fn wanted_inbound(
        &self,
        id: TunnelId,
        tunnel: &Tunnel,
    ) -> Vec<(InstalledInbound, Option<Box<SaParams>>)> {
        let mut wanted: Vec<(InstalledInbound, Option<Box<SaParams>>)> = Vec::new();
        for serial in &tunnel.members {
            let Some(sa) = self.kernel.get(*serial) else {
                continue;
            };
            let (Some(Direction::Inbound), None) = (sa.direction, &sa.problem) else {
                continue;
            };
            let (Some(key), Some(name), Ok(path)) = (sa.key(), sa.name, sa.path()) else {
                continue;
            };
            if wanted.iter().any(|(other, _)| other.spi == sa.fact.key.spi) {
                continue;
            }
            let own = sa.child.and_then(|id| self.charon.child(id));
            let own = own.map(|child| without_repetition(child.sa.selectors()));
            let selectors = own
                .filter(|own| !own.is_empty())
                .unwrap_or_else(|| tunnel.selectors.clone());
            let received = self.numbers.get(name).map_or(0, |known| known.received);
            let sequence = SequenceStart {
                first: received.min(esn(&sa.fact).last_sequence() - 1) + 1,
                reserved_until: None,
            };
            let params = self.params(id, sa, (key, path), selectors.clone(), sequence);
            let installed = InstalledInbound {
                spi: sa.fact.key.spi,
                serial: Some(*serial),
                name,
                path,
                selectors,
                base: self.carried(sa),
            };
            wanted.push((installed, Some(Box::new(params))));
        }
        // What lingers stays as it is.
        for lingering in &tunnel.lingering {
            let taken = wanted.iter().any(|(other, _)| other.spi == lingering.spi);
            let has = tunnel.mirror.inbound.get(&lingering.spi);
            if let (false, Some(has)) = (taken, has.filter(|has| has.name == lingering.name)) {
                wanted.push((has.clone(), None));
            }
        }
        wanted
    }

    fn wanted_outbound(
        &self,
        id: TunnelId,
        tunnel: &Tunnel,
    ) -> Vec<(InstalledOutbound, Option<Box<SaParams>>)> {
        let mut wanted: Vec<(InstalledOutbound, Option<Box<SaParams>>)> = Vec::new();
        for serial in self.outbound_in_order(tunnel) {
            let Some(sa) = self.kernel.get(serial) else {
                continue;
            };
            let spi = sa.fact.key.spi;
            if wanted.iter().any(|(other, _)| other.spi == spi) {
                continue;
            }
            let has = tunnel
                .mirror
                .outbound
                .iter()
                .find(|has| has.serial == serial);
            match (sa.outbound, has) {
                (OutboundStage::Ready { start }, _) => {
                    let (Some(key), Ok(path)) = (sa.key(), sa.path()) else {
                        continue;
                    };
                    let travels = tunnel.roamed.map_or(path, |roamed| roamed.apply(path));
                    let selectors = tunnel.selectors.clone();
                    let params = self.params(id, sa, (key, travels), selectors, start);
                    let installed = InstalledOutbound {
                        spi,
                        serial,
                        path,
                        base: self.carried(sa),
                    };
                    wanted.push((installed, Some(Box::new(params))));
                }
                (_, Some(has)) => wanted.push((has.clone(), None)),
                (_, None) => {}
            }
        }
        wanted
    }

    fn params(
        &self,
        tunnel: TunnelId,
        sa: &Sa,
        (key, path): (&KeyMaterial, OuterPath),
        selectors: Vec<SelectorPair>,
        sequence: SequenceStart,
    ) -> SaParams {
        SaParams {
            tunnel,
            direction: sa.direction.unwrap_or(Direction::Outbound),
            spi: sa.fact.key.spi,
            key: key.clone(),
            esn: esn(&sa.fact),
            window: self.window(sa.fact.window_packets),
            path,
            selectors,
            lifetime: sa.lifetime(self.carried(sa)),
            sequence,
        }
    }

    /// Packets and bytes that an SA's key has carried.
    fn carried(&self, sa: &Sa) -> (u64, u64) {
        let known = sa.name.and_then(|name| self.numbers.get(name));
        known.map_or((0, 0), |known| known.carried)
    }

    /// charon's window if it is larger than ours; none at all (`replay_window = 0`) is the largest there is.
    fn window(&self, packets: u32) -> WindowSize {
        let largest = WindowSize::new(65_536).unwrap_or(WindowSize::DEFAULT);
        match packets {
            0 => largest,
            _ => WindowSize::new(packets.max(32))
                .unwrap_or(largest)
                .max(self.settings.window),
        }
    }

    /// Which of the outbound SAs that are, or are about to be, installed sends; and its child, or else the newest one.
    fn sender_of(&self, id: TunnelId) -> (Option<Spi>, Option<u32>) {
        let Some(tunnel) = self.tunnels.get(&id) else {
            return (None, None);
        };
        let can_send = |sa: &Sa, serial: Serial| {
            let installed = tunnel
                .mirror
                .outbound
                .iter()
                .any(|has| has.serial == serial);
            match sa.outbound {
                OutboundStage::Ready { .. } => true,
                OutboundStage::Unusable { .. } => false,
                _ => installed,
            }
        };
        let in_order = self.outbound_in_order(tunnel).into_iter();
        let sender = in_order
            .filter_map(|serial| Some((serial, self.kernel.get(serial)?)))
            .find(|(serial, sa)| can_send(sa, *serial));
        let members = tunnel
            .members
            .iter()
            .filter_map(|serial| self.kernel.get(*serial)?.child);
        let newest = members.max();
        let child = sender.and_then(|(_, sa)| sa.child).or(newest);
        (sender.map(|(_, sa)| sa.fact.key.spi), child)
    }

    /// A tunnel's outbound SAs, the one to send with first: the oldest, but one that charon has forgotten
    /// only if there is no other: its peer may have too.
    fn outbound_in_order(&self, tunnel: &Tunnel) -> Vec<Serial> {
        let members = tunnel.members.iter();
        let mut outbound: Vec<(bool, u32, Serial)> = members
            .filter_map(|serial| {
                let sa = self.kernel.get(*serial)?;
                let usable = sa.direction == Some(Direction::Outbound) && sa.problem.is_none();
                let forgotten = sa
                    .child
                    .is_some_and(|child| self.charon.has_forgotten(child));
                usable.then_some((forgotten, sa.child.unwrap_or(u32::MAX), *serial))
            })
            .collect();
        outbound.sort_unstable();
        outbound.into_iter().map(|(_, _, serial)| serial).collect()
    }

    /// Tells the operator what has become of tunnels.
    fn tell_changes(&mut self, tunnels: &BTreeSet<TunnelId>) {
        for id in tunnels {
            let Some(tunnel) = self.tunnels.get_mut(id) else {
                continue;
            };
            let before = std::mem::replace(&mut tunnel.active_told, tunnel.mirror.active);
            let Some(spi) = tunnel
                .mirror
                .active
                .filter(|_| before != tunnel.mirror.active)
            else {
                continue;
            };
            let first = !std::mem::replace(&mut tunnel.carried_told, true);
            let serial = tunnel
                .mirror
                .outbound
                .iter()
                .find(|sa| sa.spi == spi)
                .map(|sa| sa.serial);
            let Some(sa) = serial.and_then(|serial| self.kernel.get(serial)) else {
                continue;
            };
            let event = match (sa.key(), sa.path()) {
                (Some(key), Ok(path)) if first => ImportEvent::Carried {
                    suite: key.suite(),
                    esn: esn(&sa.fact),
                    remote: path.remote_socket(),
                },
                _ => ImportEvent::Switched { spi },
            };
            let label = self.label(sa.child, Some(*id));
            self.notice(label, event);
        }
    }

    /// Goes back to what the dataplane has, and tries tunnel by tunnel; what is refused alone waits for other facts.
    pub(super) fn refused(&mut self, reason: &dyn fmt::Display) {
        // Lists behind the refused one build on it.
        let is_list = |output: &ImportOutput| matches!(output, ImportOutput::Commands(_));
        self.outputs.retain(|output| !is_list(output));
        let alone = self.undo.front().is_some_and(|first| first.len() == 1);
        let refused: BTreeSet<TunnelId> = (self.undo.front().into_iter().flatten())
            .map(|(id, _)| *id)
            .collect();
        let mut again = BTreeSet::new();
        for (id, before) in std::mem::take(&mut self.undo).into_iter().rev().flatten() {
            if let Some(tunnel) = self.tunnels.get_mut(&id) {
                tunnel.active_told = before.active;
                tunnel.mirror = before;
                again.insert(id);
            }
        }
        for id in &again {
            self.numbers_again(*id);
        }
        if alone {
            for id in refused {
                if let Some(tunnel) = self.tunnels.get_mut(&id) {
                    tunnel.refused = true;
                }
                again.remove(&id);
                let reason = reason.to_string();
                self.notice(self.label(None, Some(id)), ImportEvent::Refused { reason });
            }
        }
        self.dirty.extend(&again);
        self.one_by_one.extend(again);
    }

    /// Outbound SAs that are not in the dataplane after all begin anew, behind the numbers they were given.
    fn numbers_again(&mut self, id: TunnelId) {
        let Some(tunnel) = self.tunnels.get(&id) else {
            return;
        };
        for serial in &tunnel.members {
            let installed = tunnel
                .mirror
                .outbound
                .iter()
                .any(|has| has.serial == *serial);
            if let Some(sa) = self.kernel.get_mut(*serial)
                && matches!(sa.outbound, OutboundStage::Installed { .. })
                && !installed
            {
                sa.outbound = OutboundStage::New;
            }
        }
    }
}

fn without_repetition(selectors: Vec<SelectorPair>) -> Vec<SelectorPair> {
    let mut unique: Vec<SelectorPair> = Vec::new();
    for pair in selectors {
        if !unique.contains(&pair) {
            unique.push(pair);
        }
    }
    unique
}
