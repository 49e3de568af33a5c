//! No packet costs an allocation: an allocator that counts watches batches of every kind, both ways, after the first.
#![allow(unsafe_code)] // an allocator cannot be written without

mod common;
use common::*;
use esplane_dataplane::*;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

struct Counting;

thread_local! {
    /// Allocations of this thread; tests run on others as well.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that ends has no counter any more, and packets neither.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    assert!(allocations_of(|| drop(std::hint::black_box(vec![1_u8; 100]))) > 0);
}

/// Packets that leave and arrive, packets without a policy, malformed ones, forged ones, replayed ones, one after the
/// other and in one batch.
#[test]
fn a_batch_allocates_nothing_whatever_it_holds() {
    for (headers, udp) in [
        (OuterHeaders::Written, false),
        (OuterHeaders::Written, true),
        (OuterHeaders::ByKernel, true),
    ] {
        let scene = Scene {
            headers,
            udp,
            ..Scene::default()
        };
        let (mut west, mut east) = scene.build();
        let (west_tables, east_tables) = (west.writer.tables(), east.writer.tables());
        let arriving = match headers {
            OuterHeaders::Written => Outer::NONE,
            OuterHeaders::ByKernel => scene.outer_at_east(),
        };
        let mut batch = Batch::new(128, 2048);
        let mut replayed = Batch::new(128, 2048);
        for round in 0..3 {
            batch.clear();
            for index in 0..128 {
                let packet = match index % 8 {
                    5 => vec![0x45; 7],
                    6 => ipv4(ip("10.0.0.1"), ip("203.0.113.9"), 17, 0, &[0; 8]),
                    7 => inner(true, index),
                    _ => inner(false, index * 9),
                };
                assert!(batch.push(&packet, Outer::NONE));
            }
            let sealing = allocations_of(|| {
                west.outbound
                    .process(&west_tables, &mut batch, &mut west.report)
            });
            replayed.clear();
            for index in 0..batch.len() {
                if batch.packets()[index].verdict == Verdict::Forward {
                    let mut data = batch.data(index).to_vec();
                    if index % 16 == 3 {
                        data[60] ^= 1; // forged
                    }
                    assert!(replayed.push(&data, arriving));
                }
            }
            assert!(replayed.len() > 60, "{headers:?}, round {round}");
            let copies: Vec<Vec<u8>> = (0..replayed.len())
                .map(|index| replayed.data(index).to_vec())
                .collect();
            let opening = allocations_of(|| {
                east.inbound
                    .process(&east_tables, &mut replayed, &mut east.report)
            });
            replayed.clear();
            for data in &copies {
                assert!(replayed.push(data, arriving));
            }
            let refusing = allocations_of(|| {
                east.inbound
                    .process(&east_tables, &mut replayed, &mut east.report)
            });
            assert_eq!(
                (sealing, opening, refusing),
                (0, 0, 0),
                "{headers:?}, round {round}"
            );
        }
        use esplane_api::DropReason::*;
        for reason in [AuthenticationFailed, ReplayDuplicate] {
            assert!(east.drops(reason) > 0, "{reason:?} must have been met");
        }
        for reason in [InnerMalformed, NoPolicy] {
            assert!(west.drops(reason) > 0, "{reason:?} must have been met");
        }
    }
}
