//! The lasting conversation with charon: connects, registers events, dumps, follows, and begins again after any gap.
//!
//! ```text
//!   connect ─▶ register events ─▶ dump ─▶ Snapshot, Traps ─▶ events as they come …
//!      ▲                            ▲                            │
//!      │                            └─ an event was unreadable ◀─┤
//!      └── wait (longer each time) ◀── Lost ◀── charon gone, silent, unreadable, or our reader too slow
//! ```
//!
//! Events that come during the dump are told behind the snapshot: none falls between. `rekey` and `terminate` are
//! carried out between events; each `initiate` waits for its outcome on a connection of its own, since charon answers
//! one command at a time.

use super::{Channel, EVENTS, Facts, Message, Names, Trap, ViciError, ViciEvent, ViciRequest};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{debug, info, warn};

/// Initiates under way at once, each with a connection to charon.
const INITIATES_MAX: usize = 16;
/// Initiates under way and waiting.
const INITIATES_WAITING_MAX: usize = 1024;

/// How to talk to charon.
#[derive(Clone, Debug)]
pub struct ViciSettings {
    /// charon's socket.
    pub socket: PathBuf,
    /// What charon's names of protocols and services mean on this host.
    pub names: Names,
    /// How long charon may take for an answer, or for the next piece of a dump; and our reader for an event.
    pub answer_within: Duration,
    /// How long an initiate may take; charon gives up by itself after its own retransmissions (165 s).
    pub initiate_within: Duration,
    /// How often to look for new traps, and for what an unreadable event may have said.
    pub look_every: Duration,
    /// The first and the longest wait between attempts to connect.
    pub retry: (Duration, Duration),
}

impl Default for ViciSettings {
    fn default() -> Self {
        Self {
            socket: PathBuf::from(super::DEFAULT_SOCKET),
            names: Names::default(),
            answer_within: Duration::from_secs(10),
            initiate_within: Duration::from_secs(180),
            look_every: Duration::from_secs(5),
            retry: (Duration::from_millis(250), Duration::from_secs(15)),
        }
    }
}

/// Talks to charon until `requests` is closed or `events` has no reader.
///
/// Each conversation begins with a [`ViciEvent::Snapshot`]; if one breaks off after that, [`ViciEvent::Lost`] says so
/// before the next begins. Both channels are bounded: who reads too slowly gets a fresh snapshot in place of what was
/// missed, so that charon never piles up events for us.
pub async fn run(
    settings: ViciSettings,
    requests: mpsc::Receiver<ViciRequest>,
    events: mpsc::Sender<ViciEvent>,
) {
    let (shortest, longest) = settings.retry;
    let mut client = Client {
        settings: Arc::new(settings),
        requests,
        events,
        initiates: JoinSet::new(),
        permits: Arc::new(Semaphore::new(INITIATES_MAX)),
        in_step: false,
    };
    let mut wait = shortest;
    let mut said = false;
    while let Err(End::Gap(error)) = client.converse().await {
        if std::mem::take(&mut client.in_step) {
            warn!("lost charon: {error}; tunnels that are up stay up");
            (wait, said) = (shortest, false);
            if client.events.send(ViciEvent::Lost).await.is_err() {
                return;
            }
        } else if std::mem::replace(&mut said, true) {
            debug!("{error}");
        } else {
            warn!("{error}");
        }
        if client.idle(wait).await.is_err() {
            return;
        }
        wait = (wait * 2).min(longest);
    }
}

/// Why a conversation ended.
enum End {
    /// Something went wrong between charon and us.
    Gap(ViciError),
    /// Nobody asks or listens any longer.
    Unwanted,
}

impl From<ViciError> for End {
    fn from(error: ViciError) -> Self {
        Self::Gap(error)
    }
}

type Step<T> = Result<T, End>;

struct Client {
    settings: Arc<ViciSettings>,
    requests: mpsc::Receiver<ViciRequest>,
    events: mpsc::Sender<ViciEvent>,
    /// Each ends with a [`ViciEvent::InitiateEnded`]. They outlive a conversation.
    initiates: JoinSet<ViciEvent>,
    permits: Arc<Semaphore>,
    /// Whether the reader knows what charon knows.
    in_step: bool,
}

/// What comes next in a conversation.
enum Next {
    Event(String, Message),
    Request(ViciRequest),
    Initiated(Box<ViciEvent>),
    Look,
}

impl Client {
    /// One conversation; only ends badly.
    async fn converse(&mut self) -> Step<()> {
        let limit = self.settings.answer_within;
        let mut charon = Channel::open(&self.settings.socket).await?;
        self.register(&mut charon).await?;
        let version = charon.request("version", Message::new(), limit).await?;
        let version = super::charon_version(&version);
        self.snapshot(&mut charon).await?;
        self.in_step = true;
        info!("{} {} tells of its SAs", version.daemon, version.version);
        let mut traps = None;
        self.look_for_traps(&mut charon, &mut traps).await?;

        let mut look = interval(self.settings.look_every);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.reset();
        let mut unreadable = false;
        loop {
            let next = tokio::select! {
                event = charon.next_event() => {
                    let (name, message) = event?;
                    Next::Event(name, message)
                }
                request = self.requests.recv() => Next::Request(request.ok_or(End::Unwanted)?),
                Some(Ok(event)) = self.initiates.join_next() => Next::Initiated(Box::new(event)),
                _ = look.tick() => Next::Look,
            };
            match next {
                Next::Event(name, message) => {
                    unreadable |= self.tell_event(&name, &message).await?
                }
                Next::Initiated(event) => self.tell(*event).await?,
                Next::Request(request) => self.carry_out(&mut charon, request).await?,
                Next::Look => {
                    if std::mem::take(&mut unreadable) {
                        self.snapshot(&mut charon).await?;
                    }
                    self.look_for_traps(&mut charon, &mut traps).await?;
                }
            }
        }
    }

