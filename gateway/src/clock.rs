//! The one place that reads the clock and hands it on as [`Now`].

use esplane_api::Now;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Reads both clocks of the kernel. Cheap to copy; all copies share one origin.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock whose monotonic time starts now.
    pub fn start() -> Self {
        Self {
            origin: Instant::now(),
        }
    }

    /// This moment.
    pub fn now(self) -> Now {
        Now {
            monotonic: self.origin.elapsed(),
            unix: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or(Duration::ZERO),
        }
    }

    /// The moment `monotonic`, for timers of the runtime.
    pub fn instant(self, monotonic: Duration) -> Instant {
        self.origin + monotonic
    }
}
