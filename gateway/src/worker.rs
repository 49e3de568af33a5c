//! One core's share of the work, run to completion: no async, no lock, no allocation for a packet
//! that passes.
//!
//! ```text
//!          ┌──────────────────────────── one turn ────────────────────────────┐
//!          │ 1 the tables; if they are new, held packets go before newer ones │
//!   inner ─┼▶ 2 receive ▶ 3 Outbound::process ▶ 4 hold ▶ 5 transmit ──────────┼▶ outer
//!   inner ◀┼─ 5 transmit ◀ 4 control ◀ 3 Inbound::process ◀ 2 receive ────────┼─ outer
//!          │ 6 what the kernel has lost; events and drops to the control side │
//!          └──────────────────────────────────────────────────────────────────┘
//!            nothing to do: sleep until a descriptor is readable, a waker rings,
//!            or a held packet gets too old (`busy_poll`: the next turn at once)
//! ```
//!
//! A turn moves at most one batch each way, so neither direction starves the other. In each direction the tables are read after the
//! packets: whatever was published before a packet came decides over it.

use crate::{
    hold::{HoldLimits, HoldQueue},
    io::{Driver, Traffic, Waker, receiving_arena_bytes, wait, xdp::Frames},
};
use arc_swap::ArcSwap;
use arrayvec::ArrayVec;
use esplane_api::{DropReason, SaEvent};
use esplane_dataplane::{Batch, Inbound, Outbound, Outer, Report, Tables, Verdict};
use std::{
    io,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

mod counters;
#[cfg(test)]
mod tests;
pub use counters::{WorkerCounters, WorkerSnapshot};

/// All that one worker needs.
pub struct WorkerSetup {
    /// Its number, from 0.
    pub index: usize,
    /// The private side.
    pub inner: Box<dyn Driver>,
    /// The public side.
    pub outer: Box<dyn Driver>,
    /// Where the control side publishes its snapshots; [`WorkerHandle::wake`] after each.
    pub tables: Arc<ArcSwap<Tables>>,
    /// Messages to the control side.
    pub control: ControlSender,
    /// What it counts.
    pub counters: Arc<WorkerCounters>,
    /// The core to stay on, if any.
    pub pin_to_core: Option<usize>,
    /// Whether it looks for packets all the time and never sleeps.
    pub busy_poll: bool,
    /// Packets in one batch.
    pub batch_packets: usize,
    /// Bytes of one frame: [`crate::io::frame_bytes`] of the inner interface's MTU.
    pub frame_bytes: usize,
    /// Frames that its drivers share with the kernel, if they do.
    pub frames: Option<Frames>,
    /// What may wait for an SA.
    pub hold: HoldLimits,
}

/// Packets in a batch, where nothing else is asked for.
pub const BATCH_PACKETS: usize = 128;

/// Where workers send their messages. Bounded: a worker never waits for the control side.
pub type ControlSender = mpsc::Sender<ToControl>;

/// What a worker tells the control side.
#[derive(Debug)]
pub enum ToControl {
    /// A control message from behind the non-ESP marker.
    Datagram {
        /// Its sender.
        from: SocketAddr,
        /// The message without the marker.
        data: Vec<u8>,
    },
    /// Something the control planes want to know.
    Event(SaEvent),
    /// A worker has ended without having been told to. Its packets go nowhere: restart, or exit.
    WorkerFailed {
        /// Which one.
        worker: usize,
        /// Why.
        error: WorkerError,
    },
}

/// Why a worker has ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WorkerError {
    /// The private interface is gone.
    #[error("the inner interface yields nothing any more: {0}")]
    Inner(Arc<io::Error>),
    /// The sockets are gone.
    #[error("the outer sockets yield nothing any more: {0}")]
    Outer(Arc<io::Error>),
    /// It cannot sleep.
    #[error("cannot wait for packets: {0}")]
    Poll(Arc<io::Error>),
    /// A bug of ours.
    #[error("a bug: the worker panicked: {0}")]
    Panicked(String),
}

/// A running worker.
#[derive(Debug)]
pub struct WorkerHandle {
    index: usize,
    waker: Waker,
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<(), WorkerError>>,
}

