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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Paper {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    impl io::Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log(level: LevelFilter, format: LogFormat) -> Log {
        Log { level, format }
    }

    fn on_paper(log: &Log, story: impl FnOnce(&LogHandle, &Paper)) {
        let paper = Paper::default();
        let writer = paper.clone();
        let (subscriber, handle) = subscriber(log, false, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || story(&handle, &paper));
    }

    #[test]
    fn machines_get_one_json_object_a_line() {
        on_paper(&log(LevelFilter::INFO, LogFormat::Json), |_, paper| {
            tracing::info!(peer = "paris", packets = 3, "tunnel \"up\"\nagain");
            let line = paper.take();
            assert_eq!(line.matches('\n').count(), 1, "{line}");
            let event: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(
                (&event["level"], &event["peer"]),
                (&"INFO".into(), &"paris".into())
            );
            assert_eq!(
                (&event["packets"], &event["message"]),
                (&3.into(), &"tunnel \"up\"\nagain".into())
            );
        });
    }

    #[test]
    fn people_get_a_line_without_escape_sequences_when_it_is_no_terminal() {
        on_paper(&log(LevelFilter::INFO, LogFormat::Human), |_, paper| {
            tracing::warn!(peer = "paris", "tunnel down");
            let line = paper.take();
            assert!(
                line.contains("WARN") && line.contains("tunnel down") && line.contains("paris"),
                "{line}"
            );
            assert!(!line.contains('\u{1b}'), "{line}");
        });
    }

    #[test]
    fn a_reload_changes_the_level_of_the_running_log() {
        on_paper(
            &log(LevelFilter::INFO, LogFormat::Human),
            |handle, paper| {
                tracing::debug!("unheard");
                handle.reload(&log(LevelFilter::DEBUG, LogFormat::Human));
                tracing::debug!("heard");
                handle.reload(&log(LevelFilter::OFF, LogFormat::Human));
                tracing::error!("silenced");
                let lines = paper.take();
                assert!(
                    lines.contains("heard")
                        && !lines.contains("unheard")
                        && !lines.contains("silenced"),
                    "{lines}"
                );
            },
        );
    }
}
