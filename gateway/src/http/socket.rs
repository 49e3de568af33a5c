//! The unix socket's file: made private, stale ones replaced, removed at the end.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};
use tokio::net::UnixListener;

/// Why the socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Two daemons would fight over it.
    #[error("a daemon answers at {0} already; stop it, or give this one its own `api.socket`")]
    InUse(PathBuf),
    /// Not ours to remove.
    #[error("{0} exists and is no socket; remove it, or choose another `api.socket`")]
    NoSocket(PathBuf),
    /// The system refused.
    #[error("cannot {what} {path}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
}

/// A listening socket whose file goes when it goes.
#[derive(Debug)]
pub(super) struct OwnedSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode: a later daemon's socket of the same name is not ours to remove.
    file: (u64, u64),
}

impl OwnedSocket {
    pub(super) fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |what| {
            move |error| SocketError::System {
                what,
                path: path.to_owned(),
                error,
            }
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory).map_err(failed("create the directory of"))?;
        refuse_taken(path)?;
        // Made under another name and moved: at no moment does the real name lead to a socket that
        // others may write to, and a stale one is replaced in one step.
        let temporary = directory.join(format!(".esp{}", std::process::id()));
        let _ = fs::remove_file(&temporary);
        let listener = UnixListener::bind(&temporary).map_err(failed("listen at"))?;
        let moved = fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::symlink_metadata(&temporary))
            .and_then(|metadata| fs::rename(&temporary, path).map(|()| metadata));
        let metadata = moved.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            failed("make private")(error)
        })?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            file: (metadata.dev(), metadata.ino()),
        })
    }
}

/// Only a socket at which nobody answers may be replaced.
fn refuse_taken(path: &Path) -> Result<(), SocketError> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(SocketError::System {
                what: "look at",
                path: path.to_owned(),
                error,
            });
        }
        Ok(metadata) => metadata,
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(SocketError::System {
            what: "find out whether a daemon answers at",
            path: path.to_owned(),
            error,
        }),
    }
}

impl Drop for OwnedSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}
