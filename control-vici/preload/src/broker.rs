//! Between charon's sockets and Esplane: carries messages, keeps what is to outlive Esplane, and has an
//! answer for charon while Esplane is away.
//!
//! | while Esplane is away | charon is told |
//! |---|---|
//! | for less than `PATIENCE` | nothing; the request waits, and is asked when Esplane is back |
//! | longer, something is to be forgotten (DELSA, DELPOLICY …) | done; Esplane hears of it later |
//! | longer, anything else | "Network is down", as by a kernel that cannot |

use crate::frame::{self, Kind};
use std::{
    collections::{BTreeMap, VecDeque},
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Read, Write},
    os::fd::{AsRawFd, IntoRawFd, RawFd},
    os::unix::net::{UnixDatagram, UnixStream},
    path::PathBuf,
    sync::{
        Mutex, OnceLock, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// How long a request waits for an Esplane that is away.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often an Esplane that is away is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long Esplane may take to take a message, before the connection is made anew.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// What may wait to be forgotten.
const FORGOTTEN_MAX: usize = 1 << 16;

const DEFAULT_SOCKET: &str = "/run/esplane/xfrm.sock";

/// `ENETDOWN`.
const NETWORK_IS_DOWN: i32 = 100;

/// Bytes with keys in them: wiped when dropped.
struct Secret(Vec<u8>);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Nobody reads them again, which the compiler must not notice.
        std::hint::black_box(&self.0);
    }
}

/// One of charon's sockets.
struct Ours {
    fd: RawFd,
    identity: (u64, u64),
    number: u64,
    groups: u32,
}

static OURS: Mutex<Vec<Ours>> = Mutex::new(Vec::new());

fn ours() -> std::sync::MutexGuard<'static, Vec<Ours>> {
    OURS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the broker is told.
enum Told {
    /// A socket of charon's, and where what is for it goes.
    Opened(u64, Sender<Secret>),
    Subscribed(u64, u32),
    Asked(u64, Secret),
    Frame(u64, Kind, u64, Secret),
    Ended(u64),
}

fn broker() -> Option<&'static Sender<Told>> {
    static BROKER: OnceLock<Option<Sender<Told>>> = OnceLock::new();
    BROKER
        .get_or_init(|| {
            let (tell, told) = channel();
            let teller = tell.clone();
            let run = move || Broker::new(teller).run(&told);
            crate::without_signals(|| spawn(run)).ok().map(|()| tell)
        })
        .as_ref()
}

fn spawn(run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = thread::Builder::new()
        .name("esplane".to_owned())
        .stack_size(256 << 10);
    builder.spawn(run).map(drop)
}

/// A socket for charon.
pub fn open() -> io::Result<RawFd> {
    let broker = broker().ok_or(io::ErrorKind::OutOfMemory)?;
    let (theirs, mine) = UnixDatagram::pair()?;
    let identity = crate::identity(theirs.as_raw_fd()).ok_or(io::ErrorKind::Other)?;
    let (answer, answers) = channel::<Secret>();
    let listening = mine.try_clone()?;
    let mut sockets = ours();
    let number = sockets
        .iter()
        .map(|socket| socket.number)
        .max()
        .unwrap_or(0)
        + 1;
    crate::without_signals(|| {
        spawn(move || carry_answers(&mine, &answers))?;
        spawn(move || carry_requests(number, &listening, broker))
    })?;
    let fd = theirs.into_raw_fd();
    // A number that was closed and is given again belongs to the new socket.
    sockets.retain(|socket| socket.fd != fd);
    sockets.push(Ours {
        fd,
        identity,
        number,
        groups: 0,
    });
    let _ = broker.send(Told::Opened(number, answer));
    Ok(fd)
}

/// Whether it is a socket that [`open`] gave, and still the same one.
pub fn is_ours(fd: RawFd) -> bool {
    let known = ours()
        .iter()
        .find(|socket| socket.fd == fd)
        .map(|socket| socket.identity);
    known.is_some() && known == crate::identity(fd)
}

/// Adds to what it is told of; a bit for each group.
pub fn subscribe(fd: RawFd, groups: u32) {
    let mut sockets = ours();
    if let Some(socket) = sockets.iter_mut().find(|socket| socket.fd == fd) {
        socket.groups |= groups;
        if let Some(broker) = broker() {
            let _ = broker.send(Told::Subscribed(socket.number, socket.groups));
        }
    }
}

fn carry_requests(number: u64, from_charon: &UnixDatagram, broker: &Sender<Told>) {
    let mut message = Secret(vec![0; frame::MAX_BYTES - frame::HEAD_BYTES]);
    while let Ok(bytes) = from_charon.recv(&mut message.0) {
        let request = Secret(message.0[..bytes].to_vec());
        message.0[..bytes].fill(0);
        if broker.send(Told::Asked(number, request)).is_err() {
            return;
        }
    }
}

