//! What is installed, and how each command changes it.
//!
//! A list of commands works on a copy; only if all of it succeeds does the copy replace the
//! original. A copy costs next to nothing, however much is installed: its maps are persistent, and share
//! with the original's whatever is not changed. What is shared and does change (sequence counters) is
//! changed by [`Effect`]s, after that.

use super::{
    CommandProblem, OuterHeaders, Sender, Settings, Tunnel,
    carried::Carried,
    keys::{KeyDigest, KeyMemory},
};
use crate::{
    aead::{Aead, AeadKey},
    replay::ReplayWindow,
    sad::{InboundSa, OutboundSa},
    sequence::SequenceCounter,
    spd::{Selectors, SpdWriter, TunnelSlot},
    tunnel::OuterHeader,
    usage::Usage,
};
use esplane_api::{
    Direction, Now, OuterPath, PolicyAction, SaCommand, SaId, SaParams, SaStatus, SequenceStart,
    Spi, TunnelActivity, TunnelId, TunnelParams,
};
use rpds::{RedBlackTreeMapSync as Map, StackSync as Stack};
use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
};

/// Everything installed. A clone shares all of it.
#[derive(Clone, Default)]
pub(super) struct State {
    pub tunnels: Map<TunnelId, Arc<Defined>>,
    /// Which tunnel a definition has made.
    definitions: Map<u64, TunnelId>,
    pub inbound: Map<Spi, Arc<Inbound>>,
    pub keys: KeyMemory,
    /// Keys in use.
    sending: Map<KeyDigest, SaId>,
    receiving: Map<(KeyDigest, u32), SaId>,
    last_definition: u64,
    /// Slots in use, or free.
    slots: u32,
    free_slots: Stack<TunnelSlot>,
}

/// A tunnel and what sends for it.
#[derive(Clone)]
pub(super) struct Defined {
    pub params: Arc<TunnelParams>,
    /// Tunnels defined earlier have lower ones: among equal policies the one that came first
    /// decides.
    pub order: u64,
    /// Its place in the tables.
    pub slot: TunnelSlot,
    /// Oldest first.
    pub outbound: Vec<Arc<Outbound>>,
    /// Of what it receives with.
    pub inbound: Vec<Spi>,
    /// What SAs that are gone have carried.
    past: Carried,
}

#[derive(Clone)]
pub(super) struct Outbound {
    pub sa: Arc<OutboundSa>,
    pub path: OuterPath,
    /// The only worker that sends with it, if it is one's alone.
    pub worker: Option<u16>,
    pub role: Role,
    key: KeyDigest,
}

/// Of the SAs with one `worker`, one sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Sends,
    StandsBy,
    Retired,
}

#[derive(Clone)]
pub(super) struct Inbound {
    pub sa: Arc<InboundSa>,
    pub path: OuterPath,
    key: KeyDigest,
}

/// A change to what old and new state share, made once the whole list is accepted.
pub(super) enum Effect {
    Extend(Arc<SequenceCounter>, u64),
    Resume(Arc<SequenceCounter>, SequenceStart),
}

/// What commands need to know besides the state.
pub(super) struct Context {
    pub settings: Settings,
    pub aead: Aead,
    pub now: Now,
    pub effects: Vec<Effect>,
}

impl State {
    /// Carries out one command.
    pub fn apply(
        &mut self,
        context: &mut Context,
        command: SaCommand,
    ) -> Result<(), CommandProblem> {
        match command {
            SaCommand::DefineTunnel(params) => self.define(params),
            SaCommand::RemoveTunnel(tunnel) => self.remove_tunnel(tunnel),
            SaCommand::Install(params) => match params.direction {
                Direction::Inbound => self.install_inbound(context, params),
                Direction::Outbound => self.install_outbound(context, params),
            },
            SaCommand::Activate { tunnel, spi } => self.activate(tunnel, spi),
            SaCommand::Retire { tunnel, spi } => self.retire(tunnel, spi),
            SaCommand::Remove(sa) => self.remove(sa),
            SaCommand::MoveEndpoint { tunnel, remote } => {
                self.move_endpoint(context, tunnel, remote)
            }
            SaCommand::ExtendSequence { sa, reserved_until } => {
                let sequence = self.outbound(sa)?.sa.sequence.clone();
                context
                    .effects
                    .push(Effect::Extend(sequence, reserved_until));
                Ok(())
            }
        }
    }

