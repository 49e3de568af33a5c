//! gw
pub mod demo;
pub mod netlink;
