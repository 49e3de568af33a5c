//! From facts to commands: what each tunnel should hold, and the numbers it may use.

use super::{
    charon::ChildId,
    engine::Importer,
    kernel::{OutboundStage, Sa, Serial},
    notice::{ImportEvent, SaProblem},
    numbers::esn,
    output::ImportOutput,
    tunnel::{InstalledInbound, InstalledOutbound, Lingering, Mirror, Tunnel, Wanted},
};
use esplane_api::{
    Direction, KeyMaterial, Now, OuterPath, SaCommand, SaId, SaParams, SelectorPair, SequenceStart,
    Spi, TunnelId, WindowSize,
};
use std::{collections::BTreeSet, fmt};

impl Importer {
    /// Brings the dataplane's tunnels in line with the facts.
    pub(super) fn settle(&mut self, now: Now) {
        let dirty = std::mem::take(&mut self.dirty);
        for id in &dirty {
            self.judge(*id);
            self.prepare_numbers(now, *id);
        }
        if std::mem::take(&mut self.one_by_one) {
            self.command_apart(&dirty);
        } else {
            self.command(&dirty);
        }
        self.tell_changes(&dirty);
    }

    /// Looks for what keeps a tunnel's SAs from being imported, and says so once.
    fn judge(&mut self, id: TunnelId) {
        let Some(tunnel) = self.tunnels.get(&id) else {
            return;
        };
        let members: Vec<Serial> = tunnel.members.iter().copied().collect();
        let problems: Vec<Option<SaProblem>> = (members.iter())
            .map(|serial| self.find_problem(*serial))
            .collect();
        let half: BTreeSet<ChildId> = (members.iter().zip(&problems))
            .filter(|(_, problem)| problem.is_some())
            .filter_map(|(serial, _)| self.kernel.get(*serial)?.child)
            .collect();
        for (serial, own) in members.into_iter().zip(problems) {
            let Some(sa) = self.kernel.get_mut(serial) else {
                continue;
            };
            let other = sa.child.is_some_and(|child| half.contains(&child));
            sa.problem = own.or_else(|| other.then_some(SaProblem::OtherHalf));
            let Some(problem) = sa.problem.clone().filter(|_| !sa.problem_told) else {
                continue;
            };
            sa.problem_told = true;
            let event = ImportEvent::NotImported {
                spi: sa.fact.key.spi,
                direction: sa.direction.unwrap_or(Direction::Outbound),
                problem,
            };
            let child = sa.child;
            self.notice(self.label(child, Some(id)), event);
        }
    }

