//! Batches whose frames come and go, because drivers share them with the kernel.

use super::{Batch, Outer, Verdict, stock::Stock};
use crate::Memory;
use std::ops::Range;

impl Batch {
    /// Over memory cut into frames of `frame_bytes`, of which those with these numbers are the batch's.
    ///
    /// # Panics
    /// If the memory has not as many.
    pub fn lent(capacity: usize, frame_bytes: usize, memory: Memory, frames: Range<usize>) -> Self {
        assert!(
            frames.end * frame_bytes <= memory.arena().len(),
            "frames {frames:?} must lie within the memory"
        );
        let stock = Stock::new(frames, frame_bytes);
        Self::over(capacity, frame_bytes, memory, Some(stock))
    }

    /// Whether its frames come and go: it is [lent](Batch::lent) memory.
    pub fn is_lent(&self) -> bool {
        self.stock.is_some()
    }

    /// Lends a driver a spare frame, for the kernel to write into; answers where it lies.
    pub fn lend(&mut self) -> Option<Range<usize>> {
        self.stock.as_mut()?.lend()
    }

    /// Takes back the lent frame around this byte of the arena, with no packet in it. `false` if none was lent.
    pub fn give_back(&mut self, at: usize) -> bool {
        (self.stock.as_mut()).is_some_and(|stock| stock.give_back(at))
    }

    /// Takes back a lent frame with what the kernel has `written`; `read` says where the packet lies in that, and its outer
    /// side. `false` if no such frame was lent, or if there is no packet: `read` finds none, or there is no room for one. Then
    /// the frame is spare again.
    #[must_use]
    pub fn push_lent(
        &mut self,
        written: Range<usize>,
        read: impl FnOnce(&mut [u8]) -> Option<(Range<usize>, Outer)>,
    ) -> bool {
        let Some(stock) = &mut self.stock else {
            return false;
        };
        let Some(frame) = stock.arrive(written.start) else {
            return false;
        };
        let fits = self.packets.len() < self.capacity && written.end <= frame.end;
        let bytes = self.memory.arena_mut().get_mut(written.clone());
        let packet = bytes.filter(|_| fits).and_then(read);
        let packet = packet.filter(|(at, _)| at.start <= at.end && at.end <= written.len());
        match packet {
            Some((at, outer)) => {
                let data = written.start + at.start..written.start + at.end;
                self.add(frame, data, outer);
                true
            }
            None => {
                let _was_a_packets = stock.put_back(frame.start);
                false
            }
        }
    }