/// Starts a worker on a thread of its own.
pub fn spawn(setup: WorkerSetup) -> io::Result<WorkerHandle> {
    let (index, waker, stop) = (setup.index, Waker::new()?, Arc::new(AtomicBool::new(false)));
    let (control, core) = (setup.control.clone(), setup.pin_to_core);
    let worker = Worker::new(setup, waker.clone(), stop.clone());
    let thread = thread::Builder::new()
        .name(format!("esplane-w{index}"))
        .spawn(move || {
            let run = || {
                pin(core);
                worker.run()
            };
            let result = catch_unwind(AssertUnwindSafe(run))
                .unwrap_or_else(|panic| Err(WorkerError::Panicked(panic_text(&*panic))));
            if let Err(error) = &result {
                report_failure(&control, index, error);
            }
            result
        })?;
    Ok(WorkerHandle {
        index,
        waker,
        stop,
        thread,
    })
}

impl WorkerHandle {
    /// Its number.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Call it after the tables have changed: packets may be held for the new ones.
    pub fn wake(&self) {
        self.waker.wake();
    }

    /// Tells it to end once it has carried what has already arrived. Does not wait.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether it has ended, told to or not.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits until it has ended; its drivers are closed then.
    pub fn join(self) -> Result<(), WorkerError> {
        self.thread
            .join()
            .unwrap_or_else(|panic| Err(WorkerError::Panicked(panic_text(&*panic))))
    }
}

/// Turns that a worker told to stop still makes, at most.
const DRAIN_TURNS: usize = 64;
/// How soon after work the kernel is asked what it has lost.
const ASK_FOR_LOSSES: Duration = Duration::from_millis(200);
/// How soon to try again what the control side had no room for.
const EVENT_RETRY: Duration = Duration::from_millis(10);
/// How long to stay quiet about an event just told.
const EVENT_QUIET: Duration = Duration::from_millis(100);
/// The pause where a descriptor cries trouble but receiving finds none.
const TROUBLE_PAUSE: Duration = Duration::from_millis(10);

struct Worker {
    inner: Box<dyn Driver>,
    outer: Box<dyn Driver>,
    tables: Arc<ArcSwap<Tables>>,
    /// The snapshot that held packets were last tried with.
    tried: Arc<Tables>,
    control: ControlSender,
    counters: Arc<WorkerCounters>,
    waker: Waker,
    stop: Arc<AtomicBool>,
    busy_poll: bool,
    /// From clear to ESP.
    leaving: Batch,
    /// The same for those that were held. Not in frames shared with a card: in NIC mode they leave by the kernel's sockets.
    released: Batch,
    /// From ESP to clear: its arena is where messages of many packets are received.
    arriving: Batch,
    outbound: Outbound,
    inbound: Inbound,
    held: HoldQueue,
    report: Report,
    told: RecentEvents,
    /// When to ask the kernel what it has lost: soon after work, and never while idle.
    ask_for_losses: Option<Duration>,
    started: Instant,
}

impl Worker {
    fn new(setup: WorkerSetup, waker: Waker, stop: Arc<AtomicBool>) -> Self {
        let (packets, frame_bytes) = (setup.batch_packets, setup.frame_bytes);
        let (leaving, arriving) = match setup.frames {
            Some(frames) => frames.batches(packets),
            None => (
                Batch::new(packets, frame_bytes),
                Batch::with_arena(packets, frame_bytes, receiving_arena_bytes()),
            ),
        };
        Self {
            inner: setup.inner,
            outer: setup.outer,
            tried: setup.tables.load_full(),
            tables: setup.tables,
            control: setup.control,
            counters: setup.counters,
            waker,
            stop,
            busy_poll: setup.busy_poll,
            released: Batch::new(packets.min(RELEASE_PACKETS), frame_bytes),
            leaving,
            arriving,
            outbound: Outbound::new(setup.batch_packets).of_worker(setup.index as u16),
            inbound: Inbound::new(setup.batch_packets),
            held: HoldQueue::new(setup.hold),
            report: Report::new(),
            told: RecentEvents::default(),
            ask_for_losses: None,
            started: Instant::now(),
        }
    }

    fn run(mut self) -> Result<(), WorkerError> {
        while !self.stop.load(Ordering::Acquire) {
            match (self.turn()?, self.busy_poll) {
                (true, _) => {}
                (false, true) => std::hint::spin_loop(),
                (false, false) => self.sleep()?,
            }
        }
        for _ in 0..DRAIN_TURNS {
            if !self.turn()? {
                break;
            }
        }
        let still_held = self.held.take_all().count() as u64;
        self.report.drops.add(DropReason::HoldTimeout, still_held);
        self.count_losses();
        self.tell(self.started.elapsed());
        Ok(())
    }

