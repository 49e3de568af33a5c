//! The kernel's side of mode A: subscribes, dumps, follows, and carries requests to it.
//!
//! ```text
//!   events socket    subscribe to SA and EXPIRE ─▶ dump ─▶ Snapshot ─▶ Installed, Removed, Expired …
//!        └─ overrun (ENOBUFS): dump again ─▶ Snapshot
//!   requests socket  GETSA ─▶ NEWAE ─▶ GETSA │ EXPIRE │ ACQUIRE, one after the other ─▶ Reply
//! ```
//!
//! Two sockets, so that a flood of events loses no answer.

use super::wire::{Message, WireError, flag, kind, messages};
use super::{Progress, SaKey, XfrmEvent, XfrmReply, XfrmRequest, XfrmSa, message, wire};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_XFRM};
use std::{collections::VecDeque, io, time::Duration};
use tokio::sync::mpsc;
use zeroize::Zeroizing;

/// More than any datagram of the kernel's: it fills dumps up to 32 KiB.
const RECEIVE_BYTES: usize = 1 << 17;
/// The events socket's queue: some ten thousand SAs, as many as a rekey of all at once tells.
const QUEUE_BYTES: usize = 8 << 20;
/// The kernel answers at once; a longer silence is an answer that was lost.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Why the kernel's SA database cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum XfrmError {
    /// No such socket.
    #[error(
        "cannot open a NETLINK_XFRM socket: {0}; the kernel needs CONFIG_XFRM_USER (module xfrm_user)"
    )]
    Open(io::Error),
    /// A call on it failed.
    #[error("NETLINK_XFRM: cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel refused to show its SAs.
    #[error(
        "the kernel refuses to show its SAs: {0}; esplane needs CAP_NET_ADMIN in the host's user namespace"
    )]
    Dump(io::Error),
    /// It says what no kernel says.
    #[error("the kernel's answer cannot be read: {0}")]
    Wire(#[from] WireError),
    /// It does not answer.
    #[error("the kernel has not answered within {} s", ANSWER_WITHIN.as_secs())]
    Silent,
}

type Result<T> = std::result::Result<T, XfrmError>;

/// Follows the kernel's SA database until `requests` is closed or `events` has no reader.
///
/// The first event is a [`XfrmEvent::Snapshot`]; another follows any gap. A slow reader holds the
/// kernel's messages back, at worst until the socket overruns: then a snapshot makes up for them.
/// Requests are taken also while events wait for their reader.
pub async fn run(
    requests: &mut mpsc::Receiver<XfrmRequest>,
    events: &mpsc::Sender<XfrmEvent>,
) -> Result<()> {
    let mut follower = Follower::subscribe()?;
    let mut asker = Asker::open()?;
    let mut waiting = VecDeque::from(follower.snapshot().await?);
    loop {
        tokio::select! {
            room = events.reserve(), if !waiting.is_empty() => match (room, waiting.pop_front()) {
                (Ok(room), Some(event)) => room.send(event),
                _ => return Ok(()),
            },
            told = follower.told(), if waiting.is_empty() => waiting.extend(match told? {
                Some(events) => events,
                None => {
                    tracing::debug!("the kernel told of more SAs than its queue holds; all are asked for anew");
                    follower.snapshot().await?
                }
            }),
            request = requests.recv() => match request {
                Some(request) => waiting.extend(asker.ask(&request).await?.map(XfrmEvent::Reply)),
                None => return Ok(()),
            },
        }
    }
}

/// A socket and what it receives into; keys pass through, so it is wiped.
struct Channel {
    socket: TokioSocket,
    received: Zeroizing<Vec<u8>>,
}

impl Channel {
    fn open() -> Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_XFRM).map_err(XfrmError::Open)?;
        socket
            .socket_mut()
            .bind_auto()
            .map_err(doing("bind the socket"))?;
        Ok(Self {
            socket,
            received: Zeroizing::new(Vec::with_capacity(RECEIVE_BYTES)),
        })
    }

    async fn send(&mut self, message: &[u8]) -> Result<()> {
        self.socket
            .send_to(message, &SocketAddr::new(0, 0))
            .await
            .map_err(doing("ask"))?;
        Ok(())
    }

    /// Cancel-safe: a datagram is either still in the socket or in `received`.
    async fn receive(&mut self) -> io::Result<&[u8]> {
        loop {
            self.received.clear();
            let from = self.socket.recv_from(&mut *self.received).await?;
            // Any process may send to a netlink socket; only the kernel's own is port 0.
            if from.port_number() == 0 {
                return Ok(&self.received);
            }
        }
    }
}

fn doing(doing: &'static str) -> impl Fn(io::Error) -> XfrmError {
    move |source| XfrmError::Io { doing, source }
}

/// Listens.
struct Follower {
    channel: Channel,
    sequence: u32,
}

