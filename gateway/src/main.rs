//! The `esplane` command.

use clap::Parser;
use esplane_gateway::{
    bench,
    cli::{self, Cli, Command, Failure},
    daemon, demo,
};
use std::{
    io::{stdin, stdout},
    process::ExitCode,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Its exit statuses are its own, and it must start while there is a single thread.
    if let Command::Demo(args) = &cli.command {
        return demo::run(args);
    }
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.command {
        Command::Run(args) => daemon::run(args),
        Command::Check(args) => cli::check(args, &mut stdout()),
        Command::Keygen(args) => cli::keygen(args, &mut stdout()),
        Command::Pubkey(args) => cli::pubkey(args, &mut stdin(), &mut stdout()),
        Command::Genpsk => cli::genpsk(&mut stdout()),
        Command::Show(args) => cli::show(args, &mut stdout()),
        Command::Bench(args) => bench::run(args, &mut stdout()),
        Command::Demo(_) => unreachable!("main has taken it"),
    }
}