    /// Events of ours, and those that dumps arrive by. An older charon may lack some of ours.
    async fn register(&self, charon: &mut Channel) -> Step<()> {
        for event in EVENTS.into_iter().chain(["list-sa", "list-policy"]) {
            if !charon.register(event, self.settings.answer_within).await? {
                warn!("this charon has no event `{event}`; Esplane goes on without");
            }
        }
        Ok(())
    }

    async fn snapshot(&self, charon: &mut Channel) -> Step<()> {
        let mut facts = Facts::new(&self.settings.names);
        let mut sas = Vec::new();
        let limit = self.settings.answer_within;
        charon
            .stream("list-sas", Message::new(), "list-sa", limit, |message| {
                sas.extend(facts.list_sa(&message));
            })
            .await?;
        report(&facts);
        self.tell(ViciEvent::Snapshot(sas)).await
    }

    async fn look_for_traps(
        &self,
        charon: &mut Channel,
        known: &mut Option<Vec<Trap>>,
    ) -> Step<()> {
        let mut facts = Facts::new(&self.settings.names);
        let mut traps = Vec::new();
        let limit = self.settings.answer_within;
        let only_traps = Message::new().with("trap", "yes");
        charon
            .stream(
                "list-policies",
                only_traps,
                "list-policy",
                limit,
                |message| {
                    traps.extend(facts.list_policy(&message));
                },
            )
            .await?;
        if known.as_ref() == Some(&traps) {
            return Ok(());
        }
        report(&facts);
        *known = Some(traps.clone());
        self.tell(ViciEvent::Traps(traps)).await
    }

    /// True if something in it could not be read: then only a dump tells what it said.
    async fn tell_event(&self, name: &str, message: &Message) -> Step<bool> {
        let mut facts = Facts::new(&self.settings.names);
        if let Some(event) = facts.event(name, message) {
            self.tell(event).await?;
        }
        report(&facts);
        Ok(!facts.problems.is_empty())
    }

    /// charon's events wait in charon while our reader is slow, so that is borne for a limited time only.
    async fn tell(&self, event: ViciEvent) -> Step<()> {
        let limit = self.settings.answer_within;
        match timeout(limit, self.events.send(event)).await {
            Ok(sent) => sent.map_err(|_| End::Unwanted),
            Err(_) => Err(ViciError::SlowReader { limit }.into()),
        }
    }

    async fn carry_out(&mut self, charon: &mut Channel, request: ViciRequest) -> Step<()> {
        let (command, arguments) = match request {
            ViciRequest::Initiate { ike, child } => return self.initiate(ike, child).await,
            ViciRequest::RekeyChild { unique_id } => {
                ("rekey", Message::new().with("child-id", unique_id))
            }
            // -1: not waiting for the peer.
            ViciRequest::TerminateChild { unique_id } => {
                let arguments = Message::new().with("child-id", unique_id);
                ("terminate", arguments.with("timeout", -1))
            }
        };
        let limit = self.settings.answer_within;
        match charon.request(command, arguments, limit).await {
            Ok(_) => Ok(()),
            // The SA went meanwhile; an event says so.
            Err(error @ ViciError::Refused { .. }) => {
                warn!("{error}");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn initiate(&mut self, ike: String, child: String) -> Step<()> {
        if self.initiates.len() >= INITIATES_WAITING_MAX {
            warn!("{ike}/{child} is not initiated: {INITIATES_WAITING_MAX} others wait already");
            let done = false;
            return self
                .tell(ViciEvent::InitiateEnded { ike, child, done })
                .await;
        }
        let (settings, permits) = (self.settings.clone(), self.permits.clone());
        self.initiates.spawn(async move {
            let _permit = permits.acquire().await;
            let outcome = initiate(&settings, &ike, &child).await;
            if let Err(error) = &outcome {
                warn!("{ike}/{child} is not up: {error}");
            }
            let done = outcome.is_ok();
            ViciEvent::InitiateEnded { ike, child, done }
        });
        Ok(())
    }

    /// Waits before the next attempt; requests find nobody meanwhile.
    async fn idle(&mut self, wait: Duration) -> Step<()> {
        let mut over = std::pin::pin!(sleep(wait));
        loop {
            let request = tokio::select! {
                () = &mut over => return Ok(()),
                request = self.requests.recv() => request.ok_or(End::Unwanted)?,
            };
            match request {
                ViciRequest::Initiate { ike, child } => {
                    let ended = ViciEvent::InitiateEnded {
                        ike,
                        child,
                        done: false,
                    };
                    self.events.send(ended).await.map_err(|_| End::Unwanted)?;
                }
                request => debug!("charon is away: {request:?} is dropped"),
            }
        }
    }
}

async fn initiate(settings: &ViciSettings, ike: &str, child: &str) -> Result<(), ViciError> {
    let limit = settings.initiate_within;
    let mut charon = Channel::open(&settings.socket).await?;
    let arguments = Message::new()
        .with("ike", ike)
        .with("child", child)
        .with("timeout", limit.as_millis());
    // charon's own limit comes first, so that it can say what it waited for.
    let limit = limit + settings.answer_within;
    charon.request("initiate", arguments, limit).await.map(drop)
}

fn report(facts: &Facts<'_>) {
    for problem in &facts.problems {
        warn!("{problem}");
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
