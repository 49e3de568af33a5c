//! Ctrl-C and its relatives, noticed between any two steps.

use super::DemoError;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::signal::unix::{SignalKind, signal};

/// What a shell reports of a program that ended on Ctrl-C.
pub const EXIT_STATUS: u8 = 130;

/// Whether somebody wants the demo to end.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens for SIGINT, SIGTERM and SIGHUP from now on. The first one asks for an orderly end; at
    /// the second the process ends at once, and the kernel clears up: namespaces go with their last
    /// descriptor, gateways get SIGKILL with their parent's death, the scratch directory is in memory
    /// only this process sees.
    pub fn listen() -> io::Result<Self> {
        let interrupt = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (mut interrupted, mut terminated, mut hung_up) = runtime.block_on(async {
            Ok::<_, io::Error>((
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            ))
        })?;
        let flag = interrupt.0.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    loop {
                        tokio::select! {
                            _ = interrupted.recv() => {}
                            _ = terminated.recv() => {}
                            _ = hung_up.recv() => {}
                        }
                        if flag.swap(true, Relaxed) {
                            std::process::exit(EXIT_STATUS.into());
                        }
                    }
                });
            })?;
        Ok(interrupt)
    }

    /// An error if somebody does.
    pub fn check(&self) -> Result<(), DemoError> {
        match self.0.load(Relaxed) {
            true => Err(DemoError::Interrupted),
            false => Ok(()),
        }
    }

    /// Waits, unless interrupted.
    pub fn sleep(&self, duration: Duration) -> Result<(), DemoError> {
        let end = Instant::now() + duration;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
    }
}
