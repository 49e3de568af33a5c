use crate::{DfPolicy, SelectorPair, TunnelId};
use serde::{Deserialize, Serialize};

/// A tunnel without its SAs: what it is called and which packets belong into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelParams {
    /// Its number within this daemon.
    pub id: TunnelId,
    /// Its name for people: the peer's name, or a strongSwan child's.
    pub name: String,
    /// Which packets belong to it (and what else its selectors decide).
    pub policies: Vec<Policy>,
    /// Whether the peer's address follows its authenticated packets; see [`crate::SaEvent::EndpointMoved`].
    pub roaming: bool,
    /// The Don't Fragment bit of outer IPv4 headers.
    pub df: DfPolicy,
}

/// One entry of the Security Policy Database (RFC 4301 §4.4.1).
///
/// Of all policies whose selectors fit a packet, the one with the longest remote network decides;
/// among equals the lowest `priority`, then the one that came first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Which packets.
    pub selectors: SelectorPair,
    /// What to do with them.
    pub action: PolicyAction,
    /// Lower decides first, as in Linux.
    pub priority: u32,
}

/// What a policy does with a packet (RFC 4301 §4.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyAction {
    /// Carry it in this tunnel, or not at all: without an SA it is held, then dropped, never sent in clear.
    Protect(TunnelId),
    /// Let it pass in clear.
    Bypass,
    /// Drop it.
    Discard,
}