    /// One batch each way. Answers whether there was any work.
    fn turn(&mut self) -> Result<bool, WorkerError> {
        let now = self.started.elapsed();
        let sent = self.turn_outbound(now);
        let received = self.turn_inbound();
        // 6. Losses, events and drops.
        if self.ask_for_losses.is_some_and(|at| at <= now) {
            self.count_losses();
        }
        self.tell(now);
        let worked = sent.map_err(|error| WorkerError::Inner(error.into()))?
            | received.map_err(|error| WorkerError::Outer(error.into()))?;
        if worked && self.ask_for_losses.is_none() {
            self.ask_for_losses = Some(now + ASK_FOR_LOSSES);
        }
        Ok(worked)
    }

    fn count_losses(&mut self) {
        self.ask_for_losses = None;
        self.inner.count_lost(&mut self.report.drops);
        self.outer.count_lost(&mut self.report.drops);
    }

    fn turn_outbound(&mut self, now: Duration) -> io::Result<bool> {
        // 2. Receive.
        self.leaving.clear();
        self.outer.reclaim(&mut self.leaving);
        let received = self
            .inner
            .receive(&mut self.leaving, &mut self.report.drops);
        // 1. One snapshot for all that leaves, so that a released packet and a newer one meet the same SA.
        let tables = self.tables.load();
        if !Arc::ptr_eq(&tables, &self.tried) {
            self.tried = Arc::clone(&tables);
            self.release_held(&tables);
        }
        self.held.expire(now, &mut self.report.drops);
        received?;
        if self.leaving.is_empty() {
            return Ok(false);
        }
        self.counters.received_inner(traffic(&self.leaving));
        // 3. Clear to ESP.
        self.outbound
            .process(&tables, &mut self.leaving, &mut self.report);
        // 4. Hold what has no SA yet.
        hold(&self.leaving, |_| now, &mut self.held, &mut self.report);
        // 5. Transmit.
        let sent = self
            .outer
            .transmit(&mut self.leaving, &mut self.report.drops);
        self.counters.sent_outer(sent);
        Ok(true)
    }

    fn turn_inbound(&mut self) -> io::Result<bool> {
        // 2. Receive.
        self.arriving.clear();
        self.inner.reclaim(&mut self.arriving);
        self.outer
            .receive(&mut self.arriving, &mut self.report.drops)?;
        if self.arriving.is_empty() {
            return Ok(false);
        }
        self.counters.received_outer(traffic(&self.arriving));
        // 3. ESP to clear, by a snapshot taken after the packets: an inbound SA is published before the peer
        //    can know of it, so whatever has arrived for it finds it. An older snapshot might not have it.
        let tables = self.tables.load();
        self.inbound
            .process(&tables, &mut self.arriving, &mut self.report);
        // 4. Control messages go to the control side; few, so they may be copied.
        for (index, packet) in self.arriving.packets().iter().enumerate() {
            if packet.verdict == Verdict::Control {
                let message = ToControl::Datagram {
                    from: self.arriving.outer_of(packet).remote,
                    data: self.arriving.data(index).to_vec(),
                };
                if self.control.try_send(message).is_err() {
                    self.report.count_drop(DropReason::ControlQueueFull);
                }
            }
        }
        // 5. Transmit.
        let sent = self
            .inner
            .transmit(&mut self.arriving, &mut self.report.drops);
        self.counters.sent_inner(sent);
        Ok(true)
    }

    /// Tries every held packet with new tables, oldest first; what must wait on keeps its age.
    fn release_held(&mut self, tables: &Tables) {
        let mut waiting = self.held.take_all().peekable();
        while waiting.peek().is_some() {
            let mut since: ArrayVec<Duration, RELEASE_PACKETS> = ArrayVec::new();
            self.released.clear();
            while !since.is_full()
                && !self.released.is_full()
                && let Some(packet) = waiting.next()
            {
                if self.released.push(&packet.data, Outer::NONE) {
                    since.push(packet.since);
                } else {
                    self.report.count_drop(DropReason::InnerTooBig);
                }
            }
            self.outbound
                .process(tables, &mut self.released, &mut self.report);
            let since = |index: usize| since[index];
            hold(&self.released, since, &mut self.held, &mut self.report);
            let sent = self
                .outer
                .transmit(&mut self.released, &mut self.report.drops);
            self.counters.sent_outer(sent);
        }
    }

