use std::time::Duration;

/// The moment at which something is said to happen.
///
/// Pure crates never read a clock; whoever calls them passes the time. In the daemon it comes from
/// the kernel's clocks, in tests from a simulation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now {
    /// Time since an arbitrary origin; never goes back. All timers use this.
    pub monotonic: Duration,
    /// Time since 1970-01-01 00:00:00 UTC; may jump. Only handshake timestamps and displays use this.
    pub unix: Duration,
}

impl Now {
    /// The same moment, `later` further on, on both clocks.
    #[must_use]
    pub fn after(self, later: Duration) -> Self {
        Self {
            monotonic: self.monotonic + later,
            unix: self.unix + later,
        }
    }
}
