//! gw
pub mod hold;
pub mod io;
pub mod worker;
