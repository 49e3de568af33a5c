//! One connection to charon's socket: one command at a time, events at any time.
//!
//! ```text
//!   request ──▶ charon            charon ──▶ response          only one is ever waited for
//!                                 charon ──▶ event, event …    held meanwhile, in order, bounded
//! ```
//!
//! [`Channel::next_event`] may be cancelled anywhere: what has come so far stays in the reader. A command that ran
//! into its time limit leaves its answer behind on the wire, so the connection takes no other: [`ViciError::Spoilt`].

use super::{EncodeError, Message, Packet, PacketError, PacketReader};
use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{net::UnixStream, time::timeout};

/// Where charon listens, unless `charon.plugins.vici.socket` says otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/charon.vici";
/// Events held while a command is under way. charon sends a handful for each SA.
const HELD_EVENTS_MAX: usize = 1 << 14;
const READ_BYTES: usize = 1 << 16;

/// A connection to charon, and what has come over it unasked.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    reader: PacketReader,
    received: Box<[u8]>,
    held: VecDeque<(String, Message)>,
    spoilt: bool,
}

/// Why charon cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum ViciError {
    /// No way to the socket.
    #[error("cannot connect to charon at {}: {source}; {}", .path.display(), advice(.source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A call failed.
    #[error("charon's VICI socket: {0}")]
    Io(#[from] io::Error),
    /// charon has gone.
    #[error("charon has closed its VICI connection{}", if *.within_packet { " within a packet" } else { "" })]
    Closed {
        /// Whether it broke off within a packet.
        within_packet: bool,
    },
    /// charon says what VICI does not have.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The command cannot be said in VICI.
    #[error("`{command}` cannot be sent: {problem}")]
    Encode {
        /// The command.
        command: String,
        /// Why.
        problem: EncodeError,
    },
    /// charon is busy, or stuck.
    #[error("charon has not answered `{command}` within {} s", .limit.as_secs_f32())]
    Silent {
        /// The command.
        command: String,
        /// How long it had.
        limit: Duration,
    },
    /// charon does not have the command.
    #[error("charon does not know the command `{0}`; Esplane needs strongSwan 5.9.8 or later")]
    UnknownCommand(String),
    /// charon says no.
    #[error("charon refuses `{command}`: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// In charon's words.
        reason: String,
    },
    /// Not the answer to what was asked.
    #[error("charon answers `{command}` with a packet of another kind")]
    Answer {
        /// The command.
        command: String,
    },
    /// More events than can be held while a command is under way.
    #[error("charon sent more than {HELD_EVENTS_MAX} events while it answered `{0}`")]
    Flood(String),
    /// We do not keep up.
    #[error("what charon tells found no room within {} s; Esplane begins again with a snapshot", .limit.as_secs_f32())]
    SlowReader {
        /// How long it was borne.
        limit: Duration,
    },
    /// An earlier command was not waited out.
    #[error("the connection still waits for the answer to an earlier command; open another")]
    Spoilt,
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "is strongSwan running, with its vici plugin?",
        io::ErrorKind::ConnectionRefused => {
            "the socket is there but nobody listens: is strongSwan running?"
        }
        io::ErrorKind::PermissionDenied => {
            "it is root's: run as root, or as the group of charon.plugins.vici"
        }
        _ => "is this charon's VICI socket?",
    }
}

type Result<T> = std::result::Result<T, ViciError>;

