//! What was found on the host; gathered by who has sockets and files.

use super::settings::Settings;
use crate::{
    importer::ImportName,
    vici::{CharonStats, CharonVersion, Connection, IkeSa, Mark, Names},
    xfrm::XfrmSa,
};
use std::fmt;

/// What was found on the host.
#[derive(Debug)]
pub struct Survey {
    /// Which charon.
    pub version: CharonVersion,
    /// How it is.
    pub stats: CharonStats,
    /// The connections it has loaded.
    pub connections: Vec<Connection>,
    /// Its IKE_SAs and CHILD_SAs.
    pub sas: Vec<IkeSa>,
    /// swanctl.conf and what it includes.
    pub swanctl_conf: Looked<Settings>,
    /// strongswan.conf and what it includes.
    pub strongswan_conf: Looked<Settings>,
    /// The kernel's SAs.
    pub kernel_sas: Looked<Vec<XfrmSa>>,
    /// The reqid of every policy of the kernel's.
    pub kernel_policies: Looked<Vec<u32>>,
    /// Which ESP SAs the kernel takes.
    pub kernel_esp: Looked<EspSupport>,
    /// What the kernel hides from root (`/sys/kernel/security/lockdown`).
    pub lockdown: Looked<Lockdown>,
    /// Whether charon's process has mode B's library.
    pub preloaded: Looked<bool>,
    /// The UDP ports that somebody listens at.
    pub udp_ports: Looked<Vec<u16>>,
    /// The mark of SAs that the kernel does not use.
    pub mark: Mark,
    /// How Esplane is to get the keys; found out, where it is not said.
    pub way: Option<Way>,
    /// What is looked at; all, where it is empty.
    pub only: Vec<ImportName>,
    /// What charon's names of protocols and services mean.
    pub names: Names,
}

/// How Esplane gets the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the kernel's SA database, where charon puts inert SAs (mode A).
    Kernel,
    /// From charon, by the preloaded library; for kernels that cannot (mode B).
    Preload,
}

/// What became of looking at something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Looked<T> {
    /// It was seen.
    Found(T),
    /// It could not be looked at; this is why.
    Unknown(String),
}

impl<T> Looked<T> {
    /// What was seen.
    pub fn found(&self) -> Option<&T> {
        match self {
            Self::Found(found) => Some(found),
            Self::Unknown(_) => None,
        }
    }

    /// The same of something else.
    pub fn map<U>(self, of: impl FnOnce(T) -> U) -> Looked<U> {
        match self {
            Self::Found(found) => Looked::Found(of(found)),
            Self::Unknown(why) => Looked::Unknown(why),
        }
    }
}

/// Which ESP SAs the kernel takes, found by asking it for some in a network namespace made for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EspSupport {
    /// Over IPv4.
    pub v4: bool,
    /// Over IPv6.
    pub v6: bool,
    /// Whether it has XFRM at all.
    pub xfrm: bool,
}

/// The kernel's lockdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lockdown {
    /// Nothing is hidden.
    None,
    /// The kernel's memory cannot be written.
    Integrity,
    /// It cannot be read either: keys read as zeros.
    Confidentiality,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Preload => "preload",
        })
    }
}
