//! The clients of charon and of the kernel, each a task, as one source of facts.

use super::check::names;
use crate::{
    clock::Clock,
    config::{Mode, Strongswan},
};
use esplane_control_vici::{
    kernel,
    vici::{self, ViciEvent, ViciRequest, ViciSettings},
    xfrm::{self, XfrmEvent, XfrmRequest},
};
use std::{collections::VecDeque, path::PathBuf, time::Duration};
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tracing::error;

/// Facts, and requests, under way between two tasks.
const QUEUE: usize = 256;
/// How soon to try again when the kernel's SA database is out of reach.
const RETRY: Duration = Duration::from_secs(5);

/// Something charon or the kernel tells.
#[expect(clippy::large_enum_variant, reason = "a few of them each negotiation")]
pub(crate) enum Fact {
    Vici(ViciEvent),
    Xfrm(XfrmEvent),
}

/// The two clients. They end with it.
pub(crate) struct Link {
    vici: Channel<ViciEvent, ViciRequest>,
    xfrm: Channel<XfrmEvent, XfrmRequest>,
    _tasks: JoinSet<()>,
}

/// One client's facts, and the requests that wait until it takes them: it may be busy waiting
/// for an answer, and the control side never waits.
struct Channel<E, R> {
    events: mpsc::Receiver<E>,
    requests: mpsc::Sender<R>,
    waiting: VecDeque<R>,
}

/// A client's end.
struct ClientEnd<E, R> {
    events: mpsc::Sender<E>,
    requests: mpsc::Receiver<R>,
}

impl Link {
    /// Starts both. charon need not run yet.
    pub fn start(config: &Strongswan, clock: Clock) -> Self {
        let mut tasks = JoinSet::new();
        let (vici, vici_end) = channel();
        tasks.spawn(follow_charon(config.vici.clone(), vici_end));
        let (xfrm, xfrm_end) = channel();
        match &config.mode {
            Mode::Kernel => tasks.spawn(follow_kernel(xfrm_end)),
            Mode::Preload { socket } => tasks.spawn(play_kernel(socket.clone(), xfrm_end, clock)),
        };
        Self {
            vici,
            xfrm,
            _tasks: tasks,
        }
    }

    /// The next fact. Cancel-safe.
    pub async fn next(&mut self) -> Fact {
        tokio::select! {
            event = self.xfrm.next() => Fact::Xfrm(event),
            event = self.vici.next() => Fact::Vici(event),
        }
    }

    /// Facts that are there already.
    pub fn try_next(&mut self) -> Option<Fact> {
        let kernel = self.xfrm.events.try_recv().ok().map(Fact::Xfrm);
        kernel.or_else(|| self.vici.events.try_recv().ok().map(Fact::Vici))
    }

    pub fn ask_charon(&mut self, request: ViciRequest) {
        self.vici.waiting.push_back(request);
        self.vici.hand_over();
    }

    pub fn ask_kernel(&mut self, request: XfrmRequest) {
        self.xfrm.waiting.push_back(request);
        self.xfrm.hand_over();
    }
}

fn channel<E, R>() -> (Channel<E, R>, ClientEnd<E, R>) {
    let (events_in, events) = mpsc::channel(QUEUE);
    let (requests, requests_out) = mpsc::channel(QUEUE);
    let channel = Channel {
        events,
        requests,
        waiting: VecDeque::new(),
    };
    let end = ClientEnd {
        events: events_in,
        requests: requests_out,
    };
    (channel, end)
}

impl<E, R> Channel<E, R> {
    fn hand_over(&mut self) {
        while let Some(request) = self.waiting.pop_front() {
            if let Err(error) = self.requests.try_send(request) {
                self.waiting.push_front(error.into_inner());
                return;
            }
        }
    }

    /// The next fact; requests that wait go out meanwhile. A client that has ended tells nothing any more.
    async fn next(&mut self) -> E {
        loop {
            tokio::select! {
                Ok(permit) = self.requests.reserve(), if !self.waiting.is_empty() => {
                    if let Some(request) = self.waiting.pop_front() {
                        permit.send(request);
                    }
                }
                event = self.events.recv() => match event {
                    Some(event) => return event,
                    None => std::future::pending().await,
                },
            }
        }
    }
}

async fn follow_charon(socket: PathBuf, end: ClientEnd<ViciEvent, ViciRequest>) {
    let settings = ViciSettings {
        socket,
        names: names(),
        ..ViciSettings::default()
    };
    vici::run(settings, end.requests, end.events).await;
}

/// Follows the kernel's SA database; where that fails, says so once for each cause and tries again.
async fn follow_kernel(mut end: ClientEnd<XfrmEvent, XfrmRequest>) {
    let mut told = String::new();
    while let Err(error) = xfrm::client::run(&mut end.requests, &end.events).await {
        tell_and_wait(&mut told, error.to_string()).await;
    }
}

/// Plays the kernel's part for a charon whose preloaded library comes to `socket`.
async fn play_kernel(socket: PathBuf, mut end: ClientEnd<XfrmEvent, XfrmRequest>, clock: Clock) {
    let mut told = String::new();
    loop {
        let (requests, events) = (&mut end.requests, &end.events);
        let now = || clock.now();
        match kernel::server::run(&socket, requests, events, now, Box::new(random)).await {
            Ok(()) => return,
            Err(error) => tell_and_wait(&mut told, error.to_string()).await,
        }
    }
}

/// For SPIs. Should the system have no random numbers, charon is refused an SPI, and says so.
fn random() -> u32 {
    getrandom::u32().unwrap_or_default()
}

async fn tell_and_wait(told: &mut String, error: String) {
    if error != *told {
        error!("strongSwan's keys are out of reach: {error}; trying again every {RETRY:?}");
        *told = error;
    }
    sleep(RETRY).await;
}
