//! The control side: one task that owns the [`Node`] and everything else that is not a packet.
//!
//! ```text
//!   workers ──events, handshake messages──▶┐
//!   HTTP, SIGHUP ──Request────────────────▶│ Control::run ──▶ sockets, tables + wake, netlink, log
//!   DNS answers ──────────────────────────▶│
//!   charon, kernel (strongswan/) ─────────▶│
//!   clock: timers, every second ──────────▶┘
//! ```
//!
//! Everything is decided in this one task, one message at a time, so nothing here needs a lock.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the loop, and what it does about each message |
//! | `handle.rs` | how others ask |
//! | `reload.rs` | from one configuration to the next, all or nothing |
//! | `statics.rs` | manually keyed tunnels and their reservations |
//! | `imports.rs` | a strongSwan's tunnels: addresses, routes, MTU |
//! | `overview.rs` | what `show` and `/metrics` tell |

mod handle;
mod imports;
mod overview;
mod reload;
mod statics;

pub use handle::ControlHandle;
pub(crate) use handle::{Request, channel};
pub use reload::ReloadError;
pub(crate) use statics::{Source as StaticSource, Statics};

use crate::{
    clock::Clock,
    config::{Config, TunnelIds},
    io::OuterTransmitter,
    netlink::NetlinkError,
    network::Network,
    nic::Nics,
    node::{Action, Node},
    resolver::{Resolved, Resolver},
    status::ReloadTotals,
    strongswan::{Fact, Takeover},
    telemetry::logging::LogHandle,
    worker::{ToControl, WorkerCounters, WorkerError, WorkerHandle},
};
use arc_swap::ArcSwap;
use esplane_api::{IpPrefix, TunnelId};
use esplane_control_noise::{Notice, PeerState, Severity};
use esplane_dataplane::{Batch, Outbound, Report, Tables};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{error, info, warn};

/// Messages of workers handled before requests and timers get their turn again.
const MESSAGES_AT_ONCE: usize = 64;

/// Everything the control side owns. Made by `daemon.rs`, which has opened it all.
pub(crate) struct Control {
    pub config: Config,
    pub ids: TunnelIds,
    pub node: Node,
    pub clock: Clock,
    pub tables: Arc<ArcSwap<Tables>>,
    pub workers: Vec<WorkerHandle>,
    pub counters: Vec<(Option<usize>, Arc<WorkerCounters>)>,
    pub transmitter: OuterTransmitter,
    pub dummies: Dummies,
    pub network: Network,
    pub _nics: Nics,
    pub mtu: u32,
    /// What the frames have room for.
    pub mtu_max: u32,
    /// What the way to each peer bears.
    pub ways: BTreeMap<IpAddr, u32>,
    pub statics: Statics,
    pub takeover: Option<Takeover>,
    /// Networks of a strongSwan's children that are no routes, and why.
    pub unrouted: BTreeMap<IpPrefix, String>,
    pub resolver: Resolver,
    pub resolved: BTreeMap<String, SocketAddr>,
    pub log: LogHandle,
    pub reloads: ReloadTotals,
    pub aead: &'static str,
    pub from_workers: mpsc::Receiver<ToControl>,
    pub requests: mpsc::Receiver<Request>,
}

/// What is needed to seal a dummy packet outside of a worker.
pub(crate) struct Dummies {
    outbound: Outbound,
    batch: Batch,
    report: Report,
}

impl Dummies {
    pub fn new() -> Self {
        Self {
            outbound: Outbound::new(1),
            batch: Batch::new(1, 512),
            report: Report::new(),
        }
    }
}

/// Why the control side has ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Somebody asked for it.
    AsAsked,
    /// A worker is gone, and its packets with it.
    WorkerFailed(WorkerError),
}

impl Control {
    /// Lets the first packets in: routes to all that the tunnels protect.
    pub async fn set_first_routes(&mut self) -> Result<(), NetlinkError> {
        self.set_ways(self.ways_with(&self.config)).await
    }