    /// Events and drops to the control side. An event that finds no room is kept for the next turn.
    fn tell(&mut self, now: Duration) {
        self.counters.dropped(&self.report.drops);
        self.counters.holding(self.held.len());
        let events: ArrayVec<SaEvent, 64> = self.report.events().iter().copied().take(64).collect();
        self.report.clear();
        for event in events {
            if self.told.is_news(now, event) {
                match self.control.try_send(ToControl::Event(event)) {
                    Ok(()) => self.told.remember(now, event),
                    Err(_) => {
                        self.report.raise(event);
                    }
                }
            }
        }
    }

    fn sleep(&mut self) -> Result<(), WorkerError> {
        let now = self.started.elapsed();
        let until_expiry = self.held.next_expiry().map(|at| at.saturating_sub(now));
        let until_retry = (!self.report.events().is_empty()).then_some(EVENT_RETRY);
        let until_losses = self.ask_for_losses.map(|at| at.saturating_sub(now));
        let timeouts = [until_expiry, until_retry, until_losses];
        let timeout = timeouts.into_iter().flatten().min();
        let descriptors = [self.inner.poll_descriptors(), self.outer.poll_descriptors()];
        let woken = wait(&self.waker, &descriptors, timeout)
            .map_err(|error| WorkerError::Poll(error.into()))?;
        self.counters.slept();
        if woken.by_waker {
            self.waker.clear();
        }
        if woken.by_error && !woken.by_driver {
            thread::sleep(TROUBLE_PAUSE);
        }
        Ok(())
    }
}

/// Held packets tried at once.
const RELEASE_PACKETS: usize = 64;

/// Keeps what waits for an SA, each packet with the time `since` which it does, and counts what may not pass in clear here.
fn hold(
    batch: &Batch,
    since: impl Fn(usize) -> Duration,
    held: &mut HoldQueue,
    report: &mut Report,
) {
    for (index, packet) in batch.packets().iter().enumerate() {
        match packet.verdict {
            Verdict::Hold(tunnel) => {
                held.push(since(index), tunnel, batch.data(index), &mut report.drops);
            }
            Verdict::Bypass => report.count_drop(DropReason::BypassUnavailable),
            Verdict::Pending
            | Verdict::Forward
            | Verdict::Taken
            | Verdict::Control
            | Verdict::Drop(_) => {}
        }
    }
}

/// Events told a moment ago: the dataplane raises one with every batch while its cause lasts.
#[derive(Default)]
struct RecentEvents(ArrayVec<(Duration, SaEvent), 32>);

impl RecentEvents {
    fn is_news(&mut self, now: Duration, event: SaEvent) -> bool {
        self.0.retain(|(told, _)| now < *told + EVENT_QUIET);
        !self
            .0
            .iter()
            .any(|(_, known)| without_figures(*known) == without_figures(event))
    }

    fn remember(&mut self, now: Duration, event: SaEvent) {
        // Without room it may be told once too often; no harm.
        let _ = self.0.try_push((now, event));
    }
}

fn without_figures(event: SaEvent) -> SaEvent {
    match event {
        SaEvent::SequenceLow { sa, .. } => SaEvent::SequenceLow { sa, next: 0 },
        other => other,
    }
}

fn traffic(batch: &Batch) -> Traffic {
    let mut traffic = Traffic::default();
    for packet in batch.packets() {
        traffic.add(packet.data_bytes());
    }
    traffic
}

/// The cores that this process may use: a worker for each, and each on its own.
pub fn cores() -> Vec<usize> {
    let allowed = rustix::thread::sched_getaffinity(None);
    let allowed = allowed.as_ref();
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|core| allowed.is_ok_and(|allowed| allowed.is_set(*core)))
        .collect()
}

fn pin(core: Option<usize>) {
    let Some(core) = core else { return };
    let mut cores = rustix::thread::CpuSet::new();
    if core < rustix::thread::CpuSet::MAX_CPU {
        cores.set(core);
    }
    if let Err(error) = rustix::thread::sched_setaffinity(None, &cores) {
        tracing::warn!(core, %error, "cannot pin the worker to its core; it will wander");
    }
}

/// Tells the control side even if its queue is full for a moment.
fn report_failure(control: &ControlSender, worker: usize, error: &WorkerError) {
    tracing::error!(worker, %error, "worker failed");
    let mut message = ToControl::WorkerFailed {
        worker,
        error: error.clone(),
    };
    for _ in 0..100 {
        match control.try_send(message) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => return,
            Err(mpsc::error::TrySendError::Full(back)) => message = back,
        }
        thread::sleep(EVENT_RETRY);
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no text".to_owned())
}
