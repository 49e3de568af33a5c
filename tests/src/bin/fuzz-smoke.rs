//! A bounded fuzzing run on any toolchain: every target's corpus, then seeded mutations of it.
//!
//! `fuzz-smoke [--inputs N] [--seed N] [TARGET...]`. The same seed gives the same inputs. An input that breaks
//! something is written to `target/tests/fuzz/`; once understood, it belongs into `tests/fuzz/corpus/TARGET/`.
//! For long, coverage-guided runs see CONTRIBUTING.md (cargo-fuzz).
#![forbid(unsafe_code)]

use esplane_tests::{
    fuzz::{TARGETS, Target},
    sim::Random,
};
use std::{
    error::Error,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
};

const LARGEST_INPUT_BYTES: usize = 4096;

struct Options {
    inputs: usize,
    seed: u64,
    targets: Vec<String>,
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let options = options()?;
    let mut failures = 0;
    for target in TARGETS {
        if options.targets.is_empty() || options.targets.iter().any(|name| name == target.name) {
            failures += usize::from(!survives(target, &options)?);
        }
    }
    println!(
        "summary: {} targets, {} inputs each, {failures} broken",
        TARGETS.len(),
        options.inputs
    );
    Ok(if failures == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        inputs: 20_000,
        seed: 1,
        targets: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--inputs" => {
                options.inputs = arguments.next().ok_or("--inputs wants a number")?.parse()?
            }
            "--seed" => options.seed = arguments.next().ok_or("--seed wants a number")?.parse()?,
            name if TARGETS.iter().any(|target| target.name == name) => {
                options.targets.push(argument)
            }
            _ => {
                let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
                return Err(
                    format!("no target `{argument}`; there are {}", names.join(", ")).into(),
                );
            }
        }
    }
    Ok(options)
}

/// Runs one target over its corpus and mutations of it.
fn survives(target: &Target, options: &Options) -> Result<bool, Box<dyn Error>> {
    let corpus = corpus(target)?;
    let mut random = Random::new(options.seed);
    let mutations = (0..options.inputs).map(|_| mutate(&mut random, &corpus));
    for (count, input) in corpus.iter().cloned().chain(mutations).enumerate() {
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
            let file = save(target, &input)?;
            println!(
                "{:18} BROKEN by input {count} (seed {}), kept in {file}",
                target.name, options.seed
            );
            return Ok(false);
        }
    }
    println!(
        "{:18} {} corpus files, {} mutations",
        target.name,
        corpus.len(),
        options.inputs
    );
    Ok(true)
}

fn corpus(target: &Target) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
    let mut corpus = (target.seeds)();
    assert!(!corpus.is_empty(), "{} has no seeds", target.name);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target.name);
    if directory.is_dir() {
        let mut files: Vec<_> = fs::read_dir(directory)?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>()?;
        files.sort();
        for file in files {
            corpus.push(fs::read(file)?);
        }
    }
    Ok(corpus)
}

fn save(target: &Target, input: &[u8]) -> Result<String, Box<dyn Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tests/fuzz");
    fs::create_dir_all(&directory)?;
    let file = directory.join(target.name);
    fs::write(&file, input)?;
    Ok(format!("target/tests/fuzz/{}", target.name))
}

/// One to eight small changes to an input of the corpus.
fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    const EDGES: [u8; 8] = [0, 1, 2, 0x7f, 0x80, 0xfe, 0xff, b'"'];
    let mut input = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(8) {
        let at = random.below(input.len() + 1);
        let reach = random.below(input.len() - at + 1).min(32);
        match random.below(8) {
            0 => input.truncate(at),
            1 => drop(input.drain(at..at + reach)),
            2 => {
                let noise = random.bytes(reach);
                input.splice(at..at, noise);
            }
            3 => {
                let other = &corpus[random.below(corpus.len())];
                let start = random.below(other.len() + 1);
                input.truncate(at);
                input.extend(&other[start..]);
            }
            4 => {
                let copy = input[at..at + reach].to_vec();
                input.splice(at..at, copy);
            }
            5 if at < input.len() => input[at] = EDGES[random.below(EDGES.len())],
            6 if at < input.len() => input[at] = input[at].wrapping_add(random.number() as u8),
            _ if at < input.len() => input[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
    input.truncate(LARGEST_INPUT_BYTES);
    input
}
