//! `esplane bench`: what one packet costs in memory, without any I/O, on the machine it runs on.
//!
//! ```text
//!   scene.rs ──tables, packets──▶ cases.rs ──prepare, run──▶ measure.rs ──ns──▶ report.rs
//!                                                             ▲                   ▲
//!                                                    core clock, calibrated    reference.rs: the peers' figures
//! ```
//!
//! # Method
//!
//! * A *window* is one run over a batch of 64 packets that lie in the cache, a few microseconds. It is prepared outside of
//!   the measured time (fresh packets, or freshly sealed ones). Each figure is the **minimum over all windows of
//!   0.4 seconds**, which is what the code costs when nobody disturbs it; the median beside it says what
//!   the machine made of it.
//! * **Core cycles** are nanoseconds times the core's clock, which a chain of dependent multiplications, three
//!   cycles each on every x86-64 core of the last decade, shows in the same run. Not the time stamp counter: that
//!   one ticks at another rate.
//! * With two workers, each thread measures its own windows while the other works; their rates are added. Preparing a window
//!   is not measured, but the other thread's packets are under way meanwhile as well.
//! * SAs of a case with many are met in turn, one packet each: the worst order there is.
//! * Peers' figures come from one machine of the Sapphire Rapids class at 3.0 GHz; ratios compare cycles.

mod cases;
mod measure;
mod reference;
mod report;
mod scene;

use crate::cli::{BenchArgs, Failure};
use std::io::Write;

/// Runs all cases whose name contains the filter, and prints each as soon as it is known.
pub fn run(args: &BenchArgs, output: &mut impl Write) -> Result<(), Failure> {
    let aead = crate::aead::choose().map_err(Failure::configuration)?;
    let clock = measure::Clock::calibrate();
    let mut report = report::Report::new(output, args.json, aead.name(), clock.core_ghz());
    report.begin().map_err(Failure::runtime)?;
    let wanted = |case: &cases::Case| {
        args.filter
            .as_ref()
            .is_none_or(|filter| case.name.contains(filter.as_str()))
    };
    let mut any = false;
    for case in cases::all().into_iter().filter(wanted) {
        any = true;
        let measured = (case.measure)(aead, &clock);
        report.add(&case, measured).map_err(Failure::runtime)?;
    }
    if !any {
        let names: std::collections::BTreeSet<&str> =
            cases::all().iter().map(|case| case.name).collect();
        let names: Vec<&str> = names.into_iter().collect();
        return Err(Failure::configuration(format!(
            "no benchmark is called like that; there are: {}",
            names.join(", ")
        )));
    }
    report.end().map_err(Failure::runtime)
}
