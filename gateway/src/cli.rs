//! The command line: what may be said to `esplane`, and what it means.
//!
//! Exit status: 0 fine, 1 something failed while running, 2 wrong usage or configuration.

use crate::{config, keys, show};
use clap::{Args, Parser, Subcommand, ValueEnum};
use esplane_control_vici::vici::DEFAULT_SOCKET;
use std::{
    fmt, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// IPsec ESP tunnels at the speed of the CPU, keyed by Noise or by hand.
#[derive(Debug, Parser)]
#[command(name = "esplane", version, arg_required_else_help = true)]
#[command(
    after_help = "Exit status: 0 fine, 1 failed while running, 2 wrong usage or configuration."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon in the foreground until SIGTERM; SIGHUP reads the configuration again
    Run(ConfigArgs),
    /// Check a configuration and every key file it names, and say what is wrong where
    Check(ConfigArgs),
    /// Make a private key
    Keygen(KeygenArgs),
    /// Print the public key of a private key
    Pubkey(PubkeyArgs),
    /// Make a pre-shared key for two peers and print it
    Genpsk,
    /// Show what a running daemon does
    Show(ShowArgs),
    /// Work beside a strongSwan
    #[command(subcommand)]
    Strongswan(StrongswanCommand),
    /// Measure what a packet costs on this machine, in memory and without root
    Bench(BenchArgs),
    /// Two gateways, a tunnel and real traffic, in namespaces of their own; leaves nothing behind
    Demo(DemoArgs),
}

/// Which configuration.
#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// The YAML configuration, such as /etc/esplane/esplane.yaml
    #[arg(short, long, value_name = "FILE")]
    pub config: PathBuf,
}

/// Where the key goes.
#[derive(Args, Debug)]
pub struct KeygenArgs {
    /// Write the private key to this new file (mode 0600) and print the public key; without it the
    /// private key is printed
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Where the key is.
#[derive(Args, Debug)]
pub struct PubkeyArgs {
    /// The file with the private key; - for standard input
    #[arg(default_value = "-", value_name = "FILE")]
    pub file: PathBuf,
}

/// What to show, of whom, and how.
#[derive(Args, Debug)]
pub struct ShowArgs {
    /// Which table
    #[arg(default_value = "peers")]
    pub what: ShowWhat,
    /// Print JSON for programs instead of a table
    #[arg(long)]
    pub json: bool,
    /// Ask the daemon of this configuration
    #[arg(short, long, value_name = "FILE", conflicts_with = "api")]
    pub config: Option<PathBuf>,
    /// Ask the daemon at this address or unix socket [default: /run/esplane/esplane.sock]
    #[arg(long, value_name = "ADDRESS:PORT|SOCKET")]
    pub api: Option<String>,
}

/// The tables of `show`. (`tunnels` is no table.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ShowWhat {
    /// Tunnels and how they are
    Peers,
    /// The same at length; strongSwan's by connections and children, as swanctl shows them
    Tunnels,
    /// Security associations, installed now
    Sas,
    /// Networks that lead into tunnels
    Routes,
    /// Packets that went no further, and why
    Drops,
}

/// Beside a strongSwan.
#[derive(Debug, Subcommand)]
pub enum StrongswanCommand {
    /// Say what is missing before Esplane can carry strongSwan's tunnels, and which lines to add where
    ///
    /// Asks charon, reads swanctl.conf and strongswan.conf, and looks at the kernel; changes nothing.
    #[command(
        after_help = "Exit status: 0 ready, 1 something is missing or charon does not answer, 2 wrong usage or a file that cannot be understood."
    )]
    Check(StrongswanCheckArgs),
}

/// Where to look.
#[derive(Args, Debug)]
pub struct StrongswanCheckArgs {
    /// Only these, as swanctl.conf names them [default: all that charon has loaded]
    #[arg(value_name = "CONNECTION[/CHILD]")]
    pub only: Vec<String>,
    /// Print JSON for programs
    #[arg(long)]
    pub json: bool,
    /// charon's socket
    #[arg(long, value_name = "SOCKET", default_value = DEFAULT_SOCKET)]
    pub vici: PathBuf,
    /// The connections' file, with what it includes [default: /etc/swanctl/swanctl.conf]
    #[arg(long, value_name = "FILE")]
    pub swanctl_conf: Option<PathBuf>,
    /// charon's own file, with what it includes [default: /etc/strongswan.conf]
    #[arg(long, value_name = "FILE")]
    pub strongswan_conf: Option<PathBuf>,
    /// How Esplane is to get the keys [default: by the kernel, where that can be]
    #[arg(long, value_name = "MODE")]
    pub mode: Option<StrongswanMode>,
}

/// How Esplane gets the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StrongswanMode {
    /// From the kernel, to which charon gives inert SAs
    Kernel,
    /// From charon, by a preloaded library, for kernels without ESP
    Preload,
}

/// What is measured.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Only what has this in its name, such as esp-encap
    #[arg(long, value_name = "NAME")]
    pub filter: Option<String>,
}

