//! Key files: read once, only if nobody else can read them.

use esplane_control_noise::{PresharedKey, StaticSecretKey};
use std::{
    fs::File,
    io::Read,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};
use zeroize::Zeroizing;

/// A key is a line of base64 or hexadecimal digits.
const MAX_KEY_FILE_BYTES: u64 = 4096;

/// Why a key file gave no key.
#[derive(Debug, thiserror::Error)]
pub(super) enum SecretError {
    #[error("{0} does not exist; {1}")]
    Missing(PathBuf, &'static str),
    #[error("cannot read {0}: {1}")]
    Unreadable(PathBuf, std::io::Error),
    #[error("{0} is no regular file; name the file that holds the key")]
    NoFile(PathBuf),
    #[error("{file} can be read or written by others (mode {mode:04o}); run: chmod 600 {file}", file = .0.display(), mode = .1)]
    Exposed(PathBuf, u32),
    #[error("{0} belongs to user {1}; it must belong to root or to the user that runs the daemon")]
    Foreign(PathBuf, u32),
    #[error("{0} is too large to hold one key")]
    TooLarge(PathBuf),
    #[error("{0} holds no {1}; {2}")]
    Content(PathBuf, &'static str, &'static str),
}

pub(super) fn private_key(file: &Path) -> Result<StaticSecretKey, SecretError> {
    key(
        file,
        "private key",
        "make one with `esplane keygen -o FILE`",
    )
}

pub(super) fn preshared_key(file: &Path) -> Result<PresharedKey, SecretError> {
    key(file, "pre-shared key", "make one with `esplane genpsk`")
}

fn key<K: FromStr>(
    file: &Path,
    what: &'static str,
    advice: &'static str,
) -> Result<K, SecretError> {
    let text = text(file, advice)?;
    text.trim()
        .parse()
        .map_err(|_| SecretError::Content(file.to_owned(), what, advice))
}

/// The text of a file that only its owner can read or write.
pub(super) fn text(file: &Path, advice: &'static str) -> Result<Zeroizing<String>, SecretError> {
    let unreadable = |error| SecretError::Unreadable(file.to_owned(), error);
    let opened = match File::open(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(SecretError::Missing(file.to_owned(), advice));
        }
        result => result.map_err(unreadable)?,
    };
    // Of the opened file, not of the name: nobody can exchange it in between.
    let metadata = opened.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(SecretError::NoFile(file.to_owned()));
    }
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Exposed(file.to_owned(), mode));
    }
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(SecretError::Foreign(file.to_owned(), owner));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_KEY_FILE_BYTES as usize + 1));
    opened
        .take(MAX_KEY_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > MAX_KEY_FILE_BYTES {
        return Err(SecretError::TooLarge(file.to_owned()));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => Err(SecretError::Content(file.to_owned(), "text", advice)),
    }
}