    /// Takes a packet that is to be sent out of the batch, frame and all; answers where its data lies. `None` if frames of this
    /// batch do not go away.
    pub fn take(&mut self, index: usize) -> Option<Range<usize>> {
        let (stock, packet) = (self.stock.as_mut()?, &mut self.packets[index]);
        stock.leave(packet.frame_start as usize).then(|| {
            let data = packet.data_range();
            packet.verdict = Verdict::Taken;
            packet.set_edges(packet.frame_start, packet.frame_start);
            data
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{prelude::*, test_runner::TestRng};
    use std::collections::VecDeque;

    const FRAME_BYTES: usize = 256;
    const FRAMES: Range<usize> = 10..42;
    const CAPACITY: usize = 8;

    fn batch() -> Batch {
        let memory = Memory::new(FRAMES.end * FRAME_BYTES);
        Batch::lent(CAPACITY, FRAME_BYTES, memory, FRAMES)
    }

    /// What the kernel has: frames to fill, and frames to send with what it was given in each.
    #[derive(Default)]
    struct Kernel {
        to_fill: VecDeque<usize>,
        to_send: VecDeque<(Range<usize>, Vec<u8>)>,
    }

    impl Kernel {
        /// The number of each frame that it or the batch has, sorted. Only after a clearing of the batch.
        fn all_frames(&self, batch: &mut Batch) -> Vec<usize> {
            let spare: Vec<_> = std::iter::from_fn(|| batch.lend()).collect();
            for frame in &spare {
                assert!(batch.give_back(frame.start));
            }
            let starts = spare.iter().map(|frame| frame.start);
            let starts = starts.chain(self.to_fill.iter().copied());
            let starts = starts.chain(self.to_send.iter().map(|(data, _)| data.start));
            let mut frames: Vec<_> = starts.map(|start| start / FRAME_BYTES).collect();
            frames.sort_unstable();
            frames
        }
    }

    /// Whatever becomes of packets: no frame is lost, none is in two places, and what is sent is what was written.
    #[test]
    fn no_frame_is_lost_or_doubled_whatever_becomes_of_its_packet() {
        let mut rng = TestRng::deterministic_rng(prop::test_runner::RngAlgorithm::ChaCha);
        let mut random = |below: u32| rng.next_u32() % below;
        let (mut batch, mut kernel) = (batch(), Kernel::default());
        for round in 0..20_000_u32 {
            // 1. What nobody took comes back; some of what was sent, too.
            batch.clear();
            for _ in 0..random(2 * CAPACITY as u32) {
                let Some((data, sent)) = kernel.to_send.pop_front() else {
                    break;
                };
                assert_eq!(
                    batch.bytes(data.clone()),
                    sent,
                    "untouched while it was away"
                );
                assert!(batch.give_back(data.start) && !batch.give_back(data.start));
            }
            // 2. Frames arrive, good and bad ones; some packets are written by ourselves.
            for number in 0..random(CAPACITY as u32 + 1) {
                if random(4) == 0 {
                    let _full = batch.push(&round.to_be_bytes(), Outer::NONE);
                    continue;
                }
                let Some(frame) = kernel.to_fill.pop_front() else {
                    break;
                };
                let written = frame + 100..frame + 140;
                let pushed = match random(8) {
                    0 => batch.push_lent(written, |_| None),
                    1 => batch.push_lent(written, |_| Some((30..41, Outer::NONE))),
                    2 => batch.push_lent(frame + 100..frame + 300, |_| unreachable!()),
                    3 => batch.push_lent(frame..usize::MAX, |_| unreachable!()),
                    _ => batch.push_lent(written, |bytes| {
                        bytes.fill(number as u8);
                        Some((4..40, Outer::NONE))
                    }),
                };
                let again = batch.push_lent(frame..frame, |_| unreachable!());
                assert!(!again && pushed <= !batch.is_empty());
            }
            // 3. The kernel gets some to fill.
            for _ in 0..random(CAPACITY as u32) {
                kernel.to_fill.extend(batch.lend().map(|frame| frame.start));
            }
            // 4. Some are sent, some not.
            for index in 0..batch.len() {
                batch.packets_mut()[index].verdict = Verdict::Forward;
                if random(3) > 0 {
                    let before = batch.data(index).to_vec();
                    let data = batch.take(index).expect("a packet has a frame");
                    assert_eq!(batch.take(index), None, "not twice");
                    assert_eq!(batch.packets()[index].verdict, Verdict::Taken);
                    assert!(batch.data(index).is_empty(), "its bytes are gone");
                    kernel.to_send.push_back((data, before));
                }
            }
            if round % 64 == 0 {
                batch.clear();
                assert_eq!(kernel.all_frames(&mut batch), FRAMES.collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_dry_stock_takes_no_packet_more_until_a_frame_comes_back() {
        let mut batch = batch();
        let lent: Vec<_> = std::iter::from_fn(|| batch.lend()).collect();
        assert_eq!(lent.len(), FRAMES.len());
        assert!(batch.is_full() && !batch.push(b"none", Outer::NONE));
        assert_eq!(batch.spare_frames().count(), 0);
        assert!(batch.give_back(lent[7].start + 200));
        assert!(batch.push(b"one", Outer::NONE) && batch.is_full());
        assert_eq!(batch.data(0), b"one");
    }

    #[test]
    fn frames_of_others_are_refused() {
        let mut batch = batch();
        let read = |_: &mut [u8]| -> Option<(Range<usize>, Outer)> { unreachable!() };
        for start in [
            0,
            FRAMES.start * FRAME_BYTES - 1,
            FRAMES.end * FRAME_BYTES,
            usize::MAX,
        ] {
            assert!(!batch.give_back(start) && !batch.push_lent(start..usize::MAX, read));
        }
        // Nor are its own before they were lent.
        let own = FRAMES.start * FRAME_BYTES;
        assert!(!batch.give_back(own) && !batch.push_lent(own..own + 9, read));
    }

    #[test]
    fn several_spare_frames_are_written_at_once_and_move_up() {
        let mut batch = batch();
        for (number, frame) in (1..).zip(batch.spare_frames()) {
            frame[..2].fill(number);
        }
        batch.push_received(2, Outer::NONE);
        batch.move_up(1, 2); // the second was no good
        batch.push_received(2, Outer::NONE);
        assert_eq!((batch.data(0), batch.data(1)), (&[1, 1][..], &[3, 3][..]));
        assert!(batch.spare_room().is_empty());
    }
}
