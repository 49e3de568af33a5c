//! The clock, and the minimum over many short windows.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// How long each case is measured.
const PATIENCE: Duration = Duration::from_millis(400);
/// Windows at least, however long one takes.
const WINDOWS_MIN: usize = 30;
/// Multiplications in a row when the core's clock is taken.
const CHAIN: u64 = 20_000;
/// Cycles from one multiplication to the next that needs its result.
const MULTIPLY_CYCLES: f64 = 3.0;

/// What the machine's clocks are worth.
pub struct Clock {
    core_ghz: f64,
    /// What taking the time twice costs.
    overhead: Duration,
}

/// What one packet costs.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub ns: f64,
    pub median_ns: f64,
    pub cycles: f64,
}

impl Clock {
    /// Takes both from minima over some milliseconds.
    pub fn calibrate() -> Self {
        let overhead = (0..10_000)
            .map(|_| Instant::now().elapsed())
            .min()
            .unwrap_or_default();
        let clock = Self {
            core_ghz: 0.0,
            overhead,
        };
        let Measured { ns, .. } = clock.measure(CHAIN as usize, || (), |()| multiply_chain());
        Self {
            core_ghz: MULTIPLY_CYCLES / ns,
            ..clock
        }
    }

    /// Billions of cycles a second.
    pub fn core_ghz(&self) -> f64 {
        self.core_ghz
    }

    /// Minimum and median cost of one of `items` that each window works on.
    pub fn measure<T>(
        &self,
        items: usize,
        prepare: impl FnMut() -> T,
        run: impl FnMut(T),
    ) -> Measured {
        self.measure_if(items, prepare, run, || true)
    }

    /// The same, of windows that are `valid` afterwards. Gives up, with whatever it has, on a machine where hardly any is.
    pub fn measure_if<T>(
        &self,
        items: usize,
        mut prepare: impl FnMut() -> T,
        mut run: impl FnMut(T),
        mut valid: impl FnMut() -> bool,
    ) -> Measured {
        let mut windows = Vec::new();
        let started = Instant::now();
        while windows.is_empty()
            || started.elapsed() < PATIENCE
            || windows.len() < WINDOWS_MIN && started.elapsed() < 10 * PATIENCE
        {
            let prepared = prepare();
            let begun = Instant::now();
            run(prepared);
            let window = begun.elapsed().saturating_sub(self.overhead);
            if valid() {
                windows.push(window);
            }
        }
        windows.sort_unstable();
        let per_item = |window: Duration| window.as_nanos() as f64 / items as f64;
        self.measured(per_item(windows[0]), per_item(windows[windows.len() / 2]))
    }

    /// Of a cost found in another way.
    pub fn measured(&self, ns: f64, median_ns: f64) -> Measured {
        Measured {
            ns,
            median_ns,
            cycles: ns * self.core_ghz,
        }
    }
}

/// Each square needs the one before, and no compiler can take a short cut; an odd number stays odd.
fn multiply_chain() {
    let mut x = black_box(3_u64);
    for _ in 0..CHAIN {
        x = x.wrapping_mul(x);
    }
    black_box(x);
}
