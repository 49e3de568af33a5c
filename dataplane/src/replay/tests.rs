use super::*;
use proptest::prelude::*;
use std::{
    collections::HashSet,
    sync::atomic::{AtomicU32, AtomicUsize},
    thread,
};

const TOO_OLD: Result<bool, DropReason> = Err(DropReason::ReplayTooOld);
const DUPLICATE: Result<bool, DropReason> = Err(DropReason::ReplayDuplicate);

fn window(packets: u32) -> ReplayWindow {
    ReplayWindow::new(WindowSize::new(packets).unwrap(), 0)
}

/// Checks, then commits, and insists that both agree.
fn receive(window: &ReplayWindow, number: u64) -> Result<bool, DropReason> {
    let checked = window.check(number);
    let committed = window.commit(number);
    assert_eq!(checked, committed.map(|_| ()), "number {number}");
    committed
}

/// The kinds of steps that Linux's `drivers/net/wireguard/selftest/counter.c` takes through its
/// window; it counts from 0 and ESP from 1.
#[test]
fn the_scenarios_of_wireguards_selftest() {
    const W: u64 = 8192;
    let w = window(W as u32);
    for (number, expected) in [
        (1, Ok(true)),
        (2, Ok(true)),
        (2, DUPLICATE),
        (10, Ok(true)),
        (9, Ok(false)),
        (8, Ok(false)),
        (10, DUPLICATE),
        (W, Ok(true)),
        (W - 1, Ok(false)),
        (W - 1, DUPLICATE),
        (W - 2, Ok(false)),
        (3, Ok(false)),
        (3, DUPLICATE),
        (W + 16, Ok(true)),
        (4, TOO_OLD),
        (W + 16, DUPLICATE),
        (W * 4, Ok(true)),
        (W * 4 - (W - 1), Ok(false)),
        (11, TOO_OLD),
        (W * 4 - W, TOO_OLD),
        (W * 4 - (W + 1), TOO_OLD),
        (W * 4 - (W - 2), Ok(false)),
        (W * 4 + 1 - W, DUPLICATE),
        (0, TOO_OLD),
    ] {
        assert_eq!(receive(&w, number), expected, "number {number}");
    }
}

#[test]
fn upwards_downwards_and_across_the_middle() {
    for packets in [32, 64, 96, 4096] {
        let size = u64::from(packets);
        let upwards = window(packets);
        for number in 1..=size {
            assert_eq!(receive(&upwards, number), Ok(true));
        }
        assert_eq!(receive(&upwards, 1), DUPLICATE);
        assert_eq!(receive(&upwards, 0), TOO_OLD);

        let downwards = window(packets);
        for number in (2..=size + 1).rev() {
            assert!(receive(&downwards, number).is_ok(), "{number}");
        }
        assert_eq!(receive(&downwards, 1), TOO_OLD);

        let outwards = window(packets);
        assert_eq!(receive(&outwards, size * 3), Ok(true));
        for number in (size * 2 + 1..size * 3).rev() {
            assert_eq!(receive(&outwards, number), Ok(false));
        }
        assert_eq!(receive(&outwards, size * 2), TOO_OLD);
        assert_eq!(receive(&outwards, size * 3 + 1), Ok(true));
        assert_eq!(receive(&outwards, size * 2 + 1), TOO_OLD);
    }
}

/// Every alignment of the head within a block: exactly the window is open, no number more or less.
#[test]
fn the_window_is_exact_at_every_alignment() {
    for packets in [32, 64, 992, 4096] {
        for head in (1_000_000..1_000_064).chain([(1 << 32) + 3, 1 << 37, (1 << 40) - 1]) {
            let w = ReplayWindow::new(WindowSize::new(packets).unwrap(), head - 20_000);
            for number in head - 10_000..=head {
                w.commit(number).unwrap();
            }
            let fresh = ReplayWindow::new(WindowSize::new(packets).unwrap(), head - 20_000);
            fresh.commit(head).unwrap();
            let lowest = head + 1 - u64::from(packets);
            assert_eq!(fresh.check(lowest - 1), Err(DropReason::ReplayTooOld));
            for number in lowest..head {
                assert_eq!(w.check(number), Err(DropReason::ReplayDuplicate));
                assert_eq!(receive(&fresh, number), Ok(false));
            }
        }
    }
}

