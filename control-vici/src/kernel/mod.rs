//! Mode B: Esplane plays the kernel's part of NETLINK_XFRM, for hosts whose kernel has no ESP.
//!
//! ```text
//!   charon                                              Esplane
//!   ┌──────────────────────────────────┐                ┌─────────────────────────────────────┐
//!   │ kernel-netlink ── fd ─ esplane-  │◀─unix socket──▶│ server.rs ─ Kernel (pure) ──XfrmEvent─▶ importer
//!   │                        preload   │                │             ├ sad.rs   ◀─XfrmRequest─ │
//!   │                        keeps what│                │             └ spd.rs                  │
//!   │                        Esplane   │                └─────────────────────────────────────┘
//!   │                        gives it  │
//!   └──────────────────────────────────┘
//! ```
//!
//! What must outlive Esplane lives where charon lives, as the kernel's database would: each SA and
//! policy is given to the preload library to keep, as the very netlink message that describes it, and
//! comes back when a restarted Esplane is connected. So a crash of Esplane loses no SA, and the end of
//! charon leaves no key behind.
//!
//! Numbers are safe likewise: `Store` is answered only once the library has said that it keeps the
//! number. No SA goes on from a lower number than has been used: the one that is kept is never lower.
//!
//! The importer is told the same events as by a real kernel, and asks the same.

mod asked;
mod policies;
mod sad;
pub mod server;
mod spd;
#[cfg(test)]
mod tests;

/// The frames, in the library's own words.
#[path = "../../preload/src/frame.rs"]
pub mod frame;

use crate::xfrm::wire::{Message, WireError, array_at, group, kind, messages, u32_at};
use crate::xfrm::{Progress, message};
use crate::xfrm::{SaKey, XfrmEvent, XfrmReply, XfrmRequest};
use esplane_api::Now;
use frame::Kind;
use sad::{SaRecord, Sad};
use spd::Spd;
use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};
use zeroize::Zeroizing;

/// How long a reserved SPI waits for its key. charon asks the kernel for as much (`xfrm_acq_expires`).
const LARVAL_SECONDS: u64 = 165;

/// One connection to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u64);

/// What is to be done.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "a few of them each negotiation")]
pub enum KernelOutput {
    /// Send it this frame.
    Send {
        /// To whom.
        client: ClientId,
        /// The frame; there may be keys in it.
        frame: Secret,
    },
    /// Tell the importer.
    Event(XfrmEvent),
    /// Tell the operator.
    Notice(KernelNotice),
}

/// Bytes that are wiped, and not printed.
pub struct Secret(pub Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[redacted; {} bytes]", self.0.len())
    }
}

/// What an operator wants to know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelNotice {
    /// charon is there.
    #[error("charon is connected, with {sas} SAs from before")]
    Connected {
        /// How many SAs it kept for us.
        sas: usize,
    },
    /// charon is gone.
    #[error(
        "charon's connection has ended; its SAs go on as they are, until their reserved numbers or their lifetimes end"
    )]
    Disconnected,
    /// charon wants what Esplane does not have.
    #[error(
        "charon wants an SA with {what}, which Esplane does not have; set esp_proposals of the child to aes256gcm16, aes128gcm16 or chacha20poly1305, and mode = tunnel"
    )]
    Refused {
        /// What, by the kernel's names.
        what: String,
    },
}

/// Why a client is no client: the server ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// Another version of the library.
    #[error("the preload library speaks version {0}, this Esplane version {ours}; install both from one release, and restart charon", ours = frame::VERSION)]
    Version(u64),
    /// It says what no client says then.
    #[error("it does not speak as the preload library does")]
    Protocol,
}

/// `errno` of an answer; 0 is done.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Errno(i32);

impl Errno {
    const DONE: Self = Self(0);
    const NOENT: Self = Self(2);
    const SRCH: Self = Self(3);
    const NOBUFS: Self = Self(105);
    const EXIST: Self = Self(17);
    const INVAL: Self = Self(22);
    const NOSYS: Self = Self(38);
    const OPNOTSUPP: Self = Self(95);
}

impl From<WireError> for Errno {
    fn from(_: WireError) -> Self {
        Self::INVAL
    }
}

/// One process with the library in it.
struct Client {
    /// Its name among all that ever connect; 0 before it has said hello.
    instance: u64,
    /// Whether all that it keeps has come.
    ready: bool,
    /// Its sockets and what each subscribes to, a bit for each group.
    sockets: BTreeMap<u64, u32>,
}

