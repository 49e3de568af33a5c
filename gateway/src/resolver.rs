//! Endpoints that are DNS names: looked up in the background, again and again.

use crate::config::{Config, Endpoint};
use std::{net::SocketAddr, time::Duration};
use tokio::{
    net::lookup_host,
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::warn;

/// How long one look-up may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The first pause after a failure; doubled up to [`PAUSE`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The pause between look-ups.
const PAUSE: Duration = Duration::from_secs(60);

/// What DNS says of a peer.
#[derive(Debug)]
pub struct Resolved {
    /// The peer's name in the configuration.
    pub peer: String,
    /// Where it is.
    pub endpoint: SocketAddr,
}

/// One background task for each peer that has a DNS name.
pub struct Resolver {
    tasks: JoinSet<()>,
    sender: mpsc::Sender<Resolved>,
    receiver: mpsc::Receiver<Resolved>,
}

impl Resolver {
    /// Starts to look up the names in `config`.
    pub fn start(config: &Config) -> Self {
        let (sender, receiver) = mpsc::channel(16);
        let mut resolver = Self {
            tasks: JoinSet::new(),
            sender,
            receiver,
        };
        resolver.follow(config);
        resolver
    }

    /// Looks up the names in `config` from now on, and no others.
    pub fn follow(&mut self, config: &Config) {
        self.tasks.abort_all();
        let ipv4_only = config.listen.is_ipv4();
        for peer in &config.peers {
            if let Some(Endpoint::Name { host, port }) = &peer.endpoint {
                let (peer, host, port) = (peer.name.clone(), host.clone(), *port);
                self.tasks.spawn(look_up_forever(
                    peer,
                    host,
                    port,
                    ipv4_only,
                    self.sender.clone(),
                ));
            }
        }
    }

    /// The next answer.
    pub async fn next(&mut self) -> Resolved {
        match self.receiver.recv().await {
            Some(resolved) => resolved,
            // Cannot happen: we hold a sender. Never wake anybody for it.
            None => std::future::pending().await,
        }
    }
}

async fn look_up_forever(
    peer: String,
    host: String,
    port: u16,
    ipv4_only: bool,
    answers: mpsc::Sender<Resolved>,
) {
    let mut retry = FIRST_RETRY;
    loop {
        let found = match timeout(PATIENCE, lookup_host((host.as_str(), port))).await {
            Ok(Ok(mut addresses)) => addresses
                .find(|address| address.is_ipv4() || !ipv4_only)
                .ok_or_else(|| "it has no address of a family we listen on".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        };
        let pause = match found {
            Ok(endpoint) => {
                retry = FIRST_RETRY;
                let peer = peer.clone();
                if answers.send(Resolved { peer, endpoint }).await.is_err() {
                    return;
                }
                PAUSE
            }
            Err(problem) => {
                warn!(
                    "peer `{peer}`: cannot look up `{host}`: {problem}; trying again in {} s",
                    retry.as_secs()
                );
                let pause = retry;
                retry = (retry * 2).min(PAUSE);
                pause
            }
        };
        sleep(pause).await;
    }
}
