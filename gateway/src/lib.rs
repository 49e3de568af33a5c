//! gw
pub mod demo;
pub mod hold;
pub mod io;
pub mod netlink;
pub mod reservation;
pub mod worker;