/// A request's reply, in its turn.
struct Pending {
    reply: XfrmReply,
    /// What must be kept first.
    awaits: Option<(ClientId, u64)>,
}

/// The kernel's part.
pub struct Kernel {
    clients: BTreeMap<ClientId, Client>,
    sas: Sad,
    policies: Spd,
    random: Box<dyn FnMut() -> u32 + Send>,
    last_id: u64,
    pending: VecDeque<Pending>,
    outputs: VecDeque<KernelOutput>,
}

impl Kernel {
    /// Without any SA. `random` chooses SPIs.
    pub fn new(random: Box<dyn FnMut() -> u32 + Send>) -> Self {
        Self {
            clients: BTreeMap::new(),
            sas: Sad::default(),
            policies: Spd::default(),
            random,
            last_id: 0,
            pending: VecDeque::new(),
            outputs: VecDeque::new(),
        }
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<KernelOutput> {
        if let Some(pending) = self.pending.front()
            && pending.awaits.is_none()
            && let Some(pending) = self.pending.pop_front()
        {
            let event = XfrmEvent::Reply(pending.reply);
            self.outputs.push_back(KernelOutput::Event(event));
        }
        self.outputs.pop_front()
    }

    /// Somebody has connected.
    pub fn handle_connected(&mut self, client: ClientId) {
        let unknown = Client {
            instance: 0,
            ready: false,
            sockets: BTreeMap::new(),
        };
        self.clients.insert(client, unknown);
    }

    /// Its connection has ended.
    pub fn handle_disconnected(&mut self, client: ClientId) {
        // What it has not said to keep, it may not keep.
        for pending in &mut self.pending {
            if pending.awaits.is_some_and(|(from, _)| from == client) {
                (pending.awaits, pending.reply.done) = (None, false);
            }
        }
        let gone = self.clients.remove(&client);
        if gone.is_some_and(|gone| gone.listens(group::ACQUIRE)) {
            let notice = KernelOutput::Notice(KernelNotice::Disconnected);
            self.outputs.push_back(notice);
            // The next charon may have come before this one's end was seen. A process that lives has
            // kept what is its own, and brings it again.
            if self
                .clients
                .values()
                .any(|next| next.ready && next.listens(group::ACQUIRE))
            {
                self.greet();
            }
        }
    }

    /// A frame of a client's.
    pub fn handle_frame(
        &mut self,
        now: Now,
        from: ClientId,
        kind: Kind,
        id: u64,
        payload: &[u8],
    ) -> Result<(), ClientError> {
        let client = self.clients.get_mut(&from).ok_or(ClientError::Protocol)?;
        match kind {
            Kind::Hello if id != frame::VERSION => return Err(ClientError::Version(id)),
            Kind::Hello if payload.len() == 8 => {
                client.instance = u64::from_ne_bytes(array_at(payload, 0))
            }
            _ if client.instance == 0 => return Err(ClientError::Protocol),
            Kind::Join if payload.len() == 4 => {
                let before = client.listens(group::ACQUIRE);
                client.sockets.insert(id, u32_at(payload, 0));
                if client.ready && !before && client.listens(group::ACQUIRE) {
                    self.greet();
                }
            }
            Kind::State if !client.ready => {
                let instance = client.instance;
                self.take_back(now, from, instance, id, payload);
            }
            Kind::Ready => self.ready(from),
            Kind::Request if client.ready => self.serve(now, from, id, payload),
            Kind::Kept => {
                for pending in &mut self.pending {
                    if pending.awaits == Some((from, id)) {
                        pending.awaits = None;
                    }
                }
            }
            _ => return Err(ClientError::Protocol),
        }
        Ok(())
    }

    /// A request of the importer's.
    pub fn handle_request(&mut self, now: Now, request: &XfrmRequest) {
        let (key, awaits) = match *request {
            XfrmRequest::Store { key, progress } => (key, self.store(now, &key, &progress)),
            XfrmRequest::Expire { key, hard } => (key, self.expire(&key, hard).then_some(None)),
            XfrmRequest::PeerMoved { key, remote } => {
                let moved = self.sas.get(&key).and_then(SaRecord::told);
                let moved = moved.and_then(|sa| message::mapping(&sa, remote));
                if let Some(message) = &moved {
                    self.broadcast(group::MAPPING, message);
                }
                (key, moved.is_some().then_some(None))
            }
            XfrmRequest::Acquire {
                reqid,
                ends,
                selectors,
            } => {
                let message = message::acquire(0, reqid, ends, &selectors);
                self.broadcast(group::ACQUIRE, &message);
                return;
            }
        };
        let done = awaits.is_some();
        let stored = self
            .sas
            .get(&key)
            .and_then(|record| record.sequence_sent().ok());
        let wanted =
            matches!(request, XfrmRequest::Store { progress, .. } if progress.sent.is_some());
        let sequence_sent = stored.filter(|_| done && wanted);
        self.pending.push_back(Pending {
            reply: XfrmReply {
                key,
                done,
                sequence_sent,
            },
            awaits: awaits.flatten(),
        });
    }

    /// Lifetimes end.
    pub fn handle_timeout(&mut self, now: Now) {
        let mut due = Vec::new();
        for (key, record) in self.sas.iter_mut() {
            let past = |at: Option<Duration>| at.is_some_and(|at| at <= now.monotonic);
            if past(record.hard_at) {
                due.push((*key, true));
            } else if past(record.soft_at) {
                record.soft_at = None;
                due.push((*key, false));
            }
        }
        for (key, hard) in due {
            match self.sas.get(&key).is_some_and(SaRecord::is_larval) {
                true => self.forget(&key),
                false => {
                    self.expire(&key, hard);
                }
            }
        }
    }

    /// When [`Self::handle_timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.sas
            .iter()
            .flat_map(|(_, record)| [record.soft_at, record.hard_at])
            .flatten()
            .min()
    }

