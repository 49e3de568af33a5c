//! demo
mod namespaces;
mod topology;
mod traffic;
mod wiretap;
use crate::netlink::NetlinkError;
use std::io;

/// Why the demo could not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A namespace could not be made.
    #[error("cannot make a network namespace for {name}: {source}")]
    Namespace {
        /// Whose.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Netlink refused.
    #[error("{machine}: {source}")]
    Configure {
        /// Where.
        machine: &'static str,
        /// Why.
        source: NetlinkError,
    },
    /// A system call failed.
    #[error("cannot {action} {machine}: {source}")]
    Io {
        /// What.
        action: &'static str,
        /// Where.
        machine: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl DemoError {
    fn io(action: &'static str, machine: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            machine,
            source,
        }
    }
}

#[cfg(test)]
mod tests;