    fn find_problem(&self, serial: Serial) -> Option<SaProblem> {
        let sa = self.kernel.get(serial)?;
        let child = sa.child.and_then(|child| self.charon.child(child));
        let problem = sa.find_problem(&self.settings, child.map(|child| &child.sa));
        let nothing_fits = child.is_some_and(|child| child.sa.selectors().is_empty());
        problem.or_else(|| nothing_fits.then_some(SaProblem::NoSelectors))
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
                OutboundStage::Reserving { .. } | OutboundStage::Unusable { .. } => true,
                // Another SA may have had the key meanwhile.
                OutboundStage::Ready { start } => {
                    let known = sa.name.and_then(|name| self.numbers.get(name));
                    let used_until = known.and_then(|known| known.used_until);
                    used_until.is_some_and(|used| used < start.first)
                }
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

    /// The commands for these tunnels, as one list; removals come first.
    fn command(&mut self, tunnels: &BTreeSet<TunnelId>) {
        let (mut undo, mut removals, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for id in tunnels {
            let Some((before, mut commands)) = self.command_one(*id) else {
                continue;
            };
            undo.push((*id, before));
            removals.extend(commands.extract_if(.., |one| removes(one)));
            rest.append(&mut commands);
        }
        removals.append(&mut rest);
        if !removals.is_empty() {
            self.commands(undo, removals);
        }
    }

    /// The same, what is installed by a list for each tunnel; all removals come first, for an SA may go from one to
    /// another.
    fn command_apart(&mut self, tunnels: &BTreeSet<TunnelId>) {
        let (mut undo, mut removals, mut lists) = (Vec::new(), Vec::new(), Vec::new());
        for id in tunnels {
            let Some((before, mut commands)) = self.command_one(*id) else {
                continue;
            };
            let removed: Vec<SaCommand> = commands.extract_if(.., |one| removes(one)).collect();
            let mut between = before.clone();
            between.without(&removed);
            if !removed.is_empty() {
                undo.push((*id, before));
                removals.extend(removed);
            }
            if !commands.is_empty() {
                lists.push((*id, between, commands));
            }
        }
        if !removals.is_empty() {
            self.commands(undo, removals);
        }
        for (id, between, commands) in lists {
            self.commands(vec![(id, between)], commands);
        }
    }

    /// Has commands carried out; `undo` is what the dataplane has of the tunnels without them.
    pub(super) fn commands(&mut self, undo: Vec<(TunnelId, Mirror)>, commands: Vec<SaCommand>) {
        self.undo.push_back(undo);
        self.outputs.push_back(ImportOutput::Commands(commands));
    }

    /// What is to be done for a tunnel, and what the dataplane had of it before.
    fn command_one(&mut self, id: TunnelId) -> Option<(Mirror, Vec<SaCommand>)> {
        let tunnel = self.tunnels.get(&id)?;
        let before = tunnel.mirror.clone();
        let commands = if self.is_needed(tunnel) {
            self.command_needed(id)
        } else {
            let mut gone = self.tunnels.remove(&id)?;
            self.by_key.remove(&gone.key);
            if gone.carried_told {
                let label = super::ChildLabel {
                    connection: gone.key.connection.clone(),
                    child: gone.key.child.clone(),
                    unique_id: None,
                };
                self.notice(Some(label), ImportEvent::Ended);
            }
            gone.mirror.bring_to(id, Wanted::NOTHING)
        };
        (!commands.is_empty()).then_some((before, commands))
    }

    fn command_needed(&mut self, id: TunnelId) -> Vec<SaCommand> {
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
        let lingers = |sa: &Lingering| {
            self.tunnels
                .get(&sa.tunnel)
                .is_some_and(|of| of.key == tunnel.key)
        };
        !tunnel.members.is_empty()
            || self.lingering.values().any(lingers)
            || self.charon.connected && self.has_child(tunnel)
    }

    /// What the dataplane should have of a tunnel.
    fn wanted(&mut self, id: TunnelId) -> Wanted {
        let (sender, child) = self.sender_of(id);
        let Some(tunnel) = self.tunnels.get_mut(&id) else {
            return Wanted::NOTHING;
        };
        // Without a child all stays as it was: a MOBIKE brings its SAs back at once.
        if let Some(child) = child.and_then(|id| self.charon.child(id)) {
            let selectors = without_repetition(child.sa.selectors());
            if !selectors.is_empty() {
                tunnel.selectors = selectors;
            }
            if let Some(ike) = self.charon.ike_of(child) {
                tunnel.follows = child.sa.udp_encap && ike.follows(&self.settings);
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
        Wanted {
            params: Some(tunnel.params(id, tunnel.follows, self.settings.df)),
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
        for (spi, lingering) in &self.lingering {
            let taken = wanted.iter().any(|(other, _)| other.spi == *spi);
            let has = tunnel.mirror.inbound.get(spi);
            if lingering.tunnel == id
                && !taken
                && let Some(has) = has.filter(|has| has.name == lingering.name)
            {
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
            worker: None,
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
    fn sender_of(&self, id: TunnelId) -> (Option<Spi>, Option<ChildId>) {
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

    /// A tunnel's outbound SAs, the one to send with first: the oldest. One that charon has forgotten, or whose peer
    /// has shown to have a newer IKE_SA, only if there is no other: the peer may have lost it.
    fn outbound_in_order(&self, tunnel: &Tunnel) -> Vec<Serial> {
        let members = tunnel.members.iter();
        let mut outbound: Vec<(bool, ChildId, Serial)> = members
            .filter_map(|serial| {
                let sa = self.kernel.get(*serial)?;
                let usable = sa.direction == Some(Direction::Outbound) && sa.problem.is_none();
                let last = sa
                    .child
                    .is_some_and(|child| self.is_outlived(tunnel, child));
                usable.then_some((last, sa.child.unwrap_or(ChildId::MAX), *serial))
            })
            .collect();
        outbound.sort_unstable();
        outbound.into_iter().map(|(_, _, serial)| serial).collect()
    }

    /// Whether the peer may have lost a child's SAs.
    fn is_outlived(&self, tunnel: &Tunnel, child: ChildId) -> bool {
        let ike = |id| self.charon.child(id).map(|child| child.ike);
        let outlived = tunnel
            .confirmed
            .is_some_and(|newer| newer > child && ike(newer).is_some() && ike(newer) != ike(child));
        outlived || self.charon.has_forgotten(child)
    }

    /// The peer sends with an SA, so it has both of the child. If it belongs to a newer IKE_SA than what we send with (the
    /// peer has restarted, or reauthenticates), that is what to send with now: the older one may be lost there.
    pub(super) fn peer_has_keys(&mut self, sa: SaId) {
        let serial = self.serial_of(sa);
        let child = serial.and_then(|serial| self.kernel.get(serial)?.child);
        if let (Some(child), Some(tunnel)) = (child, self.tunnels.get_mut(&sa.tunnel)) {
            tunnel.confirmed = tunnel.confirmed.max(Some(child));
            self.dirty.insert(sa.tunnel);
        }
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
        let mut gone = BTreeSet::new();
        for (id, before) in std::mem::take(&mut self.undo).into_iter().rev().flatten() {
            if let Some(tunnel) = self.tunnels.get_mut(&id) {
                tunnel.active_told = before.active;
                tunnel.mirror = before;
                again.insert(id);
            } else if before.params.is_some() && !alone {
                gone.insert(id);
            }
        }
        for id in gone {
            self.commands(Vec::new(), vec![SaCommand::RemoveTunnel(id)]);
        }
        for id in &again {
            self.numbers_again(*id);
        }
        if alone {
            for id in refused {
                again.remove(&id);
                let reason = reason.to_string();
                self.notice(self.label(None, Some(id)), ImportEvent::Refused { reason });
            }
        }
        self.one_by_one = true;
        self.dirty.extend(again);
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

fn removes(command: &SaCommand) -> bool {
    matches!(command, SaCommand::Remove(_) | SaCommand::RemoveTunnel(_))
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