fn carry_answers(to_charon: &UnixDatagram, answers: &Receiver<Secret>) {
    for answer in answers {
        // Fails where charon has closed it: nobody to be told.
        let _ = to_charon.send(&answer.0);
    }
}

/// A request that Esplane has not answered.
struct Waiting {
    socket: u64,
    request: Secret,
    /// charon has its answer; Esplane is still to hear of it.
    answered: bool,
}

struct Broker {
    path: PathBuf,
    instance: u64,
    tell: Sender<Told>,
    sockets: BTreeMap<u64, (u32, Sender<Secret>)>,
    kept: BTreeMap<u64, Secret>,
    waiting: VecDeque<Waiting>,
    connection: Option<UnixStream>,
    /// Tells this connection's words from those of an earlier one.
    connections: u64,
    away_since: Instant,
}

impl Broker {
    fn new(tell: Sender<Told>) -> Self {
        let path = std::env::var_os("ESPLANE_XFRM_SOCKET")
            .map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from);
        Self {
            path,
            // Random: its keys are.
            instance: RandomState::new().build_hasher().finish() | 1,
            tell,
            sockets: BTreeMap::new(),
            kept: BTreeMap::new(),
            waiting: VecDeque::new(),
            connection: None,
            connections: 0,
            away_since: Instant::now(),
        }
    }

    fn run(mut self, told: &Receiver<Told>) {
        loop {
            let looking = self.connection.is_none() && !self.sockets.is_empty();
            let next = match looking {
                true => told.recv_timeout(LOOK_EVERY),
                false => told.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match next {
                Ok(told) => self.hear(told),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.connection.is_none() && !self.sockets.is_empty() {
                self.look();
            }
            if self.connection.is_none() {
                self.answer_in_its_place();
            }
        }
    }

    fn hear(&mut self, told: Told) {
        match told {
            Told::Opened(number, answer) => {
                self.sockets.insert(number, (0, answer));
                self.say(Kind::Join, number, &0u32.to_ne_bytes());
            }
            Told::Subscribed(number, groups) => {
                if let Some(socket) = self.sockets.get_mut(&number) {
                    socket.0 = groups;
                }
                self.say(Kind::Join, number, &groups.to_ne_bytes());
            }
            Told::Asked(socket, request) => {
                self.say(Kind::Request, socket, &request.0);
                self.waiting.push_back(Waiting {
                    socket,
                    request,
                    answered: false,
                });
            }
            Told::Frame(connection, kind, id, payload) if connection == self.connections => {
                self.obey(kind, id, payload)
            }
            Told::Ended(connection) if connection == self.connections => self.lose(),
            Told::Frame(..) | Told::Ended(_) => {}
        }
    }

    fn obey(&mut self, kind: Kind, id: u64, payload: Secret) {
        match kind {
            Kind::Keep => {
                self.kept.insert(id, payload);
            }
            Kind::Drop => {
                self.kept.remove(&id);
            }
            Kind::Sync => self.say(Kind::Kept, id, &[]),
            Kind::Answer => self.answer(id, payload),
            // Ours to say.
            Kind::Hello | Kind::Join | Kind::State | Kind::Ready | Kind::Request | Kind::Kept => {
                self.lose()
            }
        }
    }

    fn answer(&mut self, socket: u64, message: Secret) {
        let of = |waiting: &&mut Waiting| {
            waiting.socket == socket && sequence(&waiting.request.0) == sequence(&message.0)
        };
        let is_last = kind(&message.0) == NLMSG_DONE || flags(&message.0) & NLM_F_MULTI == 0;
        let asked = self.waiting.iter_mut().find(of);
        let told_before = asked.is_some_and(|waiting| waiting.answered);
        if is_last {
            let same = |waiting: &Waiting| {
                waiting.socket == socket && sequence(&waiting.request.0) == sequence(&message.0)
            };
            self.waiting.retain(|waiting| !same(waiting));
        }
        if !told_before {
            self.tell_charon(socket, message);
        }
    }

    fn tell_charon(&self, socket: u64, message: Secret) {
        if let Some((_, answers)) = self.sockets.get(&socket) {
            let _ = answers.send(message);
        }
    }

    // --- the connection

    fn look(&mut self) {
        let Ok(stream) = UnixStream::connect(&self.path) else {
            return;
        };
        let Ok(reading) = stream.try_clone() else {
            return;
        };
        if stream.set_write_timeout(Some(WRITE_WITHIN)).is_err() {
            return;
        }
        self.connections += 1;
        let (connection, tell) = (self.connections, self.tell.clone());
        // This thread has every signal blocked already, and so will that one.
        if spawn(move || listen(connection, reading, &tell)).is_ok() {
            self.connection = Some(stream);
            self.introduce();
        }
    }

    /// Who we are, what is kept, and what has not been answered.
    fn introduce(&mut self) {
        let mut all = Secret(Vec::with_capacity(1 << 16));
        frame::write(
            &mut all.0,
            Kind::Hello,
            frame::VERSION,
            &self.instance.to_ne_bytes(),
        );
        for (number, (groups, _)) in &self.sockets {
            frame::write(&mut all.0, Kind::Join, *number, &groups.to_ne_bytes());
        }
        self.write(&all.0);
        let kept = std::mem::take(&mut self.kept);
        for (id, state) in &kept {
            self.say(Kind::State, *id, &state.0);
        }
        self.kept = kept;
        self.say(Kind::Ready, 0, &[]);
        let waiting = std::mem::take(&mut self.waiting);
        for asked in &waiting {
            self.say(Kind::Request, asked.socket, &asked.request.0);
        }
        self.waiting = waiting;
    }

    fn say(&mut self, kind: Kind, id: u64, payload: &[u8]) {
        if self.connection.is_none() {
            return;
        }
        let mut whole = Secret(Vec::with_capacity(frame::HEAD_BYTES + payload.len()));
        frame::write(&mut whole.0, kind, id, payload);
        self.write(&whole.0);
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(connection) = &mut self.connection
            && connection.write_all(bytes).is_err()
        {
            self.lose();
        }
    }

    fn lose(&mut self) {
        if let Some(connection) = self.connection.take() {
            let _ = connection.shutdown(std::net::Shutdown::Both);
            self.away_since = Instant::now();
            // What the lost one still says is not heard.
            self.connections += 1;
        }
    }

    fn answer_in_its_place(&mut self) {
        if self.away_since.elapsed() < PATIENCE {
            return;
        }
        let mut answers = Vec::new();
        self.waiting.retain_mut(|asked| {
            if asked.answered {
                return true;
            }
            let forget = matches!(
                kind(&asked.request.0),
                DELSA | DELPOLICY | FLUSHSA | FLUSHPOLICY
            );
            let errno = if forget { 0 } else { NETWORK_IS_DOWN };
            answers.push((asked.socket, outcome(&asked.request.0, errno)));
            asked.answered = true;
            forget
        });
        while self.waiting.len() > FORGOTTEN_MAX {
            self.waiting.pop_front();
        }
        for (socket, answer) in answers {
            self.tell_charon(socket, answer);
        }
    }
}

fn listen(connection: u64, mut from: UnixStream, tell: &Sender<Told>) {
    let mut stream = Secret(vec![0; 2 * frame::MAX_BYTES]);
    let mut filled = 0;
    loop {
        let got = match from.read(&mut stream.0[filled..]) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        filled += got;
        let mut taken = 0;
        // One that cannot be read: another program. It is looked for anew.
        let bad = loop {
            match frame::read(&stream.0[taken..filled]) {
                Ok(Some(frame)) => {
                    taken += frame.bytes;
                    let payload = Secret(frame.payload.to_vec());
                    if tell
                        .send(Told::Frame(connection, frame.kind, frame.id, payload))
                        .is_err()
                    {
                        return;
                    }
                }
                Ok(None) => break false,
                Err(frame::BadFrame) => break true,
            }
        };
        if bad {
            break;
        }
        stream.0.copy_within(taken..filled, 0);
        stream.0[filled - taken..filled].fill(0);
        filled -= taken;
    }
    let _ = tell.send(Told::Ended(connection));
}

// --- `struct nlmsghdr`: length, type, flags, sequence, port

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_MULTI: u16 = 2;
const DELSA: u16 = 0x11;
const DELPOLICY: u16 = 0x14;
const FLUSHSA: u16 = 0x1c;
const FLUSHPOLICY: u16 = 0x1d;

fn u16_at(message: &[u8], at: usize) -> u16 {
    message
        .get(at..at + 2)
        .map_or(0, |bytes| u16::from_ne_bytes([bytes[0], bytes[1]]))
}

fn kind(message: &[u8]) -> u16 {
    u16_at(message, 4)
}

fn flags(message: &[u8]) -> u16 {
    u16_at(message, 6)
}

fn sequence(message: &[u8]) -> [u8; 4] {
    let mut sequence = [0; 4];
    if let Some(bytes) = message.get(8..12) {
        sequence.copy_from_slice(bytes);
    }
    sequence
}

/// `NLMSG_ERROR` to a request: its outcome, then its header.
fn outcome(request: &[u8], errno: i32) -> Secret {
    let header = request.get(..16).unwrap_or(&[0; 16]);
    let mut answer = Vec::with_capacity(36);
    answer.extend_from_slice(&36u32.to_ne_bytes());
    answer.extend_from_slice(&NLMSG_ERROR.to_ne_bytes());
    answer.extend_from_slice(&[0; 2]);
    answer.extend_from_slice(&header[8..16]);
    answer.extend_from_slice(&(-errno).to_ne_bytes());
    answer.extend_from_slice(header);
    Secret(answer)
}
