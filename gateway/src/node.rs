//! One gateway without its sockets: the control planes and the dataplane's tables, joined.
//!
//! ```text
//!   datagrams, facts, events, time ──▶ Node ──▶ Action (send, ask, wake workers, store, tell someone)
//!                                      │  ▲
//!                            SaCommand ▼  │ SaEvent, of each tunnel to the one that made it
//!   Engine (Noise), Importer (strongSwan) ──▶ TableWriter ──▶ Arc<Tables>, read by the workers
//! ```
//!
//! Like the crates it joins it reads no clock and opens no socket, so the daemon
//! (`control.rs`) and the simulated networks of the tests drive the very same code.

use crate::{
    status::{Traffic, TrafficLedger},
    strongswan::is_imported,
};
use esplane_api::{
    DropCounters, IpPrefix, Now, SaCommand, SaEvent, SaId, SaPair, TunnelId, TunnelParams,
};
use esplane_control_noise::{ConfigError, Engine, Notice, Output, PeerConfig, PeerStatus};
use esplane_control_vici::{
    importer::{ChildStatus, ImportNotice, ImportOutput, Importer},
    vici::{ViciEvent, ViciRequest},
    xfrm::{XfrmEvent, XfrmRequest},
};
use esplane_dataplane::{CommandError, TableWriter, Tables};
use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

/// What a [`Node`] asks of whoever holds the sockets.
#[derive(Debug)]
pub enum Action {
    /// Send this UDP payload from the listening socket.
    Send {
        /// The peer.
        to: SocketAddr,
        /// The payload, non-ESP marker included.
        datagram: Vec<u8>,
    },
    /// Seal and send one dummy packet with the SA that sends in this tunnel.
    SendDummy(TunnelId),
    /// A new snapshot of the tables is out: wake the workers, some hold packets for it.
    TablesChanged,
    /// Store a further reservation of sequence numbers, then call [`Node::extend_sequence`].
    ExtendReservation {
        /// The manually keyed SA.
        sa: SaId,
        /// The next number it will send.
        next: u64,
    },
    /// A manually keyed SA has ended, and nobody can be asked for another.
    StaticSaEnded(SaEvent),
    /// Something people may want to know.
    Notice(Notice),
    /// Ask the kernel, or whoever plays its part.
    Xfrm(XfrmRequest),
    /// Ask charon.
    Vici(ViciRequest),
    /// Something people may want to know of a strongSwan's tunnel.
    ImportNotice(ImportNotice),
    /// The dataplane refused what the key exchange asked for. Nothing of it was carried out.
    Refused(CommandError),
}

/// One gateway without its sockets. See the [module](self).
pub struct Node {
    engine: Engine,
    importer: Option<Importer>,
    tables: TableWriter,
    static_tunnels: BTreeSet<TunnelId>,
    ledger: TrafficLedger,
    actions: VecDeque<Action>,
}

impl Node {
    /// Joins a key exchange (without peers yet) and empty tables.
    pub fn new(engine: Engine, tables: TableWriter) -> Self {
        Self {
            engine,
            importer: None,
            tables,
            static_tunnels: BTreeSet::new(),
            ledger: TrafficLedger::default(),
            actions: VecDeque::new(),
        }
    }

    /// The same with the tunnels of a strongSwan.
    pub fn with_importer(mut self, importer: Importer) -> Self {
        self.importer = Some(importer);
        self
    }

    /// Makes these the peers, at start and at a reload: unchanged ones keep their SAs.
    ///
    /// # Errors
    /// What is wrong with which peer; then nothing has changed.
    pub fn set_peers(&mut self, now: Now, peers: Vec<PeerConfig>) -> Result<(), ConfigError> {
        self.engine.set_peers(now, peers)?;
        self.drain(now);
        Ok(())
    }

    /// Removes some manually keyed tunnels and installs others, as one step.
    ///
    /// # Errors
    /// What collides with what; then nothing has changed.
    pub fn change_static(
        &mut self,
        now: Now,
        remove: &[TunnelId],
        install: Vec<(TunnelParams, SaPair)>,
    ) -> Result<(), CommandError> {
        let removals = remove.iter().copied().map(SaCommand::RemoveTunnel);
        let added: Vec<TunnelId> = install.iter().map(|(tunnel, _)| tunnel.id).collect();
        let installations = install.into_iter().flat_map(|(tunnel, pair)| {
            [
                SaCommand::DefineTunnel(tunnel),
                SaCommand::Install(pair.inbound),
                SaCommand::Install(pair.outbound),
            ]
        });
        self.change_tables(now, removals.chain(installations).collect())?;
        self.static_tunnels
            .retain(|tunnel| !remove.contains(tunnel));
        self.static_tunnels.extend(added);
        self.actions.push_back(Action::TablesChanged);
        Ok(())
    }

    /// Where a peer is, as DNS says.
    pub fn set_endpoint(&mut self, now: Now, peer: TunnelId, endpoint: SocketAddr) {
        self.engine.set_endpoint(now, peer, endpoint);
        self.drain(now);
    }

    /// A message of the key exchange, without its non-ESP marker.
    pub fn handle_datagram(&mut self, now: Now, from: SocketAddr, message: &[u8]) {
        self.engine.handle_datagram(now, from, message);
        self.drain(now);
    }

    /// Something charon tells.
    pub fn handle_vici(&mut self, now: Now, event: ViciEvent) {
        if let Some(importer) = &mut self.importer {
            importer.handle_vici(now, event);
        }
        self.drain(now);
    }

    /// Something the kernel tells.
    pub fn handle_xfrm(&mut self, now: Now, event: XfrmEvent) {
        if let Some(importer) = &mut self.importer {
            importer.handle_xfrm(now, event);
        }
        self.drain(now);
    }

