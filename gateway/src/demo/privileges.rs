//! The right to make namespaces and TUN devices: from root, or from a user namespace of our own.

use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use std::{
    fs::{self, OpenOptions, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

const TUN: &str = "/dev/net/tun";

/// What is missing, and how to get it.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// No namespaces, not even a user namespace.
    #[error(
        "the demo needs network namespaces, and this process may not make any ({reason}).\n{advice}"
    )]
    NoNamespaces {
        /// The kernel's answer.
        reason: io::Error,
        /// What stands against it here, and the way round.
        advice: String,
    },
    /// No TUN device.
    #[error("the gateways need TUN devices, and {TUN} cannot be opened ({reason}).\n{advice}")]
    NoTun {
        /// The kernel's answer.
        reason: io::Error,
        /// The way round.
        advice: String,
    },
}

/// The proof that this process may do all the demo does, in a mount namespace of its own.
#[derive(Debug)]
pub struct Privileges {
    user_namespace: bool,
}

impl Privileges {
    /// Whether it took a user namespace.
    pub fn in_user_namespace(&self) -> bool {
        self.user_namespace
    }
}

/// Gets them. Must be called while the process has a single thread: the kernel moves no other into a
/// user namespace, and all later ones shall be in the mount namespace as well.
pub fn acquire() -> Result<Privileges, PrivilegeError> {
    let user_namespace = match unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => false,
        Err(_) => {
            become_root_of_a_user_namespace().map_err(|reason| no_namespaces(reason.into()))?;
            true
        }
    };
    // Making one is the only way to know: AppArmor lets a user namespace be made and then refuses.
    std::thread::scope(|scope| {
        let attempt = scope.spawn(|| unshare(CloneFlags::CLONE_NEWNET));
        attempt.join().unwrap_or(Err(Errno::EAGAIN))
    })
    .map_err(|reason| no_namespaces(reason.into()))?;
    let opened = OpenOptions::new().read(true).write(true).open(TUN);
    opened.map_err(|reason| no_tun(reason, user_namespace))?;
    Ok(Privileges { user_namespace })
}

/// In there this user has all capabilities, over what is made in there only.
fn become_root_of_a_user_namespace() -> nix::Result<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    let write = |file: &str, text: &str| {
        fs::write(format!("/proc/self/{file}"), text)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    };
    // Without this, the kernel refuses the group map (user_namespaces(7)).
    write("setgroups", "deny")?;
    write("uid_map", &format!("0 {} 1", user.as_raw()))?;
    write("gid_map", &format!("0 {} 1", group.as_raw()))
}

fn no_namespaces(reason: io::Error) -> PrivilegeError {
    let setting = |path: &str| {
        let text = fs::read_to_string(format!("/proc/sys/{path}")).unwrap_or_default();
        text.trim().to_owned()
    };
    let mut advice = String::from(match rustix::process::geteuid().is_root() {
        true => "This root has not all of root's rights.",
        false => "Run it as root.",
    });
    for (path, forbids, allows) in [
        ("user/max_user_namespaces", "0", "15000"),
        ("user/max_net_namespaces", "0", "15000"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ] {
        if setting(path) == forbids {
            let name = path.replace('/', ".");
            advice += &format!(
                "\n{name} is {forbids}, which forbids namespaces; as root: sysctl -w {name}={allows}"
            );
        }
    }
    advice += "\nIn a container it needs CAP_SYS_ADMIN and CAP_NET_ADMIN and /dev/net/tun; for \
               docker: --cap-add SYS_ADMIN --cap-add NET_ADMIN --device /dev/net/tun \
               --security-opt seccomp=unconfined --security-opt apparmor=unconfined";
    PrivilegeError::NoNamespaces { reason, advice }
}

fn no_tun(reason: io::Error, user_namespace: bool) -> PrivilegeError {
    let advice = match fs::metadata(TUN) {
        Err(_) => "As root: modprobe tun (in a container: pass the device in, for docker --device /dev/net/tun).".to_owned(),
        Ok(metadata) => {
            let mode = metadata.permissions().mode() & 0o777;
            let way = if user_namespace {
                "Run the demo as root, or let users open the device, as most distributions do; as root: \
                 chmod 0666 /dev/net/tun (making an interface still needs CAP_NET_ADMIN)."
            } else {
                "The kernel's `tun` module or the container's device policy is in the way; as root: modprobe tun."
            };
            format!("Its mode is {mode:04o}. {way}")
        }
    };
    PrivilegeError::NoTun { reason, advice }
}

/// A directory for configurations, keys and sockets. It lies in memory that only this process and its
/// children see, where the kernel allows that: then nothing remains however the demo ends. Else in the
/// directory for temporary files; then it is removed on drop.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes it, with mode 0700.
    pub fn create(_: &Privileges) -> io::Result<Self> {
        let base = private_memory().unwrap_or_else(std::env::temp_dir);
        let directory = base.join(format!("esplane-demo-{}", std::process::id()));
        fs::create_dir(&directory)?;
        let scratch = Self(directory);
        fs::set_permissions(scratch.path(), Permissions::from_mode(0o700))?;
        Ok(scratch)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nobody is left to tell.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A file system in memory, over a directory that programs do without, in our mount namespace only
/// (hence the [`Privileges`] above: elsewhere this would hide the directory from everybody).
fn private_memory() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let place = ["/mnt", "/media", "/srv", "/opt"]
        .into_iter()
        .map(Path::new)
        .find(|place| place.is_dir() && !program.starts_with(place))?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .ok()?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", place, "tmpfs", flags, c"mode=0700,size=16m").ok()?;
    Some(place.to_owned())
}