/// How the demo runs.
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// How long the traffic runs
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
    /// Become one of the demo's gateways
    #[arg(long, value_name = "FILE", hide = true)]
    pub gateway: Option<PathBuf>,
}

/// How a command failed; its number is the exit status.
#[derive(Debug)]
pub enum Failure {
    /// While running.
    Runtime(Box<dyn std::error::Error + Send + Sync>),
    /// Wrong usage or configuration.
    Configuration(Box<dyn std::error::Error + Send + Sync>),
}

impl Failure {
    /// Something failed while running.
    pub fn runtime(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Runtime(error.into())
    }

    /// The usage or the configuration is wrong.
    pub fn configuration(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Configuration(error.into())
    }

    /// The exit status that goes with it.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Runtime(_) => 1,
            Self::Configuration(_) => 2,
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Runtime(error) => write!(f, "esplane: {error}"),
            // Starts with FILE:LINE:COLUMN, where editors look for it.
            Self::Configuration(error) => error.fmt(f),
        }
    }
}

/// `esplane check`: prints a short summary, or fails with everything that is wrong.
pub fn check(args: &ConfigArgs, output: &mut impl io::Write) -> Result<(), Failure> {
    let config = config::Config::load(&args.config)
        .map_err(|error| Failure::configuration(config::AtLength(error)))?;
    writeln!(output, "{config}").map_err(Failure::runtime)
}

/// `esplane keygen`.
pub fn keygen(args: &KeygenArgs, output: &mut impl io::Write) -> Result<(), Failure> {
    keys::keygen(args.output.as_deref(), output).map_err(Failure::runtime)
}

/// `esplane pubkey`.
pub fn pubkey(
    args: &PubkeyArgs,
    input: &mut impl io::Read,
    output: &mut impl io::Write,
) -> Result<(), Failure> {
    keys::pubkey(Some(&args.file), input, output).map_err(Failure::runtime)
}

/// `esplane genpsk`.
pub fn genpsk(output: &mut impl io::Write) -> Result<(), Failure> {
    keys::genpsk(output).map_err(Failure::runtime)
}

/// `esplane show`: `--api`, else the configuration's address, else the default socket.
pub fn show(args: &ShowArgs, output: &mut impl io::Write) -> Result<(), Failure> {
    let target = match (&args.api, &args.config) {
        (Some(text), _) => text.parse().map_err(Failure::configuration)?,
        (None, Some(file)) => {
            let api = config::Config::load_api(file).map_err(Failure::configuration)?;
            show::Target::of(&api).map_err(Failure::configuration)?
        }
        (None, None) => show::Target::Socket(Path::new(config::DEFAULT_API_SOCKET).to_owned()),
    };
    let status = show::fetch(&target).map_err(Failure::runtime)?;
    show::print(&status, args.what, args.json, output).map_err(Failure::runtime)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    #[test]
    fn the_command_line_is_well_formed_and_every_command_explains_itself() {
        Cli::command().debug_assert();
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    argument.get_id()
                );
            }
        }
    }

    #[test]
    fn lines_from_the_readme_are_understood() {
        for line in [
            "esplane run -c esplane.yaml",
            "esplane check --config esplane.yaml",
            "esplane keygen -o node.key",
            "esplane pubkey node.key",
            "esplane pubkey",
            "esplane genpsk",
            "esplane show",
            "esplane show sas --json",
            "esplane show drops -c esplane.yaml",
            "esplane show routes --api 127.0.0.1:9470",
            "esplane demo --seconds 10 --json",
            "esplane strongswan check",
            "esplane strongswan check site other/net",
            "esplane strongswan check --json --mode preload --vici /run/charon.vici",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        let Ok(Command::Show(show)) = parse("esplane show") else {
            panic!("show is show");
        };
        assert_eq!(show.what, ShowWhat::Peers);
        let Ok(Command::Demo(demo)) = parse("esplane demo") else {
            panic!("demo is demo");
        };
        assert_eq!((demo.seconds, demo.json), (10, false));
    }

    #[test]
    fn wrong_usage_ends_with_status_2() {
        for line in [
            "esplane",
            "esplane fly",
            "esplane run",
            "esplane show everything",
            "esplane strongswan",
            "esplane strongswan check --mode magic",
            "esplane show -c a.yaml --api b",
            "esplane demo --seconds 0",
            "esplane demo --seconds soon",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn a_wrong_configuration_is_another_failure_than_a_daemon_that_is_not_there() {
        let config = ConfigArgs {
            config: "/nowhere/esplane.yaml".into(),
        };
        let error = check(&config, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Failure::Configuration(_)), "{error}");
        assert_eq!(
            format!("{:?}", error.exit_code()),
            format!("{:?}", ExitCode::from(2))
        );
        let mut args = ShowArgs {
            what: ShowWhat::Peers,
            json: false,
            config: None,
            api: Some("/nowhere/esplane.sock".to_owned()),
        };
        let error = show(&args, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Failure::Runtime(_)), "{error}");
        args.api = Some("nonsense".to_owned());
        let error = show(&args, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Failure::Configuration(_)), "{error}");
    }
}
