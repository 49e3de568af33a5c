//! What an operator decides about the import.

use crate::vici::Mark;
use esplane_api::{DfPolicy, TunnelId, WindowSize};
use std::fmt;

/// What an operator decides about the import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportSettings {
    /// The number of the first imported tunnel; the others follow. Far from those of the configuration.
    pub first_tunnel: TunnelId,
    /// Whose SA database it is, and so which of its SAs are ours to use.
    pub database: Database,
    /// What is imported; all, where it is empty.
    pub only: Vec<ImportName>,
    /// The smallest replay window; a larger one of charon's (`replay_window`) is kept.
    pub window: WindowSize,
    /// The Don't Fragment bit of outer IPv4 headers.
    pub df: DfPolicy,
    /// Whether a peer behind a NAT is followed when its address or port changes (RFC 7296 §2.23).
    pub roaming: bool,
}

impl Default for ImportSettings {
    fn default() -> Self {
        Self {
            first_tunnel: TunnelId(1 << 31),
            database: Database::Kernel { inert: Self::MARK },
            only: Vec::new(),
            window: WindowSize::DEFAULT,
            df: DfPolicy::default(),
            roaming: true,
        }
    }
}

impl ImportSettings {
    /// The mark that no packet ever has, unless told otherwise.
    pub const MARK: Mark = Mark {
        value: 0x00de_ad00,
        mask: 0xffff_ffff,
    };

    /// Whether this child is to be imported.
    pub fn imports(&self, connection: &str, child: &str) -> bool {
        let mut names = self.only.iter();
        self.only.is_empty() || names.any(|name| name.fits(connection, child))
    }
}

/// Whose SA database charon writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Database {
    /// The kernel's. Only an SA with this mark is surely not used by the kernel itself: two users of one
    /// SA would send the same nonces.
    Kernel {
        /// The mark in `mark_in` and `mark_out`.
        inert: Mark,
    },
    /// Esplane's own, which plays the kernel's part (mode B): every SA is ours.
    Esplane,
}

/// Names a connection, or one child of it, as swanctl.conf does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImportName {
    /// The connection.
    pub connection: String,
    /// The child; every one, where there is none.
    pub child: Option<String>,
}

impl ImportName {
    /// Whether it is this child's name, or its connection's.
    pub fn fits(&self, connection: &str, child: &str) -> bool {
        self.connection == connection && self.child.as_ref().is_none_or(|name| name == child)
    }
}

impl fmt::Display for ImportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.child {
            Some(child) => write!(f, "{}/{child}", self.connection),
            None => f.write_str(&self.connection),
        }
    }
}
