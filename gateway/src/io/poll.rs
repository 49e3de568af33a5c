//! Sleeping until something arrives, and being woken by another thread.

use super::{DESCRIPTORS_MAX, Descriptors};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

/// Wakes a thread that sleeps in [`wait`]. Clones wake the same thread.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// A fresh one, not yet ringing.
    pub fn new() -> io::Result<Self> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(descriptor)))
    }

    /// Ends the sleep, or the next one if the thread is awake. Never blocks.
    pub fn wake(&self) {
        // The only failure is a counter about to overflow, and then it rings anyway.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Takes note: sleeps last again until the next [`Waker::wake`].
    pub fn clear(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.0, &mut count);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Woken {
    /// The waker rang.
    pub by_waker: bool,
    /// Some driver has something to receive.
    pub by_driver: bool,
    /// Some descriptor is in trouble; receiving tells.
    pub by_error: bool,
}

/// Sleeps until `waker` rings, one of `descriptors` is readable, or `timeout` is over.
pub fn wait(
    waker: &Waker,
    descriptors: &[Descriptors<'_>],
    timeout: Option<Duration>,
) -> io::Result<Woken> {
    let mut polled: arrayvec::ArrayVec<PollFd<'_>, { 1 + 2 * DESCRIPTORS_MAX }> =
        arrayvec::ArrayVec::new();
    polled.push(PollFd::new(waker, PollFlags::IN));
    for descriptor in descriptors.iter().flatten() {
        // Two drivers fit; a third one's surplus would only be slow, not lost.
        let _ = polled.try_push(PollFd::from_borrowed_fd(*descriptor, PollFlags::IN));
    }
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let trouble = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
    Ok(Woken {
        by_waker: polled[0].revents().contains(PollFlags::IN),
        by_driver: polled[1..]
            .iter()
            .any(|polled| polled.revents().contains(PollFlags::IN)),
        by_error: polled[1..]
            .iter()
            .any(|polled| polled.revents().intersects(trouble)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wake_before_the_sleep_is_not_lost_and_counts_once() {
        let waker = Waker::new().unwrap();
        waker.clone().wake();
        waker.wake();
        assert!(wait(&waker, &[], None).unwrap().by_waker);
        waker.clear();
        let woken = wait(&waker, &[], Some(Duration::ZERO)).unwrap();
        assert_eq!(
            woken,
            Woken {
                by_waker: false,
                by_driver: false,
                by_error: false
            }
        );
    }

    #[test]
    fn data_on_a_driver_ends_the_sleep() {
        let waker = Waker::new().unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let to_itself = socket.local_addr().unwrap();
        socket.send_to(b"x", to_itself).unwrap();
        let descriptors = [Descriptors::from_iter([socket.as_fd()])];
        let woken = wait(&waker, &descriptors, None).unwrap();
        assert!(woken.by_driver && !woken.by_waker);
    }
}