#[test]
fn numbers_up_to_the_floor_are_never_accepted() {
    let w = ReplayWindow::new(WindowSize::DEFAULT, 5_000_000_000);
    assert_eq!(receive(&w, 5_000_000_000), TOO_OLD);
    assert_eq!(receive(&w, 4_999_999_999), TOO_OLD);
    assert_eq!(receive(&w, 5_000_000_001), Ok(true));
}

#[test]
fn a_jump_of_several_high_halves_leaves_nothing_behind() {
    let w = window(4096);
    for number in 1..=5000 {
        w.commit(number).unwrap();
    }
    let far = 5000 + (5u64 << 32);
    assert_eq!(receive(&w, far), Ok(true));
    for number in far - 4095..far {
        assert_eq!(receive(&w, number), Ok(false), "{number}");
    }
    assert_eq!(receive(&w, 5000), TOO_OLD);
}

#[test]
fn of_a_run_without_end_the_first_are_taken() {
    let w = window(4096);
    let numbers: Vec<u64> = (1..=RUN_MAX as u64 + 9).collect();
    let committed = w.commit_run(&numbers, |number| *number);
    let taken = (0..numbers.len()).filter(|at| committed.of(*at).is_ok());
    assert_eq!(taken.count(), RUN_MAX);
    assert_eq!(
        (w.head(), committed.newest),
        (RUN_MAX as u64, Some(RUN_MAX - 1))
    );
    assert_eq!(receive(&w, RUN_MAX as u64 + 1), Ok(true));
}

#[test]
fn a_check_changes_nothing() {
    let w = window(64);
    receive(&w, 100).unwrap();
    for number in 0..10_000 {
        let _either = w.check(number);
    }
    assert_eq!(w.head(), 100);
    assert_eq!(receive(&w, 99), Ok(false));
}

/// Four workers commit overlapping, shuffled shares of the same numbers.
#[test]
fn many_workers_accept_each_number_exactly_once() {
    const NUMBERS: u64 = 40_000;
    let w = window(65_536);
    let accepted: Vec<AtomicU32> = (0..=NUMBERS).map(|_| AtomicU32::new(0)).collect();
    thread::scope(|scope| {
        for worker in 0..4u64 {
            let (w, accepted) = (&w, &accepted);
            scope.spawn(move || {
                for step in 0..NUMBERS {
                    // A different permutation of 1..=NUMBERS for each worker: odd factors coprime to it.
                    let number = (step * [7, 11, 13, 17][worker as usize]) % NUMBERS + 1;
                    if w.commit(number).is_ok() {
                        accepted[number as usize].fetch_add(1, Relaxed);
                    }
                }
            });
        }
    });
    for (number, times) in accepted.iter().enumerate().skip(1) {
        assert_eq!(times.load(Relaxed), 1, "number {number}");
    }
}

/// The same with runs, as workers do it: each takes up to 64 numbers at once, and all of them overlap.
#[test]
fn many_workers_take_overlapping_runs_exactly_once() {
    const NUMBERS: u64 = 40_000;
    let w = window(65_536);
    let accepted: Vec<AtomicU32> = (0..=NUMBERS).map(|_| AtomicU32::new(0)).collect();
    thread::scope(|scope| {
        for worker in 0..4u64 {
            let (w, accepted) = (&w, &accepted);
            scope.spawn(move || {
                let mut first = 1 + worker * 5;
                while first <= NUMBERS {
                    let run: Vec<u64> = (first..=NUMBERS.min(first + 63)).collect();
                    let number = |number: &u64| *number;
                    let committed = w.commit_run(&run, number);
                    for (at, number) in run.iter().enumerate() {
                        if committed.of(at).is_ok() {
                            accepted[*number as usize].fetch_add(1, Relaxed);
                        }
                    }
                    first += 17 + worker;
                }
            });
        }
    });
    for (number, times) in accepted.iter().enumerate().skip(1) {
        assert_eq!(times.load(Relaxed), 1, "number {number}");
    }
}