    /// Something a worker saw.
    pub fn handle_event(&mut self, now: Now, event: SaEvent) {
        self.dispatch(now, event);
        self.drain(now);
    }

    /// To be called when [`Node::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Now) {
        self.engine.handle_timeout(now);
        if let Some(importer) = &mut self.importer {
            importer.handle_timeout(now);
        }
        self.drain(now);
    }

    /// To be called about once a second: lifetimes in seconds, and who is alive.
    pub fn handle_second(&mut self, now: Now) {
        for event in self.tables.tick(now) {
            self.dispatch(now, event);
        }
        self.observe_traffic();
        self.engine.handle_activity(now, &self.tables.activity());
        if let Some(importer) = &mut self.importer {
            let mut sas = self.tables.sas();
            sas.retain(|sa| is_imported(sa.id.tunnel));
            importer.handle_usage(now, &sas);
        }
        self.drain(now);
    }

    /// A reservation has been stored durably.
    pub fn extend_sequence(&mut self, now: Now, sa: SaId, reserved_until: u64) {
        self.apply(now, vec![SaCommand::ExtendSequence { sa, reserved_until }]);
    }

    /// The next thing to do, until `None`.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Node::handle_timeout`] wants to be called, on [`Now::monotonic`].
    pub fn poll_timeout(&self) -> Option<Duration> {
        let importer = self.importer.as_ref().and_then(Importer::poll_timeout);
        self.engine.poll_timeout().into_iter().chain(importer).min()
    }

    /// The newest snapshot.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.tables()
    }

    /// The tables, to read statuses from.
    pub fn table_writer(&self) -> &TableWriter {
        &self.tables
    }

    /// Enters what the SAs have carried since the last time.
    pub fn observe_traffic(&mut self) {
        self.ledger.observe(&self.tables.sas());
    }

    /// What a tunnel has sent and received over all its SAs, past ones included.
    pub fn traffic(&self, tunnel: TunnelId) -> (Traffic, Traffic) {
        self.ledger.totals(tunnel)
    }

    /// Forgets the traffic of tunnels that are gone.
    pub fn retain_traffic(&mut self, keep: impl Fn(TunnelId) -> bool) {
        self.ledger.retain(keep);
    }

    /// The peers of the key exchange.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.engine.peers()
    }

    /// The children of a strongSwan.
    pub fn children(&self) -> Vec<ChildStatus> {
        self.importer
            .as_ref()
            .map_or_else(Vec::new, Importer::children)
    }

    /// The networks behind them.
    pub fn imported_routes(&self) -> Vec<IpPrefix> {
        self.importer
            .as_ref()
            .map_or_else(Vec::new, Importer::routes)
    }

    /// Handshake messages that went no further.
    pub fn handshake_drops(&self) -> &DropCounters {
        self.engine.drops()
    }

    fn dispatch(&mut self, now: Now, event: SaEvent) {
        match &mut self.importer {
            Some(importer) if is_imported(event.tunnel()) => {
                return importer.handle_event(now, event);
            }
            _ if !self.static_tunnels.contains(&event.tunnel()) => {
                return self.engine.handle_event(now, event);
            }
            _ => {}
        }
        match event {
            SaEvent::SequenceLow { sa, next } => self
                .actions
                .push_back(Action::ExtendReservation { sa, next }),
            SaEvent::HardExpired { .. } | SaEvent::SequenceExhausted { .. } => {
                self.actions.push_back(Action::StaticSaEnded(event));
            }
            // Nobody negotiates manual keys, and their addresses are named by hand as well.
            SaEvent::SaNeeded { .. }
            | SaEvent::SoftExpired { .. }
            | SaEvent::FirstReceived { .. }
            | SaEvent::EndpointMoved { .. } => {}
        }
    }

    /// Carries out what the engine wants, in its order: an SA it announces is installed before the
    /// message that announces it leaves.
    fn drain(&mut self, now: Now) {
        while let Some(output) = self.engine.poll_output() {
            match output {
                Output::Send { to, datagram } => {
                    self.actions.push_back(Action::Send { to, datagram })
                }
                Output::Commands(commands) => self.apply(now, commands),
                Output::SendDummy(tunnel) => self.actions.push_back(Action::SendDummy(tunnel)),
                Output::Notice(notice) => self.actions.push_back(Action::Notice(notice)),
            }
        }
        while let Some(output) = self.importer.as_mut().and_then(Importer::poll_output) {
            let action = match output {
                ImportOutput::Commands(commands) => match self.change_tables(now, commands) {
                    Ok(()) => Action::TablesChanged,
                    Err(error) => {
                        if let Some(importer) = &mut self.importer {
                            importer.handle_refusal(now, &error);
                        }
                        continue;
                    }
                },
                ImportOutput::Xfrm(request) => Action::Xfrm(request),
                ImportOutput::Vici(request) => Action::Vici(request),
                ImportOutput::Notice(notice) => Action::ImportNotice(notice),
            };
            self.actions.push_back(action);
        }
    }

    fn apply(&mut self, now: Now, commands: Vec<SaCommand>) {
        let action = match self.change_tables(now, commands) {
            Ok(()) => Action::TablesChanged,
            Err(error) => Action::Refused(error),
        };
        self.actions.push_back(action);
    }

    /// What an SA has carried is entered before it goes.
    fn change_tables(&mut self, now: Now, commands: Vec<SaCommand>) -> Result<(), CommandError> {
        let removes = |command: &SaCommand| {
            matches!(command, SaCommand::Remove(_) | SaCommand::RemoveTunnel(_))
        };
        if commands.iter().any(removes) {
            self.observe_traffic();
        }
        self.tables.apply(now, commands)
    }
}

#[cfg(test)]
mod tests;
