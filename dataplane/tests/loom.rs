//! Every order in which workers can meet on one SA, by loom: `tests/run loom`. In a build without `--cfg loom` there is
//! nothing here.
#![cfg(loom)]

use esplane_api::{Esn, Lifetime, LifetimeUnit::Packets, Limits, Now, SequenceStart, WindowSize};
use esplane_dataplane::{
    replay::ReplayWindow,
    sequence::SequenceCounter,
    usage::{Reached, Scribe, Usage},
};
use loom::{sync::Arc, thread};

/// The numbers of `run` that the window takes.
fn taken(window: &ReplayWindow, run: &[u64]) -> Vec<u64> {
    let committed = window.commit_run(run, itself);
    let numbers = run.iter().enumerate();
    let taken = numbers.filter(|(at, _)| committed.of(*at).is_ok());
    taken.map(|(_, number)| *number).collect()
}

fn itself(number: &u64) -> u64 {
    *number
}

/// One thread per run; what each has taken, in one sorted list.
fn all_taken(window: ReplayWindow, runs: [&'static [u64]; 2]) -> (Vec<u64>, Arc<ReplayWindow>) {
    let window = Arc::new(window);
    let other = {
        let window = window.clone();
        thread::spawn(move || taken(&window, runs[1]))
    };
    let mut all = taken(&window, runs[0]);
    all.extend(other.join().unwrap());
    all.sort_unstable();
    (all, window)
}

fn window(packets: u32) -> ReplayWindow {
    ReplayWindow::new(WindowSize::new(packets).unwrap(), 0)
}

#[test]
fn overlapping_runs_take_each_number_exactly_once() {
    loom::model(|| {
        let (all, window) = all_taken(window(64), [&[1, 2, 33], &[2, 33, 34]]);
        assert_eq!(all, [1, 2, 33, 34]);
        assert_eq!(window.head(), 34);
    });
}

/// One worker moves the window past what the other has in hand: it may come too late, but never twice.
#[test]
fn a_window_that_jumps_ahead_takes_nothing_twice() {
    loom::model(|| {
        let window = window(32);
        // All of its blocks share one slot.
        assert_eq!(taken(&window, &[5]), [5]);
        let (all, window) = all_taken(window, [&[5, 6, 7], &[7, 69, 6]]);
        assert!(!all.contains(&5) && all.contains(&69), "{all:?}");
        for number in [6, 7] {
            assert!(all.iter().filter(|taken| **taken == number).count() <= 1);
        }
        assert_eq!(window.head(), 69);
    });
}

/// The newest block is left while numbers of it are on their way: its word decides over them, then its slot, never both.
#[test]
fn a_block_that_is_left_takes_each_number_exactly_once() {
    loom::model(|| {
        let (all, window) = all_taken(window(64), [&[3, 40], &[3, 4]]);
        assert_eq!(all, [3, 4, 40]);
        assert_eq!(window.head(), 40);
    });
    loom::model(|| {
        let (all, window) = all_taken(window(64), [&[31, 32], &[31, 64]]);
        assert_eq!(all, [31, 32, 64]);
        assert_eq!(window.head(), 64);
    });
}

/// `newest` follows the peer's address: of two workers, one at most may believe that it has the newest packet of all.
#[test]
fn the_highest_number_is_newest_once() {
    loom::model(|| {
        let window = Arc::new(window(64));
        let other = {
            let window = window.clone();
            thread::spawn(move || window.commit_run(&[3, 9], itself).newest)
        };
        let mine = window.commit_run(&[9, 4], itself).newest;
        let newest = [mine == Some(0), other.join().unwrap() == Some(1)];
        assert_eq!(newest.iter().filter(|newest| **newest).count(), 1);
    });
}

#[test]
fn workers_reserve_every_number_once_and_none_past_the_end() {
    loom::model(|| {
        let last = u64::from(u32::MAX);
        let start = SequenceStart {
            first: last - 4,
            reserved_until: Some(last - 2),
        };
        let counter = Arc::new(SequenceCounter::new(Esn::Off, start));
        let other = {
            let counter = counter.clone();
            thread::spawn(move || {
                let first = counter.reserve(2);
                counter.extend(last);
                [first, counter.reserve(2)]
            })
        };
        let mine = [counter.reserve(2), counter.reserve(1)];
        let mut all: Vec<u64> = mine
            .into_iter()
            .chain(other.join().unwrap())
            .flatten()
            .collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "one number twice");
        assert!(all.iter().all(|number| (last - 4..=last).contains(number)));
    });
}

/// Whoever comes first owns the counters that need no lock; nobody's packets are lost, and the limit they reach together is told
/// once: by one of them, or by who comes next.
#[test]
fn workers_count_every_packet_and_tell_a_limit_once() {
    loom::model(|| {
        let soft = Limits {
            packets: Some(6),
            ..Limits::NONE
        };
        let lifetime = Lifetime::new(soft, Limits::NONE).unwrap();
        let usage = Arc::new(Usage::new(lifetime, Now::default()));
        let count = |usage: &Usage| {
            let (scribe, mut told) = (Scribe::new(), 0);
            usage.add(&scribe, 3, 100, |reached| {
                assert_eq!(reached, Reached::Soft(Packets));
                told += 1;
            });
            told
        };
        let other = {
            let usage = usage.clone();
            thread::spawn(move || count(&usage))
        };
        let mut told = count(&usage) + other.join().unwrap();
        usage.add(&Scribe::GUEST, 0, 0, |_| told += 1);
        assert_eq!((usage.packets(), usage.bytes(), told), (6, 200, 1));
    });
}
