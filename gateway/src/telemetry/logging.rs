//! The log: one line an event on stderr, for people or as JSON.

use crate::config::{Log, LogFormat};
use std::io::{self, IsTerminal};
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    Layer, Registry, fmt, fmt::MakeWriter, layer::SubscriberExt, registry::LookupSpan, reload,
};

/// Changes the level of the running log.
#[derive(Clone, Debug)]
pub struct LogHandle(reload::Handle<LevelFilter, Registry>);

/// The log has been set up before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the log is set up already")]
pub struct AlreadySet;

/// Sets up the log of the whole process.
pub fn init(log: &Log) -> Result<LogHandle, AlreadySet> {
    let colours = io::stderr().is_terminal();
    let (subscriber, handle) = subscriber(log, colours, io::stderr);
    tracing::subscriber::set_global_default(subscriber).map_err(|_| AlreadySet)?;
    Ok(handle)
}

impl LogHandle {
    /// For SIGHUP: takes the level; the format stays until a restart.
    pub fn reload(&self, log: &Log) {
        // Fails only once the subscriber is gone, when there is nothing to filter any more.
        let _ = self.0.reload(log.level);
    }
}

fn subscriber<W>(log: &Log, colours: bool, writer: W) -> (impl Subscriber + Send + Sync, LogHandle)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(log.level);
    let lines = lines(log.format, colours, writer);
    (
        Registry::default().with(filter).with(lines),
        LogHandle(handle),
    )
}

fn lines<S, W>(format: LogFormat, colours: bool, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    match format {
        LogFormat::Human => fmt::layer()
            .with_ansi(colours)
            .with_target(false)
            .with_writer(writer)
            .boxed(),
        LogFormat::Json => fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(writer)
            .boxed(),
    }
}
