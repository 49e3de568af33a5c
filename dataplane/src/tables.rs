//! SAD, SPD and tunnels: one writer, immutable snapshots for the workers.
use crate::Aead;
use esplane_api::*;
use std::sync::Arc;

/// How the dataplane hands over outer packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who writes the outer IP and UDP headers.
    pub outer_headers: OuterHeaders,
}

/// Who writes and reads outer IP and UDP headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OuterHeaders {
    /// The kernel, behind sockets: data starts at the ESP header (or, inbound, at the UDP payload); the rest is in `PacketBuf::outer`.
    ByKernel,
    /// The dataplane (AF_XDP, captures, simulations): data starts at the outer IP header.
    Written,
}

/// Why a list of commands was refused as a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("command {} of the list ({command}): {problem}", index + 1)]
pub struct CommandError {
    /// Its place in the list, from 0.
    pub index: usize,
    /// The command's name.
    pub command: &'static str,
    /// What is wrong with it.
    pub problem: CommandProblem,
}

/// What is wrong with a command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandProblem {
    /// Define it first.
    #[error("tunnel {0} is not defined; define it first")]
    UnknownTunnel(TunnelId),
}

/// The control side: the only one that changes SAD, SPD and tunnels.
pub struct TableWriter {
    _settings: Settings,
    _aead: Aead,
    tables: Arc<Tables>,
}

/// What the workers see.
pub struct Tables {}

impl TableWriter {
    /// Without any tunnel.
    pub fn new(settings: Settings, aead: Aead) -> Self {
        Self {
            _settings: settings,
            _aead: aead,
            tables: Arc::new(Tables {}),
        }
    }

    /// Carries out all commands, or none.
    pub fn apply(&mut self, _now: Now, _commands: Vec<SaCommand>) -> Result<(), CommandError> {
        Ok(())
    }

    /// The newest snapshot.
    pub fn tables(&self) -> Arc<Tables> {
        self.tables.clone()
    }

    /// Ends what has lived its seconds.
    pub fn tick(&mut self, _now: Now) -> Vec<SaEvent> {
        Vec::new()
    }

    /// Every SA.
    pub fn sas(&self) -> Vec<SaStatus> {
        Vec::new()
    }

    /// Every tunnel.
    pub fn tunnels(&self) -> Vec<TunnelStatus> {
        Vec::new()
    }

    /// What every tunnel has carried.
    pub fn activity(&self) -> Vec<TunnelActivity> {
        Vec::new()
    }

    /// Whether an inbound SA has this SPI.
    pub fn uses_inbound_spi(&self, _spi: Spi) -> bool {
        false
    }
}
