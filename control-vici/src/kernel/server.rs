//! The unix socket on which charon's preload library finds Esplane.

use super::{ClientId, Kernel, KernelNotice, KernelOutput, Secret, frame};
use crate::xfrm::{XfrmEvent, XfrmRequest};
use esplane_api::Now;
use frame::Kind;
use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
};
use zeroize::Zeroizing;

/// Where the library looks for Esplane unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/esplane/xfrm.sock";
/// Frames that wait for a client to read them; more is a client that has stopped.
const QUEUE_FRAMES: usize = 1 << 18;
/// Connections at once: charon's, and programs that look.
const CLIENTS_MAX: usize = 16;

/// Why charon cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Somebody serves it already.
    #[error("{}: another esplane serves this socket; stop it, or give each its own", .0.display())]
    InUse(PathBuf),
    /// The socket cannot be made.
    #[error("{}: cannot {doing}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Plays the kernel's part on `socket` until `requests` is closed or `events` has no reader. Takes the
/// place of [`crate::xfrm::client::run`]; the first event comes once charon is there.
///
/// `clock` says what time it is, `random` chooses SPIs.
pub async fn run(
    socket: &Path,
    requests: &mut mpsc::Receiver<XfrmRequest>,
    events: &mpsc::Sender<XfrmEvent>,
    clock: impl Fn() -> Now,
    random: Box<dyn FnMut() -> u32 + Send>,
) -> Result<(), ServerError> {
    let socket = Socket::bind(socket).await?;
    let mut server = Server::new(Kernel::new(random));
    loop {
        let due = server.kernel.poll_timeout();
        let sleep = due.map(|at| at.saturating_sub(clock().monotonic));
        tokio::select! {
            room = events.reserve(), if !server.events.is_empty() => match (room, server.events.pop_front()) {
                (Ok(room), Some(event)) => room.send(event),
                _ => return Ok(()),
            },
            request = requests.recv() => match request {
                Some(request) => server.kernel.handle_request(clock(), &request),
                None => return Ok(()),
            },
            accepted = socket.listener.accept() => match accepted {
                Ok((stream, _)) => server.accept(stream, socket.owner),
                // Out of descriptors, mostly: those who try again will be heard.
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection of charon's");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(said) = server.said.recv() => server.hear(clock(), said),
            () = tokio::time::sleep(sleep.unwrap_or_default()), if sleep.is_some() => {
                server.kernel.handle_timeout(clock());
            }
        }
        server.carry_out();
    }
}

/// The listening socket; its file goes with it.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
    owner: u32,
}

impl Socket {
    async fn bind(path: &Path) -> Result<Self, ServerError> {
        let failed = |doing| {
            let path = path.to_owned();
            move |source| ServerError::Io {
                doing,
                path,
                source,
            }
        };
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed("make the directory of this socket"))?;
        }
        match UnixStream::connect(path).await {
            Ok(_) => return Err(ServerError::InUse(path.to_owned())),
            // What a killed Esplane has left.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed("remove the old socket"))?;
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(failed("make this socket"))?;
        // Until then nobody is heard either: whoever connects is asked for its user.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(failed("close this socket to others"))?;
        let owner = fs::metadata(path)
            .map_err(failed("look at this socket"))?
            .uid();
        Ok(Self {
            listener,
            path: path.to_owned(),
            owner,
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// What a connection says.
struct Said {
    client: ClientId,
    /// `None`: it has ended.
    frame: Option<(Kind, u64, Zeroizing<Vec<u8>>)>,
}

struct Server {
    kernel: Kernel,
    writers: BTreeMap<ClientId, mpsc::Sender<Secret>>,
    tasks: JoinSet<()>,
    said: mpsc::Receiver<Said>,
    say: mpsc::Sender<Said>,
    events: VecDeque<XfrmEvent>,
    last_client: u64,
}

impl Server {
    fn new(kernel: Kernel) -> Self {
        let (say, said) = mpsc::channel(64);
        let (writers, tasks, events) = (BTreeMap::new(), JoinSet::new(), VecDeque::new());
        Self {
            kernel,
            writers,
            tasks,
            said,
            say,
            events,
            last_client: 0,
        }
    }

    fn accept(&mut self, stream: UnixStream, owner: u32) {
        while self.tasks.try_join_next().is_some() {}
        let user = stream.peer_cred().map(|credentials| credentials.uid());
        if !matches!(user, Ok(user) if user == 0 || user == owner)
            || self.writers.len() >= CLIENTS_MAX
        {
            tracing::warn!(
                ?user,
                "a connection is refused: keys are told to root and to our own user only"
            );
            return;
        }
        self.last_client += 1;
        let client = ClientId(self.last_client);
        let (read, write) = stream.into_split();
        let (queue, queued) = mpsc::channel(QUEUE_FRAMES);
        self.tasks.spawn(listen(client, read, self.say.clone()));
        self.tasks.spawn(speak(write, queued));
        self.writers.insert(client, queue);
        self.kernel.handle_connected(client);
    }

    fn hear(&mut self, now: Now, said: Said) {
        if !self.writers.contains_key(&said.client) {
            return; // ended by us meanwhile
        }
        let Some((kind, id, payload)) = said.frame else {
            return self.end(said.client);
        };
        if let Err(error) = self
            .kernel
            .handle_frame(now, said.client, kind, id, &payload)
        {
            tracing::warn!(%error, "a connection to the socket for charon is ended");
            self.end(said.client);
        }
    }

    fn end(&mut self, client: ClientId) {
        // Its writer ends with its queue, and the reader with the connection.
        self.writers.remove(&client);
        self.kernel.handle_disconnected(client);
    }

    fn carry_out(&mut self) {
        while let Some(output) = self.kernel.poll_output() {
            match output {
                KernelOutput::Event(event) => self.events.push_back(event),
                KernelOutput::Send { client, frame } => {
                    if self
                        .writers
                        .get(&client)
                        .is_some_and(|queue| queue.try_send(frame).is_err())
                    {
                        self.end(client);
                    }
                }
                KernelOutput::Notice(notice) => match notice {
                    KernelNotice::Connected { .. } => tracing::info!("{notice}"),
                    KernelNotice::Disconnected | KernelNotice::Refused { .. } => {
                        tracing::warn!("{notice}")
                    }
                },
            }
        }
    }
}

async fn listen(client: ClientId, mut read: OwnedReadHalf, say: mpsc::Sender<Said>) {
    let mut stream = Zeroizing::new(Vec::with_capacity(2 * frame::MAX_BYTES));
    let mut bad = false;
    // There is always room for one whole frame, so the buffer never grows and leaves no key behind.
    while !bad && matches!(read.read_buf(&mut *stream).await, Ok(bytes) if bytes > 0) {
        let mut taken = 0;
        loop {
            let frame = match frame::read(&stream[taken..]) {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => {
                    bad = true;
                    break;
                }
            };
            taken += frame.bytes;
            let payload = Zeroizing::new(frame.payload.to_vec());
            let frame = Some((frame.kind, frame.id, payload));
            if say.send(Said { client, frame }).await.is_err() {
                return;
            }
        }
        let left = stream.len() - taken;
        stream.copy_within(taken.., 0);
        stream[left..].fill(0);
        stream.truncate(left);
    }
    let _ = say
        .send(Said {
            client,
            frame: None,
        })
        .await;
}

async fn speak(mut write: OwnedWriteHalf, mut queued: mpsc::Receiver<Secret>) {
    while let Some(frame) = queued.recv().await {
        if write.write_all(&frame.0).await.is_err() {
            return;
        }
    }
    let _ = write.shutdown().await;
}
