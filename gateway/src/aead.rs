//! Which AEAD implementation packets are sealed with: the fastest this CPU has, or the one that `ESPLANE_AEAD` names.

use esplane_dataplane::{Aead, aead::ChoiceError};
use std::env;

/// The variable that names one.
pub const VARIABLE: &str = "ESPLANE_AEAD";

/// A name in the environment that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("{VARIABLE}: {0}")]
pub struct AeadError(#[from] ChoiceError);

/// Asks the environment, then the CPU.
pub fn choose() -> Result<Aead, AeadError> {
    match env::var_os(VARIABLE) {
        None => Ok(Aead::detect()),
        // What is no Unicode is no name either, and is shown as well as it can be.
        Some(name) => Ok(Aead::named(&name.to_string_lossy())?),
    }
}