    // --- what a client keeps

    fn take_back(&mut self, now: Now, from: ClientId, owner: u64, id: u64, kept: &[u8]) {
        self.last_id = self.last_id.max(id);
        let taken = match messages(kept).next() {
            Some(Ok(one)) => self.take_message(now, owner, id, &one),
            _ => Err(Errno::INVAL),
        };
        if taken.is_err() {
            self.send(from, Kind::Drop, id, &[]);
        }
    }

    fn take_message(
        &mut self,
        now: Now,
        owner: u64,
        id: u64,
        one: &Message<'_>,
    ) -> Result<(), Errno> {
        match one.kind {
            kind::NEWSA => {
                let key = sad::key_of(one.body)?.ok_or(Errno::INVAL)?;
                // What is here is newer: the connection has ended, Esplane has not.
                if self.sas.get(&key).is_none() {
                    let mut record = SaRecord::new(now, owner, id, one.body)?;
                    if record.is_larval() {
                        record.hard_at = Some(now.monotonic + Duration::from_secs(LARVAL_SECONDS));
                    }
                    self.sas.insert(key, record);
                }
                Ok(())
            }
            kind::NEWPOLICY => self.take_policy(owner, id, one.body),
            _ => Err(Errno::INVAL),
        }
    }

    /// All that it keeps has come: from now on what is here is right.
    fn ready(&mut self, from: ClientId) {
        let Some(client) = self.clients.get_mut(&from) else {
            return;
        };
        client.ready = true;
        let (instance, listens) = (client.instance, client.listens(group::ACQUIRE));
        self.keep_all(from, instance);
        match listens {
            true => self.greet(),
            false => self.tell_all(),
        }
    }

    /// A process that listens for ACQUIRE is a charon. It knows nothing of the SAs of one that is gone.
    fn greet(&mut self) {
        self.forget_orphans();
        self.tell_all();
        let sas = self.sas.iter().count();
        self.outputs
            .push_back(KernelOutput::Notice(KernelNotice::Connected { sas }));
    }

    fn tell_all(&mut self) {
        let all = self.sas.iter().filter_map(|(_, record)| record.told());
        let snapshot = XfrmEvent::Snapshot(all.collect());
        self.outputs.push_back(KernelOutput::Event(snapshot));
    }

    fn forget_orphans(&mut self) {
        let present: Vec<u64> = self
            .clients
            .values()
            .map(|client| client.instance)
            .collect();
        let orphans: Vec<SaKey> = self
            .sas
            .iter()
            .filter(|(_, record)| !present.contains(&record.owner))
            .map(|(key, _)| *key)
            .collect();
        for key in orphans {
            self.sas.remove(&key);
        }
        self.policies
            .0
            .retain(|_, record| present.contains(&record.owner));
    }