    /// Two tunnels that want the same packets, at least one of them among the `changed`. `spd` holds the policies as
    /// they were `before`.
    pub fn route_claimed_twice(
        &self,
        before: &Self,
        spd: &SpdWriter,
        changed: &BTreeSet<TunnelId>,
    ) -> Option<CommandProblem> {
        let known = changed.iter().filter_map(|id| before.tunnels.get(id));
        let known: BTreeSet<u64> = known.map(|tunnel| tunnel.order).collect();
        let mut claims = HashMap::new();
        for tunnel in changed.iter().filter_map(|id| self.tunnels.get(id)) {
            for policy in &tunnel.params.policies {
                let id = tunnel.params.id;
                let (selectors, priority) = (policy.selectors, policy.priority);
                let mut claimed = spd.claimed_by(&selectors, priority).into_iter();
                let unchanged = claimed.find(|order| !known.contains(order));
                let other = match unchanged.and_then(|order| self.definitions.get(&order)) {
                    Some(other) => *other,
                    None => *claims.entry((selectors, priority)).or_insert(id),
                };
                if other != id {
                    return Some(CommandProblem::RouteClaimedTwice {
                        first: other.min(id),
                        second: other.max(id),
                        selectors: Box::new(selectors),
                        priority,
                    });
                }
            }
        }
        None
    }

    fn define(&mut self, params: TunnelParams) -> Result<(), CommandProblem> {
        for policy in &params.policies {
            if let PolicyAction::Protect(other) = policy.action
                && other != params.id
            {
                return Err(CommandProblem::PolicyOfOtherTunnel {
                    tunnel: params.id,
                    other,
                });
            }
        }
        let params = Arc::new(params);
        if let Some(tunnel) = self.tunnels.get_mut(&params.id) {
            Arc::make_mut(tunnel).params = params;
            return Ok(());
        }
        let slot = self.free_slots.peek().copied();
        let slot = slot.unwrap_or(TunnelSlot(self.slots));
        if !self.free_slots.pop_mut() {
            self.slots += 1;
        }
        self.last_definition += 1;
        self.definitions.insert_mut(self.last_definition, params.id);
        let tunnel = Defined {
            params: params.clone(),
            order: self.last_definition,
            slot,
            outbound: Vec::new(),
            inbound: Vec::new(),
            past: Carried::default(),
        };
        self.tunnels.insert_mut(params.id, Arc::new(tunnel));
        Ok(())
    }

    fn remove_tunnel(&mut self, id: TunnelId) -> Result<(), CommandProblem> {
        let tunnel = self.tunnel(id)?.clone();
        for outbound in &tunnel.outbound {
            self.sending.remove_mut(&outbound.key);
            self.keys.sent(outbound.key, outbound.sa.sequence.clone());
        }
        for spi in &tunnel.inbound {
            self.remove_inbound(*spi);
        }
        self.tunnels.remove_mut(&id);
        self.definitions.remove_mut(&tunnel.order);
        self.free_slots.push_mut(tunnel.slot);
        Ok(())
    }

    fn install_inbound(
        &mut self,
        context: &Context,
        params: SaParams,
    ) -> Result<(), CommandProblem> {
        self.tunnel(params.tunnel)?;
        if let Some(owner) = self.inbound.get(&params.spi) {
            return Err(CommandProblem::InboundSpiTaken {
                spi: params.spi,
                owner: owner.sa.id.tunnel,
            });
        }
        if params.selectors.is_empty() {
            return Err(CommandProblem::NoSelectors);
        }
        check_sequence_start(&params)?;
        // The peer sends with it, so we must not.
        let key = self.keys.digest(&params.key);
        if let Some(other) = self.sender_with(key) {
            return Err(CommandProblem::KeyInUse { other });
        }
        if self.keys.has_sent(key) {
            return Err(CommandProblem::KeyUsedOtherWay);
        }
        let window = self.keys.take_window(key, params.spi, params.window);
        self.receiving
            .insert_mut((key, params.spi.get()), params.id());
        let (tunnel, spi) = (params.tunnel, params.spi);
        let inbound = Inbound::new(context, key, params, window, self.tunnel(tunnel)?);
        self.inbound.insert_mut(spi, Arc::new(inbound));
        self.tunnel_mut(tunnel)?.inbound.push(spi);
        Ok(())
    }

