//! The kernel's driver beside the rings of one side: seldom has anything, and asking it costs system calls.

use crate::io::{DESCRIPTORS_MAX, Descriptors, Driver, Traffic};
use arrayvec::ArrayVec;
use esplane_api::DropCounters;
use esplane_dataplane::Batch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;

/// How often it goes before the rings, so that these cannot starve it.
const FIRST_EVERY: u32 = 8;

/// The sockets, or the TUN.
pub(super) struct Beside {
    driver: Box<dyn Driver>,
    turn: u32,
    /// It may have received more than it could hand over: the batch was full.
    holds_back: bool,
}

impl Beside {
    pub(super) fn new(driver: Box<dyn Driver>) -> Self {
        Self {
            driver,
            turn: 0,
            holds_back: false,
        }
    }

    /// Fills the batch from rings and kernel. The kernel is asked now and then first, and whenever the rings have brought nothing.
    pub(super) fn receive(
        &mut self,
        batch: &mut Batch,
        drops: &mut DropCounters,
        rings: impl FnOnce(&mut Batch, &mut DropCounters),
    ) -> io::Result<()> {
        self.turn = self.turn.wrapping_add(1);
        if self.turn.is_multiple_of(FIRST_EVERY) {
            self.receive_here(batch, drops)?;
            rings(batch, drops);
            return Ok(());
        }
        rings(batch, drops);
        match batch.is_empty() {
            true => self.receive_here(batch, drops),
            false => Ok(()),
        }
    }

    fn receive_here(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        if self.holds_back || self.is_readable() {
            self.driver.receive(batch, drops)?;
            self.holds_back = batch.is_full();
        }
        Ok(())
    }

    /// One system call instead of one a socket. Trouble counts: receiving tells what it is.
    fn is_readable(&self) -> bool {
        const NOW: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let descriptors = self.driver.poll_descriptors();
        let mut polled: ArrayVec<PollFd<'_>, DESCRIPTORS_MAX> = descriptors
            .iter()
            .map(|descriptor| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN))
            .collect();
        !matches!(poll(&mut polled, Some(&NOW)), Ok(0))
    }

    pub(super) fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        self.driver.transmit(batch, drops)
    }

    pub(super) fn count_lost(&mut self, drops: &mut DropCounters) {
        self.driver.count_lost(drops);
    }

    pub(super) fn poll_descriptors(&self) -> Descriptors<'_> {
        self.driver.poll_descriptors()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Waker;
    use esplane_dataplane::Outer;
    use std::{
        os::fd::AsFd,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
    };

    /// Has packets, of which its descriptor tells once, as a socket does whose one message was many packets.
    struct Packets {
        arrived: Waker,
        waiting: Arc<AtomicUsize>,
        asked: Arc<AtomicUsize>,
    }

    impl Driver for Packets {
        fn receive(&mut self, batch: &mut Batch, _: &mut DropCounters) -> io::Result<()> {
            self.asked.fetch_add(1, Relaxed);
            self.arrived.clear();
            while self.waiting.load(Relaxed) > 0 && batch.push(b"kernel", Outer::NONE) {
                self.waiting.fetch_sub(1, Relaxed);
            }
            Ok(())
        }

        fn transmit(&mut self, _: &mut Batch, _: &mut DropCounters) -> Traffic {
            Traffic::default()
        }

        fn count_lost(&mut self, _: &mut DropCounters) {}

        fn poll_descriptors(&self) -> Descriptors<'_> {
            Descriptors::from_iter([self.arrived.as_fd()])
        }
    }

    struct Story {
        beside: Beside,
        arrived: Waker,
        waiting: Arc<AtomicUsize>,
        asked: Arc<AtomicUsize>,
    }

    fn story() -> Story {
        let (arrived, waiting) = (Waker::new().unwrap(), Arc::<AtomicUsize>::default());
        let asked = Arc::<AtomicUsize>::default();
        let driver = Packets {
            arrived: arrived.clone(),
            waiting: Arc::clone(&waiting),
            asked: Arc::clone(&asked),
        };
        Story {
            beside: Beside::new(Box::new(driver)),
            arrived,
            waiting,
            asked,
        }
    }

    impl Story {
        fn arrive(&self, packets: usize) {
            self.waiting.store(packets, Relaxed);
            self.arrived.wake();
        }

        /// How many packets of the kernel's one receipt brings, into a batch of four, of which the rings fill some.
        fn receive(&mut self, by_rings: usize) -> usize {
            let (mut batch, mut drops) = (Batch::new(4, 2048), DropCounters::default());
            let rings = |batch: &mut Batch, _: &mut DropCounters| {
                for _ in 0..by_rings {
                    let _full = batch.push(b"ring", Outer::NONE);
                }
            };
            self.beside.receive(&mut batch, &mut drops, rings).unwrap();
            (0..batch.len())
                .filter(|index| batch.data(*index) == b"kernel")
                .count()
        }
    }

    #[test]
    fn an_idle_kernel_is_not_asked() {
        let mut story = story();
        assert_eq!((0..100).map(|_| story.receive(0)).sum::<usize>(), 0);
        assert_eq!(story.asked.load(Relaxed), 0);
        story.arrive(1);
        assert_eq!(story.receive(0), 1, "but at once when it has something");
    }

    #[test]
    fn what_is_held_back_comes_though_no_descriptor_tells() {
        let mut story = story();
        story.arrive(10);
        let receipts: Vec<usize> = (0..4).map(|_| story.receive(0)).collect();
        assert_eq!(receipts, [4, 4, 2, 0]);
    }

    #[test]
    fn busy_rings_do_not_starve_the_kernel() {
        let mut story = story();
        story.arrive(8);
        let receipts = (0..2 * FIRST_EVERY).map(|_| story.receive(4));
        assert_eq!(receipts.sum::<usize>(), 8);
    }
}
