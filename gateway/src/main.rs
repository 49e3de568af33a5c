//! The `esplane` command.

use clap::Parser;
use esplane_gateway::{
    bench,
    cli::{self, Cli, Command, StrongswanCommand},
    daemon, demo, strongswan,
};
use std::{
    io::{stdin, stdout},
    process::ExitCode,
};

fn main() -> ExitCode {
    let done = match &Cli::parse().command {
        Command::Run(args) => daemon::run(args),
        Command::Check(args) => cli::check(args, &mut stdout()),
        Command::Keygen(args) => cli::keygen(args, &mut stdout()),
        Command::Pubkey(args) => cli::pubkey(args, &mut stdin(), &mut stdout()),
        Command::Genpsk => cli::genpsk(&mut stdout()),
        Command::Show(args) => cli::show(args, &mut stdout()),
        Command::Bench(args) => bench::run(args, &mut stdout()),
        Command::Strongswan(StrongswanCommand::Check(args)) => {
            match strongswan::check::run(args, &mut stdout()) {
                Ok(true) => Ok(()),
                Ok(false) => return ExitCode::from(1),
                Err(failure) => Err(failure),
            }
        }
        // Its exit statuses are its own.
        Command::Demo(args) => return demo::run(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}
