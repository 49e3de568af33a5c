//! `esplane keygen`, `pubkey`, `genpsk`: keys in WireGuard's text form, one line of base64.

use esplane_control_noise::{KeyTextError, PresharedKey, StaticSecretKey};
use std::{
    fs::OpenOptions,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// A line of base64 and some blanks.
const MAX_KEY_TEXT_BYTES: u64 = 4096;

/// Why no key was made or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyCommandError {
    /// The operating system gives no random bytes.
    #[error("the operating system's random source failed: {0}")]
    Random(getrandom::Error),
    /// A key is never overwritten: it may be the only copy.
    #[error("{0} exists already and may hold a key in use; name another file, or remove it first")]
    Exists(PathBuf),
    /// Reading or writing failed.
    #[error("{0}: {1}")]
    File(PathBuf, io::Error),
    /// What was read is no key.
    #[error("{0}: {1}")]
    Content(PathBuf, KeyTextError),
    /// Nobody reads what we print.
    #[error("cannot write the output: {0}")]
    Output(io::Error),
}

/// Makes a private key. Into `file` (mode 0600) it goes with the public key printed to `output`;
/// without a file the private key itself is printed.
pub fn keygen(file: Option<&Path>, output: &mut impl Write) -> Result<(), KeyCommandError> {
    let key = StaticSecretKey::generate(*random()?);
    match file {
        Some(file) => {
            write_new(file, &key.dangerous_to_base64())?;
            print(output, &key.public_key().to_string())
        }
        None => print(output, &key.dangerous_to_base64()),
    }
}

/// Prints the public key of the private key in `file`; `-` or nothing is standard input.
pub fn pubkey(
    file: Option<&Path>,
    input: &mut impl Read,
    output: &mut impl Write,
) -> Result<(), KeyCommandError> {
    let named = file.unwrap_or(Path::new("-"));
    let failed = |error| KeyCommandError::File(named.to_owned(), error);
    let mut text = Zeroizing::new(String::with_capacity(MAX_KEY_TEXT_BYTES as usize));
    match named.to_str() {
        Some("-") => input.take(MAX_KEY_TEXT_BYTES).read_to_string(&mut text),
        _ => std::fs::File::open(named)
            .map_err(failed)?
            .take(MAX_KEY_TEXT_BYTES)
            .read_to_string(&mut text),
    }
    .map_err(failed)?;
    let key: StaticSecretKey = text
        .parse()
        .map_err(|error| KeyCommandError::Content(named.to_owned(), error))?;
    print(output, &key.public_key().to_string())
}

/// Prints a fresh pre-shared key.
pub fn genpsk(output: &mut impl Write) -> Result<(), KeyCommandError> {
    print(
        output,
        &PresharedKey::generate(*random()?).dangerous_to_base64(),
    )
}

/// 32 bytes from the operating system.
pub fn random() -> Result<Zeroizing<[u8; 32]>, KeyCommandError> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(bytes.as_mut_slice()).map_err(KeyCommandError::Random)?;
    Ok(bytes)
}

fn write_new(file: &Path, text: &str) -> Result<(), KeyCommandError> {
    let mut options = OpenOptions::new();
    // The mode is set as the file is made: at no moment can anybody else open it.
    options.write(true).create_new(true).mode(0o600);
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => KeyCommandError::Exists(file.to_owned()),
        _ => KeyCommandError::File(file.to_owned(), error),
    };
    let mut opened = options.open(file).map_err(failed)?;
    writeln!(opened, "{text}").map_err(failed)?;
    opened.sync_all().map_err(failed)
}

fn print(output: &mut impl Write, text: &str) -> Result<(), KeyCommandError> {
    writeln!(output, "{text}").map_err(KeyCommandError::Output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn text(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).unwrap().trim_end()
    }

    #[test]
    fn a_private_key_goes_into_a_private_file_and_its_public_half_to_the_terminal() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("node.key");
        let (mut made, mut read) = (Vec::new(), Vec::new());
        keygen(Some(&file), &mut made).unwrap();
        assert_eq!(
            fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let secret = fs::read_to_string(&file).unwrap();
        assert_ne!(text(secret.as_bytes()), text(&made));
        pubkey(Some(&file), &mut io::empty(), &mut read).unwrap();
        assert_eq!(made, read);
        let mut piped = Vec::new();
        pubkey(None, &mut secret.as_bytes(), &mut piped).unwrap();
        assert_eq!(made, piped, "and the same from standard input");
    }

    #[test]
    fn an_existing_key_is_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("node.key");
        fs::write(&file, "in use").unwrap();
        let error = keygen(Some(&file), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "in use");
    }

    #[test]
    fn every_key_is_another_one() {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        keygen(None, &mut first).unwrap();
        keygen(None, &mut second).unwrap();
        assert_ne!(first, second);
        assert!(text(&first).parse::<StaticSecretKey>().is_ok());
        let mut shared = Vec::new();
        genpsk(&mut shared).unwrap();
        assert!(text(&shared).parse::<PresharedKey>().is_ok());
    }

    #[test]
    fn what_is_no_key_is_refused_without_repeating_it() {
        let error = pubkey(None, &mut &b"hunter2"[..], &mut Vec::new()).unwrap_err();
        let shown = error.to_string();
        assert!(
            shown.contains("-: not a key") && !shown.contains("hunter2"),
            "{shown}"
        );
        let endless = pubkey(None, &mut io::repeat(b'A'), &mut Vec::new());
        assert!(endless.is_err());
    }
}