    fn keep_all(&mut self, to: ClientId, owner: u64) {
        let keys: Vec<SaKey> = self
            .sas
            .iter()
            .filter(|(_, record)| record.owner == owner)
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            self.keep(to, &key);
        }
    }

    /// Gives an SA to its process to keep, in place of what it keeps of it.
    fn keep(&mut self, to: ClientId, key: &SaKey) {
        if let Some(record) = self.sas.get(key) {
            let (id, message) = (record.id, record.message(0, 0, 0));
            self.send(to, Kind::Keep, id, &message);
        }
    }

    fn owner_of(&self, instance: u64) -> Option<ClientId> {
        let mut clients = self.clients.iter();
        let found = clients.find(|(_, client)| client.instance == instance && client.ready);
        found.map(|(id, _)| *id)
    }

    // --- what the importer asks

    /// `None` if it cannot be; else what must be said to be kept first.
    fn store(
        &mut self,
        now: Now,
        key: &SaKey,
        progress: &Progress,
    ) -> Option<Option<(ClientId, u64)>> {
        let owner = self.owner_of(self.sas.get(key)?.owner)?;
        let record = self.sas.get_mut(key)?;
        // A number goes up, or the SA would send one twice after the next restart.
        if progress
            .sent
            .is_some_and(|sent| record.sequence_sent().is_ok_and(|there| sent < there))
        {
            return None;
        }
        if !record.store(now, progress).ok()? {
            return Some(None);
        }
        self.keep(owner, key);
        self.last_id += 1;
        let token = self.last_id;
        self.send(owner, Kind::Sync, token, &[]);
        Some(Some((owner, token)))
    }

    /// Tells that a limit is reached; a hard one ends the SA. Whether there is such an SA.
    fn expire(&mut self, key: &SaKey, hard: bool) -> bool {
        let Some(sa) = self.sas.get(key).and_then(SaRecord::told) else {
            return false;
        };
        let message = message::expired(&sa, hard);
        self.broadcast(group::EXPIRE, &message);
        if hard && let Some(record) = self.sas.remove(key) {
            self.drop_kept(record.owner, record.id);
        }
        let event = XfrmEvent::Expired { key: *key, hard };
        self.outputs.push_back(KernelOutput::Event(event));
        true
    }

    // --- what all need

    fn installed(&mut self, key: &SaKey) {
        if let Some(sa) = self.sas.get(key).and_then(SaRecord::told) {
            let event = XfrmEvent::Installed(sa);
            self.outputs.push_back(KernelOutput::Event(event));
        }
    }

    fn forget(&mut self, key: &SaKey) {
        if let Some(record) = self.sas.remove(key) {
            self.drop_kept(record.owner, record.id);
            let event = XfrmEvent::Removed(*key);
            self.outputs.push_back(KernelOutput::Event(event));
        }
    }

    fn drop_kept(&mut self, owner: u64, id: u64) {
        if let Some(client) = self.owner_of(owner) {
            self.send(client, Kind::Drop, id, &[]);
        }
    }

    fn broadcast(&mut self, group: u32, message: &[u8]) {
        let listening: Vec<(ClientId, u64)> = self
            .clients
            .iter()
            .filter(|(_, client)| client.ready)
            .flat_map(|(id, client)| client.sockets.iter().map(move |socket| (*id, socket)))
            .filter(|(_, (_, groups))| bit(**groups, group))
            .map(|(id, (socket, _))| (id, *socket))
            .collect();
        for (client, socket) in listening {
            self.send(client, Kind::Answer, socket, message);
        }
    }

    fn send(&mut self, client: ClientId, kind: Kind, id: u64, payload: &[u8]) {
        let mut frame = Zeroizing::new(Vec::with_capacity(frame::HEAD_BYTES + payload.len()));
        frame::write(&mut frame, kind, id, payload);
        let frame = Secret(frame);
        self.outputs.push_back(KernelOutput::Send { client, frame });
    }
}

impl Client {
    fn listens(&self, group: u32) -> bool {
        self.sockets.values().any(|groups| bit(*groups, group))
    }
}

/// `bind` names groups by bits, from 1 up.
fn bit(groups: u32, group: u32) -> bool {
    groups >> (group - 1) & 1 == 1
}
