//! What the importer wants done, and what it shows.

use super::ImportNotice;
use crate::{
    vici::{ChildState, ViciRequest},
    xfrm::XfrmRequest,
};
use esplane_api::{Direction, SaCommand, SelectorPair, Spi, TunnelId};
use std::net::SocketAddr;

/// What the importer wants done, in this order.
#[derive(Clone, Debug)]
pub enum ImportOutput {
    /// Have the dataplane carry out all of these at once. If it refuses, say so by
    /// [`super::Importer::handle_refusal`] before the next output is taken.
    Commands(Vec<SaCommand>),
    /// Tell the kernel.
    Xfrm(XfrmRequest),
    /// Ask charon.
    Vici(ViciRequest),
    /// Tell the operator.
    Notice(ImportNotice),
}

/// One imported child as a person wants to see it: its present CHILD_SA and those that come and go with it.
#[derive(Clone, Debug, PartialEq)]
pub struct ChildStatus {
    /// The connection's name in swanctl.conf.
    pub connection: String,
    /// The child's name in swanctl.conf.
    pub child: String,
    /// The tunnel it is carried in; `None` while it is not.
    pub tunnel: Option<TunnelId>,
    /// The tunnel's name, unlike any other tunnel's: `CONNECTION/CHILD`, with a number behind it where a child
    /// is up several times.
    pub name: String,
    /// The kernel's reqid; 0 for a trap, whose reqid charon keeps to itself.
    pub reqid: u32,
    /// charon's number of the IKE_SA.
    pub ike_unique_id: Option<u32>,
    /// charon's numbers of its CHILD_SAs, oldest first.
    pub unique_ids: Vec<u32>,
    /// The newest one's state; `None` where charon knows none.
    pub state: Option<ChildState>,
    /// Whether packets can ask for it (`start_action = trap`).
    pub on_demand: bool,
    /// Our identity.
    pub local_id: String,
    /// The peer's identity.
    pub remote_id: String,
    /// Our end; the port is IKE's.
    pub local: Option<SocketAddr>,
    /// The peer's end.
    pub remote: Option<SocketAddr>,
    /// Which packets belong to it.
    pub selectors: Vec<SelectorPair>,
    /// Its SAs.
    pub sas: Vec<ImportedSa>,
}

/// One SA of an imported child.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportedSa {
    /// Its SPI.
    pub spi: Spi,
    /// Which way it goes.
    pub direction: Direction,
    /// charon's number of the CHILD_SA, where it has told already.
    pub unique_id: Option<u32>,
    /// Whether the dataplane has it.
    pub installed: bool,
    /// Why the dataplane does not have it.
    pub problem: Option<String>,
}
