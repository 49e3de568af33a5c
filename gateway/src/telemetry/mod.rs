//! What operators watch: the log on stderr, and Prometheus metrics.

pub mod logging;
pub mod metrics;