impl Follower {
    fn subscribe() -> Result<Self> {
        let mut channel = Channel::open()?;
        let socket = channel.socket.socket_mut();
        // A small queue works as well, by more snapshots; so no privilege is asked for.
        let _ = socket.set_rx_buf_sz(QUEUE_BYTES as i32);
        for group in [wire::group::EXPIRE, wire::group::SA] {
            socket
                .add_membership(group)
                .map_err(doing("subscribe to SAs"))?;
        }
        Ok(Self {
            channel,
            sequence: 0,
        })
    }

    /// What is told next; `None` if something was missed. Cancel-safe.
    async fn told(&mut self) -> Result<Option<Vec<XfrmEvent>>> {
        let datagram = match self.channel.receive().await {
            Ok(datagram) => datagram,
            Err(error) if is_overrun(&error) => return Ok(None),
            Err(source) => return Err(doing("receive")(source)),
        };
        Ok(Some(events_of(datagram)))
    }

    /// Everything there is, then what was told meanwhile: each change is told in order, so the
    /// last word on an SA is right whether it came before or after the dump reached it.
    async fn snapshot(&mut self) -> Result<Vec<XfrmEvent>> {
        loop {
            if let Some(events) = self.dump().await? {
                return Ok(events);
            }
        }
    }

    /// One dump; `None` if something was missed meanwhile. Read to its end in any case: the kernel
    /// begins no other before.
    async fn dump(&mut self) -> Result<Option<Vec<XfrmEvent>>> {
        self.sequence += 1;
        let sequence = self.sequence;
        self.channel.send(&message::dump(sequence)).await?;
        let mut dump = Dump::default();
        while !dump.complete {
            let received = tokio::time::timeout(ANSWER_WITHIN, self.channel.receive())
                .await
                .map_err(|_| XfrmError::Silent)?;
            match received {
                Ok(datagram) => dump.read(sequence, datagram)?,
                Err(error) if is_overrun(&error) => dump.missed = true,
                Err(source) => return Err(doing("receive")(source)),
            }
        }
        Ok((!dump.missed).then(|| {
            let mut told = vec![XfrmEvent::Snapshot(dump.all)];
            told.append(&mut dump.meanwhile);
            told
        }))
    }
}

/// A dump being read.
#[derive(Default)]
struct Dump {
    all: Vec<XfrmSa>,
    meanwhile: Vec<XfrmEvent>,
    complete: bool,
    missed: bool,
}

impl Dump {
    fn read(&mut self, sequence: u32, datagram: &[u8]) -> Result<()> {
        for one in messages(datagram) {
            let one = one?;
            // Events bear the number of whoever caused them, which may happen to be the same.
            let part = one.sequence == sequence && one.flags & flag::MULTI != 0;
            match one.kind {
                kind::DONE => self.complete = true,
                kind::ERROR => {
                    let errno = message::parse_error(one.body)?;
                    return Err(XfrmError::Dump(io::Error::from_raw_os_error(errno)));
                }
                _ => match event_of(&one) {
                    Some(XfrmEvent::Installed(sa)) if part => self.all.push(sa),
                    other => self.meanwhile.extend(other),
                },
            }
        }
        Ok(())
    }
}

fn events_of(datagram: &[u8]) -> Vec<XfrmEvent> {
    messages(datagram)
        .map_while(std::result::Result::ok)
        .filter_map(|one| event_of(&one))
        .collect()
}

/// What a message tells. One that cannot be read is said; the SA is left to the kernel.
fn event_of(one: &Message<'_>) -> Option<XfrmEvent> {
    match message::parse_event(one) {
        Ok(event) => event,
        Err(error) => {
            tracing::warn!(%error, kind = one.kind, "a message of the kernel's cannot be read; its SA is left to the kernel");
            None
        }
    }
}

/// `ENOBUFS`: the queue was full, messages are lost.
fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(105)
}

/// Asks, one request at a time.
struct Asker {
    channel: Channel,
    sequence: u32,
}

/// The kernel's answer.
enum Answer {
    /// `NLMSG_ERROR`; 0 is done.
    Outcome(i32),
    /// The SA that was asked for: the body of NEWSA.
    Sa(Zeroizing<Vec<u8>>),
}

impl Asker {
    fn open() -> Result<Self> {
        Ok(Self {
            channel: Channel::open()?,
            sequence: 0,
        })
    }