    fn install_outbound(
        &mut self,
        context: &mut Context,
        params: SaParams,
    ) -> Result<(), CommandProblem> {
        let id = params.id();
        if self.outbound(id).is_ok() {
            return Err(CommandProblem::OutboundInstalled(id));
        }
        check_sequence_start(&params)?;
        check_local_address(context.settings, id, &params.path)?;
        let key = self.keys.digest(&params.key);
        if let Some(other) = self.sender_with(key).or_else(|| self.receiver_with(key)) {
            return Err(CommandProblem::KeyInUse { other });
        }
        if self.keys.has_received(key) {
            return Err(CommandProblem::KeyUsedOtherWay);
        }
        let sequence = match self.keys.take_counter(key) {
            Some(counter) if counter.esn() != params.esn => return Err(CommandProblem::EsnChanged),
            Some(counter) => {
                context
                    .effects
                    .push(Effect::Resume(counter.clone(), params.sequence));
                counter
            }
            None => Arc::new(SequenceCounter::new(params.esn, params.sequence)),
        };
        let tunnel = self.tunnel_mut(params.tunnel)?;
        let mut outbound = Outbound::new(context, key, params, sequence);
        let same_worker = |other: &&Arc<Outbound>| other.worker == outbound.worker;
        let mut others = tunnel.outbound.iter().filter(same_worker);
        if !others.any(|other| other.role == Role::Sends) {
            outbound.role = Role::Sends;
        }
        tunnel.outbound.push(Arc::new(outbound));
        self.sending.insert_mut(key, id);
        Ok(())
    }

    fn activate(&mut self, tunnel: TunnelId, spi: Spi) -> Result<(), CommandProblem> {
        let id = outbound_id(tunnel, spi);
        let chosen = self.outbound(id)?;
        if chosen.role == Role::Retired {
            return Err(CommandProblem::Retired(id));
        }
        let worker = chosen.worker;
        for outbound in &mut self.tunnel_mut(tunnel)?.outbound {
            let role = match outbound.role {
                _ if outbound.sa.id == id => Role::Sends,
                Role::Sends if outbound.worker == worker => Role::StandsBy,
                other => other,
            };
            if outbound.role != role {
                Arc::make_mut(outbound).role = role;
            }
        }
        Ok(())
    }

    fn retire(&mut self, tunnel: TunnelId, spi: Spi) -> Result<(), CommandProblem> {
        let id = outbound_id(tunnel, spi);
        self.outbound(id)?;
        let tunnel = self.tunnel_mut(tunnel)?;
        for outbound in tunnel
            .outbound
            .iter_mut()
            .filter(|outbound| outbound.sa.id == id)
        {
            Arc::make_mut(outbound).role = Role::Retired;
        }
        tunnel.promote();
        Ok(())
    }

    fn remove(&mut self, id: SaId) -> Result<(), CommandProblem> {
        match id.direction {
            Direction::Inbound => {
                let found = self
                    .inbound
                    .get(&id.spi)
                    .filter(|inbound| inbound.sa.id == id);
                found.ok_or(CommandProblem::UnknownSa(id))?;
                let gone = self.remove_inbound(id.spi);
                let tunnel = self.tunnel_mut(id.tunnel)?;
                tunnel.inbound.retain(|spi| *spi != id.spi);
                if let Some(gone) = gone {
                    tunnel.past.add_inbound(&gone.sa);
                }
            }
            Direction::Outbound => {
                let (key, sa) = (self.outbound(id)?.key, self.outbound(id)?.sa.clone());
                self.sending.remove_mut(&key);
                self.keys.sent(key, sa.sequence.clone());
                let tunnel = self.tunnel_mut(id.tunnel)?;
                tunnel.outbound.retain(|outbound| outbound.sa.id != id);
                tunnel.past.add_outbound(&sa);
                tunnel.promote();
            }
        }
        Ok(())
    }

