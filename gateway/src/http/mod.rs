//! The HTTP server: metrics and status for everybody it listens to, changes on the unix socket only.
//!
//! ```text
//!   TCP  127.0.0.1:9470 ──┐                     ┌── GET  /metrics /healthz /readyz
//!                         ├── bounded, timed ───┼── GET  /v1/status /v1/peers /v1/sas /v1/routes /v1/drops
//!   unix esplane.sock ────┘   (server.rs)       └── POST /v1/static-sas, DELETE /v1/static-sas/NAME  (unix only)
//!                                                   (routes.rs)
//! ```
//!
//! Everything a stranger could fill is bounded: connections, header bytes, header time, body bytes,
//! total time. Nothing that is served is secret; who may write is decided by the socket's mode, 0600.

mod routes;
mod server;
mod socket;
#[cfg(test)]
mod tests;

pub use server::{BindError, Server};

use crate::{
    config::{StaticSa, StaticSaContext},
    status::Status,
};
use std::future::Future;

/// What the server serves; the daemon's control loop, or a fake in tests.
pub trait Backend: Clone + Send + Sync + 'static {
    /// Everything at this moment.
    fn status(&self) -> impl Future<Output = Result<Status, Gone>> + Send;

    /// What a static SA is checked against before it is handed on.
    fn static_sa_context(&self) -> StaticSaContext;

    /// Installs a tunnel that is keyed by hand.
    fn install_static(&self, sa: StaticSa) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// Removes one that was installed by [`Backend::install_static`] or the configuration.
    fn remove_static(&self, name: String) -> impl Future<Output = Result<(), ApplyError>> + Send;
}

/// The control loop has ended: the daemon is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the daemon is stopping")]
pub struct Gone;

/// Why a change was not made. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Gone,
    /// No such tunnel.
    #[error("there is no static SA `{0}`")]
    Unknown(String),
    /// It contradicts what is installed: a name, SPI, key or route is taken.
    #[error("{message}")]
    Conflict {
        /// The document's key that is to blame, such as `inbound.spi`.
        path: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// It could not be carried out, and that is our fault or the machine's.
    #[error("{0}")]
    Failed(String),
}
