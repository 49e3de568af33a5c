//! The Esplane daemon: drivers, workers, configuration, HTTP, Prometheus.
pub mod clock;
pub mod node;