    fn remove_inbound(&mut self, spi: Spi) -> Option<Arc<Inbound>> {
        let gone = self.inbound.get(&spi).cloned()?;
        self.inbound.remove_mut(&spi);
        self.receiving.remove_mut(&(gone.key, spi.get()));
        self.keys.received(gone.key, spi, gone.sa.window.clone());
        Some(gone)
    }

    /// What a tunnel has carried. Of an SA that is gone, what workers with an older snapshot still carried is not in it.
    pub fn activity(&self, tunnel: &Defined) -> TunnelActivity {
        let mut all = tunnel.past;
        for outbound in &tunnel.outbound {
            all.add_outbound(&outbound.sa);
        }
        for inbound in tunnel
            .inbound
            .iter()
            .filter_map(|spi| self.inbound.get(spi))
        {
            all.add_inbound(&inbound.sa);
        }
        all.activity_of(tunnel.params.id)
    }

    fn move_endpoint(
        &mut self,
        context: &Context,
        id: TunnelId,
        remote: SocketAddr,
    ) -> Result<(), CommandProblem> {
        for outbound in &mut self.tunnel_mut(id)?.outbound {
            let path = outbound.path.moved_to(remote)?;
            check_local_address(context.settings, outbound.sa.id, &path)?;
            Arc::make_mut(outbound).path = path;
        }
        // Inbound paths are only shown; an SA takes its packets from wherever they are authentic.
        for spi in self.tunnel(id)?.inbound.clone() {
            if let Some(inbound) = self.inbound.get_mut(&spi) {
                Arc::make_mut(inbound).path = inbound.path.moved_to(remote)?;
            }
        }
        Ok(())
    }

    fn tunnel(&self, id: TunnelId) -> Result<&Defined, CommandProblem> {
        let tunnel = self
            .tunnels
            .get(&id)
            .ok_or(CommandProblem::UnknownTunnel(id))?;
        Ok(tunnel)
    }

    fn tunnel_mut(&mut self, id: TunnelId) -> Result<&mut Defined, CommandProblem> {
        let tunnel = self
            .tunnels
            .get_mut(&id)
            .ok_or(CommandProblem::UnknownTunnel(id))?;
        Ok(Arc::make_mut(tunnel))
    }

    fn outbound(&self, id: SaId) -> Result<&Outbound, CommandProblem> {
        if id.direction != Direction::Outbound {
            return Err(CommandProblem::NotOutbound(id));
        }
        let mut outbound = self.tunnel(id.tunnel)?.outbound.iter();
        let found = outbound.find(|outbound| outbound.sa.id == id);
        found
            .map(|outbound| &**outbound)
            .ok_or(CommandProblem::UnknownSa(id))
    }

    fn sender_with(&self, key: KeyDigest) -> Option<SaId> {
        self.sending.get(&key).copied()
    }

    fn receiver_with(&self, key: KeyDigest) -> Option<SaId> {
        let mut all = self.receiving.range((key, 0)..);
        all.next()
            .filter(|((other, _), _)| *other == key)
            .map(|(_, id)| *id)
    }
}

impl Defined {
    /// What workers need to know.
    pub fn view(&self) -> Tunnel {
        let sender = |worker| {
            let active = self.outbound_of(worker, Role::Sends)?;
            let active = &self.outbound[active];
            Some(Sender {
                header: OuterHeader::new(active.path, self.params.df, active.sa.id.spi),
                sa: active.sa.clone(),
            })
        };
        let workers = self.outbound.iter().filter_map(|outbound| outbound.worker);
        let workers = workers.max().map_or(0, |highest| u32::from(highest) + 1);
        Tunnel {
            id: self.params.id,
            roaming: self.params.roaming,
            sender: sender(None),
            of_workers: (0..workers)
                .map(|worker| sender(Some(worker as u16)))
                .collect(),
        }
    }

