//! What the operator should know, in words for three in the morning: who, what happened, what to check.

use crate::{KemPolicy, PublicKey};
use esplane_api::{AeadSuite, TunnelId};
use std::{fmt, net::SocketAddr};

/// How urgent a notice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The normal course of things.
    Info,
    /// Something is wrong that may pass or be somebody else's fault.
    Warning,
    /// A tunnel does not work, and someone must do something.
    Error,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// With whom; `None` where it concerns nobody we know.
    pub peer: Option<PeerLabel>,
    /// What.
    pub event: NoticeEvent,
}

/// A peer's number and name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerLabel {
    /// Its tunnel's number.
    pub id: TunnelId,
    /// Its name.
    pub name: String,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoticeEvent {
    /// The tunnel has SAs that work in both directions.
    Established {
        /// Where the peer is.
        endpoint: SocketAddr,
        /// What packets are sealed with.
        suite: AeadSuite,
        /// The handshake's post-quantum half.
        kem: KemPolicy,
        /// Whether it replaces SAs that worked.
        rekey: bool,
    },
    /// The peer's authenticated packets come from elsewhere now.
    Moved {
        /// Where it was.
        from: Option<SocketAddr>,
        /// Where it is.
        to: SocketAddr,
    },
    /// A handshake got no answer for long; it goes on, or starts again with the next packet.
    NoAnswer {
        /// Where it was sent.
        endpoint: SocketAddr,
        /// For how long.
        seconds: u64,
        /// Whether it goes on by itself.
        retrying: bool,
    },
    /// We should start a handshake and do not know where to.
    NoEndpoint,
    /// We send and nothing comes back.
    Silent {
        /// For how long.
        seconds: u64,
    },
    /// The SAs have come to the end of their hard lifetime without a successor.
    Expired,
    /// Both ends are configured differently.
    Disagreement(Disagreement),
    /// The peer's answer does not decrypt.
    WrongAnswer {
        /// Where it came from.
        endpoint: SocketAddr,
    },
    /// We answered, and the peer never used the new keys.
    NotConfirmed {
        /// Where the answer went.
        endpoint: SocketAddr,
    },
    /// The peer's timestamp is not newer than one we have seen.
    Replayed {
        /// Where it came from.
        endpoint: SocketAddr,
    },
    /// Somebody who knows our public key, and whom we do not know.
    Stranger {
        /// Who.
        public_key: PublicKey,
        /// From where.
        endpoint: SocketAddr,
    },
    /// Handshake initiations come faster than they should; strangers must show a cookie.
    UnderLoad {
        /// How many a second are taken without.
        initiations_per_second: u32,
    },
    /// It has calmed down again.
    LoadOver,
}

/// The setting in which two ends differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disagreement {
    /// No suite is on both lists.
    Suites,
    /// One end uses 64-bit numbers, the other 32-bit ones.
    Esn,
    /// Different post-quantum settings.
    Kem,
    /// Something this version does not know.
    Unknown,
}

impl Notice {
    /// How urgent.
    pub fn severity(&self) -> Severity {
        self.event.severity()
    }
}

impl NoticeEvent {
    /// How urgent.
    pub fn severity(&self) -> Severity {
        match self {
            NoticeEvent::Established { .. } | NoticeEvent::Moved { .. } | NoticeEvent::LoadOver => {
                Severity::Info
            }
            NoticeEvent::Silent { .. }
            | NoticeEvent::NotConfirmed { .. }
            | NoticeEvent::Replayed { .. }
            | NoticeEvent::Stranger { .. }
            | NoticeEvent::UnderLoad { .. } => Severity::Warning,
            NoticeEvent::NoAnswer { .. }
            | NoticeEvent::NoEndpoint
            | NoticeEvent::Expired
            | NoticeEvent::Disagreement(_)
            | NoticeEvent::WrongAnswer { .. } => Severity::Error,
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(peer) = &self.peer {
            write!(f, "peer `{}`: ", peer.name)?;
        }
        fmt::Display::fmt(&self.event, f)
    }
}

impl fmt::Display for NoticeEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Established { endpoint, suite, kem, rekey: false } => {
                write!(f, "tunnel is up with {endpoint} ({suite}, KEM {kem})")
            }
            Self::Established { endpoint, suite, kem, rekey: true } => {
                write!(f, "rekeyed with {endpoint} ({suite}, KEM {kem})")
            }
            Self::Moved { from: Some(from), to } => write!(f, "moved from {from} to {to}"),
            Self::Moved { from: None, to } => write!(f, "is at {to}"),
            Self::NoAnswer { endpoint, seconds, retrying } => write!(
                f,
                "no answer from {endpoint} for {seconds} s; {}. Check that it runs, that UDP reaches it, and that each end has the other's public key",
                if *retrying { "still trying" } else { "the next packet starts again" }
            ),
            Self::NoEndpoint => f.write_str(
                "packets wait for it and its address is not known; give it an endpoint, or start the tunnel from its side",
            ),
            Self::Silent { seconds } => {
                write!(f, "nothing has come back for {seconds} s; asking with a handshake whether it lives")
            }
            Self::Expired => f.write_str(
                "the SAs have ended and no handshake replaced them; packets wait for the next one. Check that the peer can be reached",
            ),
            Self::Disagreement(what) => write!(f, "refused the tunnel: {what}"),
            Self::WrongAnswer { endpoint } => write!(
                f,
                "the answer from {endpoint} does not decrypt: check that both ends have the same pre-shared key, or both none"
            ),
            Self::NotConfirmed { endpoint } => write!(
                f,
                "answered its handshake to {endpoint} and it never used the new keys: the answer was lost, or the pre-shared keys differ"
            ),
            Self::Replayed { endpoint } => write!(
                f,
                "a handshake from {endpoint} carries an old timestamp: a replay, or its clock was set back; check its clock"
            ),
            Self::Stranger { public_key, endpoint } => write!(
                f,
                "a handshake from {endpoint} shows the public key {public_key}, which no peer here has; add it as a peer, or look who that is"
            ),
            Self::UnderLoad { initiations_per_second } => write!(
                f,
                "more than {initiations_per_second} handshake initiations a second: asking each sender for a cookie first"
            ),
            Self::LoadOver => f.write_str("handshake initiations are back to normal, no cookies needed"),
        }
    }
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Suites => "no AEAD suite is on both ends' lists; give both ends one in common",
            Self::Esn => "one end has ESN on, the other off; set `esn` alike on both ends",
            Self::Kem => "the ends' `kem` settings differ; set the same one on both ends",
            Self::Unknown => {
                "the other end insists on something this version does not know; update this one"
            }
        })
    }
}