    async fn ask(&mut self, request: &XfrmRequest) -> Result<Option<XfrmReply>> {
        match *request {
            XfrmRequest::Store { key, progress } => Ok(Some(self.store(key, &progress).await?)),
            XfrmRequest::Expire { key, hard } => {
                let message = message::expire(self.next_sequence(), &key, hard);
                let done = matches!(self.exchange(&message).await?, Answer::Outcome(0));
                Ok(Some(XfrmReply {
                    key,
                    done,
                    sequence_sent: None,
                }))
            }
            // Only the kernel itself tells of moved peers. charon learns of it by MOBIKE or DPD.
            XfrmRequest::PeerMoved { key, .. } => Ok(Some(refused(key))),
            XfrmRequest::Acquire {
                reqid,
                ends,
                selectors,
            } => {
                let message = message::acquire(self.next_sequence(), reqid, ends, &selectors);
                if let Answer::Outcome(errno) = self.exchange(&message).await?
                    && errno != 0
                {
                    let error = io::Error::from_raw_os_error(errno);
                    tracing::warn!(reqid, %error, "the kernel does not pass on that packets wait for an SA");
                }
                Ok(None)
            }
        }
    }

    async fn store(&mut self, key: SaKey, progress: &Progress) -> Result<XfrmReply> {
        let Some(found) = self.get(&key).await? else {
            return Ok(refused(key));
        };
        let message = match message::store(self.next_sequence(), &key, &found, progress) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(%error, spi = %key.spi, "numbers cannot be stored in the kernel");
                return Ok(refused(key));
            }
        };
        let Answer::Outcome(0) = self.exchange(&message).await? else {
            return Ok(refused(key));
        };
        if progress.sent.is_none() {
            return Ok(XfrmReply {
                key,
                done: true,
                sequence_sent: None,
            });
        }
        // Read back: what is used must be what is there.
        let Some(found) = self.get(&key).await? else {
            return Ok(refused(key));
        };
        let stored = message::sequence_sent(&found)?;
        let done = Some(stored) == progress.sent;
        Ok(XfrmReply {
            key,
            done,
            sequence_sent: Some(stored),
        })
    }

    async fn get(&mut self, key: &SaKey) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let sequence = self.next_sequence();
        Ok(match self.exchange(&message::get(sequence, key)).await? {
            Answer::Sa(body) => Some(body),
            Answer::Outcome(_) => None,
        })
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    async fn exchange(&mut self, request: &[u8]) -> Result<Answer> {
        self.channel.send(request).await?;
        tokio::time::timeout(ANSWER_WITHIN, self.answer())
            .await
            .map_err(|_| XfrmError::Silent)?
    }

    async fn answer(&mut self) -> Result<Answer> {
        loop {
            let wanted = self.sequence;
            let datagram = self
                .channel
                .receive()
                .await
                .map_err(doing("receive an answer"))?;
            for one in messages(datagram) {
                let one = one?;
                match one.kind {
                    _ if one.sequence != wanted => {}
                    kind::ERROR => return Ok(Answer::Outcome(message::parse_error(one.body)?)),
                    kind::NEWSA => return Ok(Answer::Sa(Zeroizing::new(one.body.to_vec()))),
                    _ => {}
                }
            }
        }
    }
}

fn refused(key: SaKey) -> XfrmReply {
    XfrmReply {
        key,
        done: false,
        sequence_sent: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xfrm::recorded;

    /// What a dump of number 1 comes to, of these datagrams.
    fn dumped(datagrams: &[Vec<u8>]) -> Dump {
        let mut dump = Dump::default();
        for datagram in datagrams {
            assert!(!dump.complete);
            dump.read(1, datagram).unwrap();
        }
        dump
    }

    #[test]
    fn what_happens_during_a_dump_comes_behind_it_in_its_order() {
        let mut datagrams = recorded::dump();
        // Caused by somebody whose requests have the dump's very number.
        let mut added = recorded::datagram("event", "gcm128");
        added[8..12].copy_from_slice(&1u32.to_ne_bytes());
        datagrams.insert(0, recorded::datagram("event", "deleted"));
        datagrams.insert(1, added);
        let dump = dumped(&datagrams);
        assert!(dump.complete && !dump.missed);
        assert_eq!(dump.all.len(), 6);
        let [XfrmEvent::Removed(_), XfrmEvent::Installed(_)] = dump.meanwhile[..] else {
            panic!("{:?}", dump.meanwhile);
        };
    }

    #[test]
    fn a_refused_dump_says_what_is_needed() {
        let mut refusal = recorded::datagram("ack", "soft-expire");
        refusal[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        let error = Dump::default().read(1, &refusal).unwrap_err().to_string();
        assert!(error.contains("CAP_NET_ADMIN"), "{error}");
    }

    #[test]
    fn one_sa_that_cannot_be_read_hides_no_other() {
        let mut bad = recorded::datagram("event", "gcm128");
        bad[16 + 212] = 99; // a family that nobody knows
        let good = recorded::datagram("event", "chacha-v6-ifid");
        let events = events_of(&[bad, good].concat());
        let [XfrmEvent::Installed(sa)] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!(sa.if_id, Some(42));
    }
}
