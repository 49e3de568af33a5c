//! gw
pub mod netlink;
