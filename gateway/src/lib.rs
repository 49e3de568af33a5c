//! gw
pub mod hold;
pub mod io;
pub mod reservation;
pub mod worker;
