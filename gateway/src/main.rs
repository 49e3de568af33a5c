//! The `esplane` command.

use clap::Parser;
use esplane_gateway::{
    cli::{self, Cli, Command},
    daemon, demo,
};
use std::{io, process::ExitCode};

fn main() -> ExitCode {
    let output = &mut io::stdout().lock();
    let done = match Cli::parse().command {
        Command::Run(args) => daemon::run(&args),
        Command::Check(args) => cli::check(&args, output),
        Command::Keygen(args) => cli::keygen(&args, output),
        Command::Pubkey(args) => cli::pubkey(&args, output),
        Command::Genpsk => cli::genpsk(output),
        Command::Show(args) => cli::show(&args, output),
        Command::Demo(args) => return demo::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}