    /// Where nothing sends, the oldest one standing by does.
    fn promote(&mut self) {
        let workers: BTreeSet<Option<u16>> = self
            .outbound
            .iter()
            .map(|outbound| outbound.worker)
            .collect();
        for worker in workers {
            let has = |role| self.outbound_of(worker, role);
            if let (None, Some(oldest)) = (has(Role::Sends), has(Role::StandsBy)) {
                Arc::make_mut(&mut self.outbound[oldest]).role = Role::Sends;
            }
        }
    }

    /// The oldest of a worker's SAs in this role.
    fn outbound_of(&self, worker: Option<u16>, role: Role) -> Option<usize> {
        let mut outbound = self.outbound.iter();
        outbound.position(|outbound| outbound.worker == worker && outbound.role == role)
    }
}

impl Outbound {
    fn new(
        context: &Context,
        key: KeyDigest,
        params: SaParams,
        sequence: Arc<SequenceCounter>,
    ) -> Self {
        let sa = OutboundSa {
            id: params.id(),
            key: AeadKey::from_material(context.aead, &params.key, params.esn),
            sequence,
            usage: Usage::new(params.lifetime, context.now),
            dummies: Default::default(),
        };
        Self {
            sa: Arc::new(sa),
            path: params.path,
            worker: params.worker,
            role: Role::StandsBy,
            key,
        }
    }

    /// For people.
    pub fn status(&self) -> SaStatus {
        SaStatus {
            id: self.sa.id,
            suite: self.sa.key.suite(),
            esn: self.sa.sequence.esn(),
            path: self.path,
            active: self.role == Role::Sends,
            worker: self.worker,
            sequence: self.sa.sequence.used(),
            statistics: self.sa.statistics(),
        }
    }
}

impl Inbound {
    fn new(
        context: &Context,
        key: KeyDigest,
        params: SaParams,
        window: Option<Arc<ReplayWindow>>,
        tunnel: &Defined,
    ) -> Self {
        let head = params.sequence.first.saturating_sub(1);
        let fresh = || Arc::new(ReplayWindow::new(params.window, head));
        let selectors = Selectors::new(&params.selectors);
        let sa = InboundSa {
            id: params.id(),
            tunnel: tunnel.slot,
            key: AeadKey::from_material(context.aead, &params.key, params.esn),
            esn: params.esn,
            window: window.unwrap_or_else(fresh),
            in_udp: params.path.encap().is_some(),
            of_worker: params.worker.is_some(),
            networks: selectors.networks(),
            selectors,
            usage: Usage::new(params.lifetime, context.now),
            known_origin: Default::default(),
            dummies: Default::default(),
            authentication_failures: Default::default(),
            replays: Default::default(),
            failures_in_a_row: Default::default(),
            first_told: Default::default(),
        };
        Self {
            sa: Arc::new(sa),
            path: params.path,
            key,
        }
    }

    /// For people.
    pub fn status(&self) -> SaStatus {
        SaStatus {
            id: self.sa.id,
            suite: self.sa.key.suite(),
            esn: self.sa.esn,
            path: self.path,
            active: true,
            worker: None,
            sequence: self.sa.window.head(),
            statistics: self.sa.statistics(),
        }
    }
}

fn outbound_id(tunnel: TunnelId, spi: Spi) -> SaId {
    SaId {
        tunnel,
        direction: Direction::Outbound,
        spi,
    }
}

fn check_sequence_start(params: &SaParams) -> Result<(), CommandProblem> {
    let (first, last) = (params.sequence.first, params.esn.last_sequence());
    if (1..=last).contains(&first) {
        Ok(())
    } else {
        Err(CommandProblem::BadSequenceStart { first, last })
    }
}

fn check_local_address(
    settings: Settings,
    id: SaId,
    path: &OuterPath,
) -> Result<(), CommandProblem> {
    if settings.outer_headers == OuterHeaders::Written && path.local().is_unspecified() {
        return Err(CommandProblem::NoLocalAddress(id));
    }
    Ok(())
}