    /// Runs until the daemon is to stop.
    pub async fn run(&mut self) -> Ended {
        let mut second = interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.act();
            self.follow_imports().await;
            let timer = self
                .node
                .poll_timeout()
                .map(|at| Instant::from_std(self.clock.instant(at)));
            tokio::select! {
                Some(message) = self.from_workers.recv() => {
                    if let Err(error) = self.hear_workers(message) {
                        return Ended::WorkerFailed(error);
                    }
                }
                Some(request) = self.requests.recv() => {
                    if let Request::Stop = request {
                        return Ended::AsAsked;
                    }
                    self.answer(request).await;
                }
                resolved = self.resolver.next() => self.hear_resolver(resolved).await,
                fact = next_fact(&mut self.takeover) => self.hear_strongswan(fact),
                () = sleep_until(timer.unwrap_or_else(Instant::now)), if timer.is_some() => {
                    self.node.handle_timeout(self.clock.now());
                }
                _ = second.tick() => {
                    self.node.handle_second(self.clock.now());
                }
            }
        }
    }

    /// Ends everything in good order: no packet after the workers, no route after the packets.
    pub async fn shut_down(self) {
        for worker in &self.workers {
            worker.stop();
        }
        let workers = self.workers;
        let joined = tokio::task::spawn_blocking(move || {
            workers
                .into_iter()
                .filter_map(|worker| worker.join().err())
                .collect::<Vec<_>>()
        });
        for error in joined.await.unwrap_or_default() {
            error!("{error}");
        }
        // Nobody sends any more, so the last numbers are certain.
        self.statics.finish(&self.node.table_writer().sas());
        self.network.tear_down().await;
    }

    fn hear_workers(&mut self, first: ToControl) -> Result<(), WorkerError> {
        let mut next = Some(first);
        for _ in 0..MESSAGES_AT_ONCE {
            let Some(message) = next else { break };
            match message {
                ToControl::Datagram { from, data } => {
                    self.node.handle_datagram(self.clock.now(), from, &data);
                }
                ToControl::Event(event) => self.node.handle_event(self.clock.now(), event),
                ToControl::WorkerFailed { worker, error } => {
                    error!("worker {worker} has ended: {error}");
                    return Err(error);
                }
            }
            self.act();
            next = self.from_workers.try_recv().ok();
        }
        Ok(())
    }

    /// DNS decides only where a peer is to be looked for; where it is, its packets say.
    async fn hear_resolver(&mut self, resolved: Resolved) {
        let Some(tunnel) = self.ids.get(&resolved.peer) else {
            return;
        };
        let news =
            self.resolved.insert(resolved.peer, resolved.endpoint) != Some(resolved.endpoint);
        let lost = self.node.peers().iter().any(|peer| {
            peer.id == tunnel && (peer.endpoint.is_none() || peer.state != PeerState::Established)
        });
        if news || lost {
            self.node
                .set_endpoint(self.clock.now(), tunnel, resolved.endpoint);
        }
        if news && let Err(error) = self.set_ways(self.ways_with(&self.config)).await {
            error!("{error}");
        }
    }

    /// Does what the node wants done.
    fn act(&mut self) {
        while let Some(action) = self.node.poll_action() {
            match action {
                Action::Send { to, datagram } => {
                    if let Err(error) = self.transmitter.send_datagram(to, &datagram) {
                        warn!("cannot send a handshake message to {to}: {error}");
                    }
                }
                Action::SendDummy(tunnel) => self.send_dummy(tunnel),
                Action::TablesChanged => self.publish(),
                Action::ExtendReservation { sa, .. } => self.extend_reservation(sa),
                Action::StaticSaEnded(event) => {
                    let name = self.ids.name(event.tunnel()).unwrap_or("?");
                    error!(
                        "static SA `{name}` has ended ({event:?}): give it new keys at both ends"
                    );
                }
                Action::Notice(notice) => log_notice(&notice),
                Action::Xfrm(request) => self.ask(|takeover| takeover.link.ask_kernel(request)),
                Action::Vici(request) => self.ask(|takeover| takeover.link.ask_charon(request)),
                Action::ImportNotice(notice) => imports::log_notice(&notice),
                Action::Refused(error) => {
                    error!("a bug: the dataplane refused the key exchange: {error}")
                }
            }
        }
    }

    fn publish(&mut self) {
        if let Some(takeover) = &mut self.takeover {
            // First: the peer may use what is new as soon as charon has said so.
            takeover.follow(&self.node.table_writer().sas());
        }
        self.tables.store(self.node.tables());
        for worker in &self.workers {
            worker.wake();
        }
    }

    fn send_dummy(&mut self, tunnel: TunnelId) {
        let Dummies {
            outbound,
            batch,
            report,
        } = &mut self.dummies;
        batch.clear();
        let tables = self.tables.load();
        if outbound.dummy(&tables, tunnel, batch, report) {
            self.transmitter.transmit(batch, &mut report.drops);
        }
        let events: Vec<_> = report.drain_events().collect();
        for event in events {
            self.node.handle_event(self.clock.now(), event);
        }
    }

    fn extend_reservation(&mut self, sa: esplane_api::SaId) {
        match self.statics.extend(sa) {
            Ok(reserved_until) => self
                .node
                .extend_sequence(self.clock.now(), sa, reserved_until),
            Err(error) => error!("{error}"),
        }
    }
}

/// What a strongSwan tells next; without one, nothing ever.
async fn next_fact(takeover: &mut Option<Takeover>) -> Fact {
    match takeover {
        Some(takeover) => takeover.link.next().await,
        None => std::future::pending().await,
    }
}

fn log_notice(notice: &Notice) {
    match notice.severity() {
        Severity::Info => info!("{notice}"),
        Severity::Warning => warn!("{notice}"),
        Severity::Error => error!("{notice}"),
    }
}