/// A small window that the workers push ahead of each other: never twice, whoever wins.
#[test]
fn a_race_for_a_moving_window_accepts_nothing_twice() {
    const NUMBERS: usize = 100_000;
    let w = window(32);
    let accepted: Vec<AtomicU32> = (0..=NUMBERS).map(|_| AtomicU32::new(0)).collect();
    let shared = AtomicUsize::new(1);
    thread::scope(|scope| {
        for worker in 0..4 {
            let (w, accepted, shared) = (&w, &accepted, &shared);
            scope.spawn(move || {
                loop {
                    let front = shared.fetch_add(1, Relaxed);
                    if front > NUMBERS {
                        break;
                    }
                    for number in [front, front.saturating_sub(worker * 9)] {
                        if w.commit(number as u64).is_ok() {
                            accepted[number].fetch_add(1, Relaxed);
                        }
                    }
                }
            });
        }
    });
    assert!(accepted.iter().all(|times| times.load(Relaxed) <= 1));
    assert_eq!(w.head(), NUMBERS as u64);
}

/// What the window means, written the slow way.
struct Model {
    head: u64,
    window: u64,
    seen: HashSet<u64>,
}

impl Model {
    fn commit(&mut self, number: u64) -> Result<bool, DropReason> {
        if number == 0 || number + self.window <= self.head {
            return TOO_OLD;
        }
        if !self.seen.insert(number) {
            return DUPLICATE;
        }
        let newest = number > self.head;
        self.head = self.head.max(number);
        Ok(newest)
    }
}

proptest! {
    #[test]
    fn the_window_agrees_with_a_set_of_numbers(
        packets in prop_oneof![Just(32u32), Just(64), 32..3000u32, Just(4096)],
        moves in proptest::collection::vec(
            prop_oneof![
                8 => (-80i64..80).boxed(),
                4 => (-5000i64..5000).boxed(),
                // 400 of these stay below the 2^36 that the module's documentation asks for.
                1 => (0i64..1 << 27).boxed(),
            ],
            1..400,
        ),
    ) {
        let w = window(packets);
        let mut model = Model {
            head: 0,
            window: w.window_packets().into(),
            seen: HashSet::new(),
        };
        for step in moves {
            let number = model.head.saturating_add_signed(step);
            prop_assert_eq!(receive(&w, number), model.commit(number), "number {}", number);
            prop_assert_eq!(w.head(), model.head);
        }
    }

    /// A run is taken as its numbers would be one after the other.
    #[test]
    fn a_run_is_its_numbers_one_by_one(
        packets in prop_oneof![Just(32u32), Just(64), 32..300u32],
        runs in proptest::collection::vec(
            proptest::collection::vec(prop_oneof![-3i64..5, -80i64..80, -400i64..400], 1..64),
            1..12,
        ),
    ) {
        let (at_once, one_by_one) = (window(packets), window(packets));
        let mut at = 1_u64;
        for run in runs {
            let numbers: Vec<u64> = run
                .iter()
                .map(|step| {
                    at = at.saturating_add_signed(*step);
                    at
                })
                .collect();
            let expected: Vec<_> = numbers.iter().map(|number| one_by_one.commit(*number)).collect();
            let committed = at_once.commit_run(&numbers, |number| *number);
            let last_newest = expected.iter().rposition(|result| *result == Ok(true));
            prop_assert_eq!(committed.newest, last_newest);
            let expected: Vec<_> = expected.into_iter().map(|result| result.map(|_| ())).collect();
            let told: Vec<_> = (0..numbers.len()).map(|at| committed.of(at)).collect();
            prop_assert_eq!(told, expected, "{:?}", numbers);
            prop_assert_eq!(at_once.head(), one_by_one.head());
        }
    }
}
