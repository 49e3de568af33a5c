//! `esplane run`: opens everything, starts the workers and the control side, and closes it all again.
//!
//! Nothing is half-started: whatever cannot be opened ends the start with one clear error, and what
//! was opened before it goes as it is dropped (the TUN interface takes its addresses and routes along).

use crate::{
    aead,
    cli::{ConfigArgs, Failure},
    clock::Clock,
    config::{Config, TunnelIds},
    control::{self, Control, ControlHandle, Dummies, Ended, StaticSource, Statics},
    hold::HoldLimits,
    http::Server,
    io::{AddressFilter, OuterSockets, SharedPort, TunOptions, TunQueue, frame_bytes},
    keys,
    netlink::Netlink,
    network::{Network, inner_mtu},
    nic::{self, Attached, WorkerDrivers},
    node::Node,
    resolver::Resolver,
    status::ReloadTotals,
    strongswan::{Link, Takeover},
    telemetry::logging,
    worker::{self, BATCH_PACKETS, ToControl, WorkerCounters, WorkerHandle, WorkerSetup},
};
use arc_swap::ArcSwap;
use esplane_api::Now;
use esplane_control_noise::{Engine, LoadPolicy, NodeConfig, StaticSecretKey};
use esplane_dataplane::{Aead, OuterHeaders, Settings, TableWriter, Tables};
use std::{collections::BTreeMap, error::Error, sync::Arc};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tracing::{debug, info};

/// Messages of all workers that may wait for the control side.
const TO_CONTROL: usize = 4096;

type Started<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Runs the daemon until SIGTERM, SIGINT, or the end of a worker.
pub fn run(args: &ConfigArgs) -> Result<(), Failure> {
    let config = Config::load(&args.config).map_err(Failure::configuration)?;
    let aead = aead::choose().map_err(Failure::configuration)?;
    let log = logging::init(&config.log).map_err(Failure::runtime)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("esplane-control")
        .build()
        .map_err(Failure::runtime)?;
    runtime.block_on(async {
        let (control, handle, server) = start(config, aead, log).await.map_err(Failure::Runtime)?;
        serve(control, handle, server)
            .await
            .map_err(Failure::Runtime)
    })
}

/// Opens everything, in an order in which each step needs only those before it.
async fn start(
    config: Config,
    aead: Aead,
    log: logging::LogHandle,
) -> Started<(Control, ControlHandle, Server)> {
    let clock = Clock::start();
    let netlink = Netlink::open()?;
    let mut ways = BTreeMap::new();
    let mtu = inner_mtu(&netlink, &config, &[], &mut ways).await;
    // Of imported tunnels the way is known later, and may be wider.
    let mtu_max = mtu.max(1500);

    // 1. The API first: a second daemon of the same configuration notices here.
    let server = Server::bind(&config.api).await?;
    // 2. Queues and sockets; they receive nothing useful until the workers run.
    let count = config.workers.count();
    let inner = TunQueue::open(&TunOptions::new(&config.interface.name, count))?;
    let (outer, filter) = open_outer(&config, count)?;
    let transmitter = match outer.first() {
        Some(sockets) => sockets.transmitter()?,
        None => return Err("no worker is configured".into()),
    };
    // 3. Tunnels.
    let ids = TunnelIds::default().assign(config.tunnel_names());
    let settings = Settings {
        outer_headers: OuterHeaders::ByKernel,
    };
    let offloads = match (inner.first(), outer.first()) {
        (Some(tun), Some(sockets)) => {
            format!("TUN {}, UDP {}", tun.offloads(), sockets.offloads())
        }
        _ => "none".to_owned(),
    };
    let own_ports = outer.iter().skip(1).map_while(OuterSockets::own_port);
    let own_ports: Vec<u16> = own_ports.collect();
    let arrival = where_esp_arrives(&config, &own_ports);
    let mut node = Node::new(
        engine(&config, own_ports)?,
        TableWriter::new(settings, aead),
    );
    if let Some(strongswan) = &config.strongswan {
        node = node.with_importer(Takeover::importer(strongswan));
    }
    let mut statics = Statics::new(config.state_dir.clone());
    let now = clock.now();
    fill(&mut node, &mut statics, &config, &ids, now)?;
    // 4. Workers.
    let tables = Arc::new(ArcSwap::new(node.tables()));
    let (to_control, from_workers) = mpsc::channel(TO_CONTROL);
    let Attached { workers, nics } = nic::attach(&config, &netlink, inner, outer, mtu_max).await?;
    let (workers, counters) = spawn_workers(&config, workers, mtu_max, &tables, &to_control)?;
    // 5. Addresses and routes last: from here on packets come.
    let network = Network::set_up(netlink, &config, mtu).await?;
    let (handle, requests) = control::channel(config.static_sa_context());
    let resolver = Resolver::start(&config);
    let takeover = config.strongswan.as_ref().zip(filter);
    let takeover =
        takeover.map(|(strongswan, filter)| Takeover::new(Link::start(strongswan, clock), filter));
    info!(
        "node `{}`: {}, interface {} (MTU {mtu}), {count} workers, AEAD {}, offloads: {offloads}",
        config.name,
        arrival,
        config.interface.name,
        aead.name()
    );
    let mut control = Control {
        ids,
        node,
        clock,
        tables,
        workers,
        counters,
        transmitter,
        dummies: Dummies::new(),
        network,
        _nics: nics,
        mtu,
        mtu_max,
        ways,
        statics,
        takeover,
        unrouted: BTreeMap::new(),
        resolver,
        resolved: BTreeMap::new(),
        log,
        reloads: ReloadTotals::default(),
        aead: aead.name(),
        from_workers,
        requests,
        config,
    };
    if let Err(error) = control.set_first_routes().await {
        control.shut_down().await;
        return Err(error.into());
    }
    Ok((control, handle, server))
}

