//! Anonymous network namespaces: machines made of nothing but a file descriptor.

use nix::sched::{CloneFlags, setns, unshare};
use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::resume_unwind,
    thread::{Builder, JoinHandle, ScopedJoinHandle, scope},
};

/// A network namespace without a name in the file system. It lasts as long as this descriptor, or a
/// thread or process within it: when the demo dies, however it dies, the kernel clears it away
/// together with its links.
#[derive(Debug)]
pub struct Namespace {
    name: &'static str,
    descriptor: OwnedFd,
}

impl Namespace {
    /// A new, empty namespace: a loopback interface that is down, nothing else.
    pub fn create(name: &'static str) -> io::Result<Self> {
        let descriptor = in_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        })?;
        Ok(Self {
            name,
            descriptor: descriptor.into(),
        })
    }

    /// What the picture calls it.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// For moving links into it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    /// Does something within it, in a thread of its own, and waits for the outcome.
    pub fn enter<T: Send>(&self, job: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        in_a_thread(|| {
            self.move_this_thread()?;
            job()
        })
    }

    /// Does something asynchronous within it and waits for the outcome.
    pub fn enter_async<T: Send>(&self, job: impl AsyncFnOnce() -> T + Send) -> io::Result<T> {
        self.enter(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            Ok(runtime.enable_all().build()?.block_on(job()))
        })
    }

    /// Starts a thread within it.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<JoinHandle<io::Result<T>>> {
        let namespace = self.descriptor.try_clone()?;
        Builder::new()
            .name(format!("{}-{name}", self.name))
            .spawn(move || {
                setns(namespace, CloneFlags::CLONE_NEWNET)?;
                job()
            })
    }

    /// Writes a kernel parameter of this namespace, such as `net/ipv4/ip_forward`.
    pub fn set_parameter(&self, path: &str, value: &str) -> io::Result<()> {
        // /proc/sys/net shows the parameters of the namespace of the thread that looks.
        self.enter(|| std::fs::write(format!("/proc/sys/{path}"), value))
    }

    fn move_this_thread(&self) -> io::Result<()> {
        Ok(setns(&self.descriptor, CloneFlags::CLONE_NEWNET)?)
    }
}

/// Namespaces belong to threads: whoever changes his own had better not be needed elsewhere.
fn in_a_thread<T: Send>(job: impl FnOnce() -> T + Send) -> T {
    scope(|scope| {
        let thread: ScopedJoinHandle<'_, T> = scope.spawn(job);
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}
