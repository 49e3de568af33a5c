//! What the operator should know: which child, what happened, what to do.

use esplane_api::{AeadSuite, Direction, Esn, PathError, Spi};
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
pub struct ImportNotice {
    /// To which child; `None` where it concerns them all.
    pub child: Option<ChildLabel>,
    /// What.
    pub event: ImportEvent,
}

/// A child's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildLabel {
    /// The connection.
    pub connection: String,
    /// The child.
    pub child: String,
    /// charon's number of the CHILD_SA, where it has told.
    pub unique_id: Option<u32>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImportEvent {
    /// Packets of the child are carried.
    Carried {
        /// With what.
        suite: AeadSuite,
        /// How its numbers count.
        esn: Esn,
        /// Where to.
        remote: SocketAddr,
    },
    /// It is carried no more: its SAs are gone.
    Ended,
    /// Another outbound SA of the child sends now.
    Switched {
        /// Which.
        spi: Spi,
    },
    /// One SA cannot be imported.
    NotImported {
        /// Which.
        spi: Spi,
        /// Which way it goes.
        direction: Direction,
        /// Why.
        problem: SaProblem,
    },
    /// Some of its traffic selectors cannot be held to.
    SelectorsLeftOut {
        /// As charon writes them.
        selectors: Vec<String>,
    },
    /// An outbound SA may have sent before under numbers nobody knows.
    PastUnknown {
        /// Which.
        spi: Spi,
    },
    /// The kernel did not store a number.
    NotStored {
        /// For which SA.
        spi: Spi,
    },
    /// The peer's packets come from elsewhere: its NAT has another mapping.
    Moved {
        /// Where it is now.
        to: SocketAddr,
    },
    /// Packets wait for it, and charon has been asked to negotiate.
    Wanted,
    /// charon could not negotiate it.
    NotNegotiated,
    /// It went while packets were carried.
    EndedInUse,
    /// The dataplane refused its SAs.
    Refused {
        /// In its words.
        reason: String,
    },
    /// The connection to charon is gone.
    CharonLost,
    /// charon is there, again or for the first time.
    CharonFound {
        /// How many CHILD_SAs it has.
        children: usize,
    },
}

/// Why an SA cannot be imported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SaProblem {
    /// The kernel might send or receive with it as well.
    #[error(
        "it does not carry the mark {0:#010x}, so the kernel itself may use it, and two that send with one key would use the same nonces (RFC 4106 §2); give the child `mark_in = mark_out = {0:#010x}/0xffffffff`, `mark_in_sa = yes` and `policies = no`"
    )]
    NotInert(u32),
    /// An algorithm that Esplane does not have.
    #[error(
        "it uses {0}, which is left to the kernel; use `esp_proposals = aes128gcm16`, `aes256gcm16` or `chacha20poly1305`, or take the mark away for the kernel to carry it"
    )]
    Unsupported(String),
    /// The kernel hides keys.
    #[error(
        "the kernel shows zeros in place of the {0} key: it is locked down for confidentiality (/sys/kernel/security/lockdown); boot without lockdown=confidentiality, or use mode B"
    )]
    Concealed(AeadSuite),
    /// Not tunnel mode.
    #[error("it is in {0} mode; Esplane carries whole packets: set `mode = tunnel`")]
    Mode(String),
    /// Tunnel mode by IPComp.
    #[error(
        "it is a transport mode SA of a tunnel mode child: IP compression is on; set `ipcomp = no`"
    )]
    IpComp,
    /// Not ESP.
    #[error("it uses {0}; Esplane carries ESP: set `esp_proposals` in place of `ah_proposals`")]
    Protocol(String),
    /// Addresses nothing can be sent to.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The same child's other SA cannot be imported.
    #[error(
        "the other SA of the CHILD_SA cannot be imported, and half a tunnel would only lose packets"
    )]
    OtherHalf,
    /// Nothing would fit.
    #[error("it has no traffic selectors that Esplane can hold packets to")]
    NoSelectors,
}

impl ImportNotice {
    /// How urgent.
    pub fn severity(&self) -> Severity {
        match &self.event {
            ImportEvent::Carried { .. }
            | ImportEvent::Ended
            | ImportEvent::Switched { .. }
            | ImportEvent::Moved { .. }
            | ImportEvent::Wanted
            | ImportEvent::PastUnknown { .. }
            | ImportEvent::CharonFound { .. } => Severity::Info,
            ImportEvent::SelectorsLeftOut { .. }
            | ImportEvent::EndedInUse
            | ImportEvent::NotNegotiated
            | ImportEvent::CharonLost => Severity::Warning,
            ImportEvent::NotImported { .. }
            | ImportEvent::NotStored { .. }
            | ImportEvent::Refused { .. } => Severity::Error,
        }
    }
}

impl fmt::Display for ImportNotice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(child) = &self.child {
            write!(f, "{child}: ")?;
        }
        fmt::Display::fmt(&self.event, f)
    }
}

impl fmt::Display for ChildLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "child `{}/{}`", self.connection, self.child)?;
        match self.unique_id {
            Some(number) => write!(f, " #{number}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ImportEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Carried { suite, esn, remote } => {
                let esn = if *esn == Esn::On { ", ESN" } else { "" };
                match remote.port() {
                    0 => write!(f, "carried to {} ({suite}{esn})", remote.ip()),
                    _ => write!(f, "carried to {remote} in UDP ({suite}{esn})"),
                }
            }
            Self::Ended => f.write_str("its SAs are gone; carried no more"),
            Self::Switched { spi } => write!(f, "sends with SA {spi} now"),
            Self::NotImported { spi, direction, problem } => {
                write!(f, "{direction} SA {spi} is not imported: {problem}")
            }
            Self::SelectorsLeftOut { selectors } => write!(
                f,
                "no packets are carried for {}: Esplane tells packets by addresses, protocol and ports only",
                selectors.join(", ")
            ),
            Self::PastUnknown { spi } => write!(
                f,
                "outbound SA {spi} was there before Esplane, and nothing tells which of its sequence numbers are used; asking charon to rekey, packets wait for that"
            ),
            Self::NotStored { spi } => write!(
                f,
                "the kernel did not store the sequence numbers reserved for outbound SA {spi}, so they are not used; trying again. Check that Esplane has CAP_NET_ADMIN"
            ),
            Self::Moved { to } => write!(f, "its packets come from {to} now; sending there"),
            Self::Wanted => f.write_str("packets wait for it; asked charon to negotiate"),
            Self::NotNegotiated => f.write_str(
                "charon could not negotiate it, packets for it wait or are dropped; its log says why (swanctl --log)",
            ),
            Self::EndedInUse => f.write_str(
                "ended while it carried packets. If swanctl.conf gives it `inactivity`, take that out: charon cannot see when a packet last passed",
            ),
            Self::Refused { reason } => write!(f, "the dataplane refused its SAs: {reason}"),
            Self::CharonLost => f.write_str(
                "the connection to charon is gone; its SAs are carried on as the kernel's database has them",
            ),
            Self::CharonFound { children } => {
                write!(f, "charon is there with {children} CHILD_SAs")
            }
        }
    }
}
