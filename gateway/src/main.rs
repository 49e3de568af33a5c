//! The `esplane` command.

use clap::Parser;
use esplane_gateway::{
    cli::{self, Cli, Command, Failure},
    daemon,
};
use std::{
    io::{stdin, stdout},
    process::ExitCode,
};

fn main() -> ExitCode {
    match run(&Cli::parse()) {
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
        Command::Demo(_) => Err(Failure::runtime("not part of this build")),
    }
}