impl Channel {
    /// Connects to the socket.
    pub async fn open(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).await;
        let stream = stream.map_err(|source| ViciError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::over(stream))
    }

    /// Speaks over a stream that is connected.
    pub fn over(stream: UnixStream) -> Self {
        Self {
            stream,
            reader: PacketReader::default(),
            received: vec![0; READ_BYTES].into(),
            held: VecDeque::new(),
            spoilt: false,
        }
    }

    /// charon's process, where the system tells.
    pub fn process(&self) -> Option<i32> {
        self.stream.peer_cred().ok()?.pid()
    }

    /// Asks for an event; false if this charon does not have it.
    pub async fn register(&mut self, event: &str, limit: Duration) -> Result<bool> {
        match self
            .ask(Packet::Register(event.to_owned()), event, limit)
            .await?
        {
            Packet::Confirmed => Ok(true),
            Packet::UnknownEvent => Ok(false),
            _ => Err(self.wrong_answer(event)),
        }
    }

    /// A command with one answer.
    pub async fn request(
        &mut self,
        command: &str,
        arguments: Message,
        limit: Duration,
    ) -> Result<Message> {
        let request = Packet::Request(command.to_owned(), arguments);
        let answer = self.ask(request, command, limit).await?;
        self.response(command, answer)
    }

    /// A command whose answer comes as a stream of `event`s, which must have been registered; each has `limit` to
    /// come. Others are held for [`Self::next_event`].
    pub async fn stream(
        &mut self,
        command: &str,
        arguments: Message,
        event: &str,
        limit: Duration,
        mut each: impl FnMut(Message),
    ) -> Result<()> {
        self.start(
            Packet::Request(command.to_owned(), arguments),
            command,
            limit,
        )
        .await?;
        loop {
            match self.awaited(command, limit).await? {
                Packet::Event(name, message) if name == event => each(message),
                Packet::Event(name, message) => self.hold(name, message, command)?,
                answer => {
                    self.spoilt = false;
                    return self.response(command, answer).map(drop);
                }
            }
        }
    }

    /// The next event, held or yet to come. Cancel-safe.
    pub async fn next_event(&mut self) -> Result<(String, Message)> {
        if let Some(event) = self.held.pop_front() {
            return Ok(event);
        }
        match self.next_packet().await? {
            Packet::Event(name, message) => Ok((name, message)),
            _ => Err(self.wrong_answer("nothing")),
        }
    }

    async fn ask(&mut self, packet: Packet, command: &str, limit: Duration) -> Result<Packet> {
        self.start(packet, command, limit).await?;
        loop {
            match self.awaited(command, limit).await? {
                Packet::Event(name, message) => self.hold(name, message, command)?,
                answer => {
                    self.spoilt = false;
                    return Ok(answer);
                }
            }
        }
    }

    /// Sends; from here on until the answer the connection is spoilt, also if the caller is cancelled.
    async fn start(&mut self, packet: Packet, command: &str, limit: Duration) -> Result<()> {
        if self.spoilt {
            return Err(ViciError::Spoilt);
        }
        let bytes = packet.encode().map_err(|problem| ViciError::Encode {
            command: command.to_owned(),
            problem,
        })?;
        self.spoilt = true;
        timeout(limit, self.send(&bytes))
            .await
            .map_err(|_| silent(command, limit))?
    }

    async fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn awaited(&mut self, command: &str, limit: Duration) -> Result<Packet> {
        timeout(limit, self.next_packet())
            .await
            .map_err(|_| silent(command, limit))?
    }

    /// Cancel-safe: bytes move from the socket into the reader without a pause between.
    async fn next_packet(&mut self) -> Result<Packet> {
        loop {
            if let Some(packet) = self.reader.next_packet()? {
                return Ok(packet);
            }
            self.stream.readable().await?;
            match self.stream.try_read(&mut self.received) {
                Ok(0) => return Err(self.closed()),
                // So it ends if charon leaves something of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(self.closed());
                }
                Ok(bytes) => self.reader.push(&self.received[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn closed(&self) -> ViciError {
        ViciError::Closed {
            within_packet: self.reader.is_within_packet(),
        }
    }

    fn hold(&mut self, name: String, message: Message, command: &str) -> Result<()> {
        if self.held.len() == HELD_EVENTS_MAX {
            return Err(ViciError::Flood(command.to_owned()));
        }
        self.held.push_back((name, message));
        Ok(())
    }

    /// What a command's answer says; charon says `success` for those that can fail.
    fn response(&self, command: &str, answer: Packet) -> Result<Message> {
        match answer {
            Packet::Response(message)
                if message.text("success").is_none_or(|text| text == "yes") =>
            {
                Ok(message)
            }
            Packet::Response(message) => {
                let reason = message.text("errmsg").map(Into::into);
                Err(ViciError::Refused {
                    command: command.to_owned(),
                    reason: reason.unwrap_or_else(|| "it gives no reason".to_owned()),
                })
            }
            Packet::UnknownCommand => Err(ViciError::UnknownCommand(command.to_owned())),
            _ => Err(self.wrong_answer(command)),
        }
    }

    fn wrong_answer(&self, command: &str) -> ViciError {
        ViciError::Answer {
            command: command.to_owned(),
        }
    }
}

fn silent(command: &str, limit: Duration) -> ViciError {
    ViciError::Silent {
        command: command.to_owned(),
        limit,
    }
}
