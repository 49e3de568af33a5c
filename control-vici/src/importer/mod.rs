//! The importer: facts of charon and the kernel in, commands for the dataplane out. Pure: no socket, no clock.

mod charon;
mod demand;
mod engine;
mod feedback;
mod kernel;
mod notice;
mod numbers;
mod output;
mod place;
mod reserve;
mod settings;
mod settle;
mod status;
mod tunnel;

pub use engine::Importer;
pub use notice::{ChildLabel, ImportEvent, ImportNotice, SaProblem, Severity};
pub use output::{ChildStatus, ImportOutput, ImportedSa};
pub use settings::{Database, ImportName, ImportSettings};