/// Runs until somebody says stop, then closes it all.
async fn serve(mut control: Control, handle: ControlHandle, server: Server) -> Started<()> {
    let (stopping, stopped) = watch::channel(());
    let http = tokio::spawn(server.run(handle.clone(), async move {
        let mut stopped = stopped;
        let _ = stopped.changed().await;
    }));
    let signals = tokio::spawn(follow_signals(handle)?);
    let ended = control.run().await;
    signals.abort();
    drop(stopping);
    control.shut_down().await;
    let _ = http.await;
    match ended {
        Ended::AsAsked => {
            info!("stopped");
            Ok(())
        }
        Ended::WorkerFailed(error) => Err(error.into()),
    }
}

/// All sockets towards peers; beside strongSwan also what says at which addresses they listen.
fn open_outer(
    config: &Config,
    workers: usize,
) -> Started<(Vec<OuterSockets>, Option<AddressFilter>)> {
    let own = [config.listen];
    let own = if config.uses_own_port() {
        &own[..]
    } else {
        &[]
    };
    let outer = OuterSockets::open_group(own, config.uses_plain_esp(), workers)?;
    let with_port =
        |(worker, sockets): (usize, OuterSockets)| match config.worker_ports.of_worker(worker) {
            Some(port) => sockets.with_own_port(own, port),
            None => Ok(sockets),
        };
    let outer = outer.into_iter().enumerate().map(with_port);
    let outer: Vec<OuterSockets> = outer.collect::<Result<_, _>>()?;
    let Some(strongswan) = &config.strongswan else {
        return Ok((outer, None));
    };
    let (shares, filter) = SharedPort::open_group(strongswan.port, workers)?;
    let outer = outer.into_iter().zip(shares);
    let outer = outer.map(|(sockets, share)| sockets.beside(share));
    Ok((outer.collect(), Some(filter)))
}

fn where_esp_arrives(config: &Config, own_ports: &[u16]) -> String {
    let own = config
        .uses_own_port()
        .then(|| format!("listening on {}", config.listen));
    let shared = config
        .strongswan
        .as_ref()
        .map(|strongswan| format!("beside strongSwan on UDP port {}", strongswan.port));
    let ports: Vec<String> = own_ports.iter().map(u16::to_string).collect();
    let also =
        (!ports.is_empty()).then(|| format!("workers send from ports {} too", ports.join(", ")));
    let all: Vec<String> = own.into_iter().chain(shared).chain(also).collect();
    all.join(", ")
}

fn engine(config: &Config, worker_ports: Vec<u16>) -> Started<Engine> {
    // A node with manual keys alone has nobody to show a Noise key to; any will do.
    let private_key = match &config.private_key {
        Some(key) => key.clone(),
        None => StaticSecretKey::from_bytes(*keys::random()?)?,
    };
    let local = config.listen.ip();
    Ok(Engine::new(NodeConfig {
        private_key,
        listen_port: config.listen.port(),
        local: (!local.is_unspecified()).then_some(local),
        seed: *keys::random()?,
        worker_ports,
        reserved_spis: config.static_sas.iter().map(|sa| sa.inbound.spi).collect(),
        under_load: LoadPolicy::default(),
    })?)
}

fn fill(
    node: &mut Node,
    statics: &mut Statics,
    config: &Config,
    ids: &TunnelIds,
    now: Now,
) -> Started<()> {
    statics.change(
        node,
        now,
        ids,
        &[],
        config.static_sas.clone(),
        StaticSource::File,
    )?;
    node.set_peers(now, config.noise_peers(ids, |_| None))?;
    Ok(())
}

type Counted = Vec<(Option<usize>, Arc<WorkerCounters>)>;

fn spawn_workers(
    config: &Config,
    drivers: Vec<WorkerDrivers>,
    mtu: u32,
    tables: &Arc<ArcSwap<Tables>>,
    control: &mpsc::Sender<ToControl>,
) -> Started<(Vec<WorkerHandle>, Counted)> {
    let cores = worker::cores();
    let mut handles = Vec::new();
    let mut counted = Vec::new();
    for (index, drivers) in drivers.into_iter().enumerate() {
        let WorkerDrivers {
            inner,
            outer,
            frames,
        } = drivers;
        let counters = Arc::new(WorkerCounters::new());
        counted.push((None, Arc::clone(&counters)));
        handles.push(worker::spawn(WorkerSetup {
            index,
            inner,
            outer,
            tables: Arc::clone(tables),
            control: control.clone(),
            counters,
            pin_to_core: cores.get(index).copied(),
            busy_poll: config.busy_poll,
            batch_packets: BATCH_PACKETS,
            frame_bytes: frame_bytes(mtu as usize),
            frames,
            hold: HoldLimits::default(),
        })?);
    }
    Ok((handles, counted))
}

fn follow_signals(handle: ControlHandle) -> Started<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => handle.reload().await,
            }
        }
        debug!("asked to stop");
        handle.stop().await;
    })
}
