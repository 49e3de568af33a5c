//! Why commands are refused.

use esplane_api::{Direction, PathError, SaCommand, SaId, SelectorPair, Spi, TunnelId};

/// Why a list of commands was refused as a whole; nothing of it was carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("command {} ({command}): {problem}", index + 1)]
pub struct CommandError {
    /// Its place in the list, from 0.
    pub index: usize,
    /// The command's name.
    pub command: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: CommandProblem,
}

/// What is wrong with a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandProblem {
    /// Nothing can be done to a tunnel that is not there.
    #[error("tunnel {0} is not defined; define it first")]
    UnknownTunnel(TunnelId),
    /// Nothing can be done to an SA that is not there.
    #[error("the {0} is not installed; install it first")]
    UnknownSa(SaId),
    /// Inbound SPIs are unique.
    #[error(
        "inbound SPI {spi} already belongs to tunnel {owner}; choose another, or remove that SA first"
    )]
    InboundSpiTaken {
        /// The SPI.
        spi: Spi,
        /// Whose it is.
        owner: TunnelId,
    },
    /// Outbound SPIs are unique within a tunnel.
    #[error("the {0} is already installed; remove it first")]
    OutboundInstalled(SaId),
    /// Two SAs with one key would use each (key, IV) pair twice.
    #[error(
        "its key is that of the {other}: two senders with one key use the same nonces (RFC 4106 §2); every SA and direction needs its own"
    )]
    KeyInUse {
        /// The SA that has the key.
        other: SaId,
    },
    /// One end has used the key's nonces already, in the other direction.
    #[error(
        "its key has been used in the other direction, whose nonces would come again (RFC 4106 §2); take a fresh key"
    )]
    KeyUsedOtherWay,
    /// The numbers' width cannot change under one key.
    #[error(
        "its key has counted with the other width of sequence numbers; keep ESN as it was or take a fresh key"
    )]
    EsnChanged,
    /// Sequence numbers start at 1 (RFC 4303 §2.2) and end.
    #[error("an SA cannot start at sequence number {first}; use 1 to {last}")]
    BadSequenceStart {
        /// As given.
        first: u64,
        /// The last number of this width.
        last: u64,
    },
    /// Nothing that arrives could fit.
    #[error(
        "an inbound SA without traffic selectors would refuse every packet; give at least one pair"
    )]
    NoSelectors,
    /// Only an SA that sends can do that.
    #[error("the {0} does not send; name an outbound SA")]
    NotOutbound(SaId),
    /// A retired SA never sends again.
    #[error("the {0} is retired and never sends again; install a successor and activate that")]
    Retired(SaId),
    /// Only the tunnel's own packets.
    #[error("a policy of tunnel {tunnel} protects with tunnel {other}; put it into that tunnel")]
    PolicyOfOtherTunnel {
        /// The tunnel being defined.
        tunnel: TunnelId,
        /// The one its policy names.
        other: TunnelId,
    },
    /// Two tunnels want the same packets with the same priority.
    #[error(
        "tunnels {first} and {second} both claim {selectors} with priority {priority}; give it to one, or different priorities"
    )]
    RouteClaimedTwice {
        /// One of them.
        first: TunnelId,
        /// The other.
        second: TunnelId,
        /// What both claim.
        selectors: Box<SelectorPair>,
        /// With which priority.
        priority: u32,
    },
    /// The peer cannot be there.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Nobody would fill in our address.
    #[error("the {0} has no local address, and no kernel fills it in here; name one")]
    NoLocalAddress(SaId),
}

/// A command's name for people.
pub(super) fn name(command: &SaCommand) -> &'static str {
    match command {
        SaCommand::DefineTunnel(_) => "define tunnel",
        SaCommand::RemoveTunnel(_) => "remove tunnel",
        SaCommand::Install(params) => match params.direction {
            Direction::Inbound => "install inbound SA",
            Direction::Outbound => "install outbound SA",
        },
        SaCommand::Activate { .. } => "activate",
        SaCommand::Retire { .. } => "retire",
        SaCommand::Remove(_) => "remove SA",
        SaCommand::MoveEndpoint { .. } => "move endpoint",
        SaCommand::ExtendSequence { .. } => "extend sequence",
    }
}
