//! `esplane strongswan check`: gathers what is true of charon, its files and the kernel, and says what is missing.
//!
//! ```text
//!   charon ◀─VICI─ mod.rs ┐
//!   /etc    ◀──── files.rs ├─▶ Survey ─▶ esplane_control_vici::check ─▶ Report ─▶ text, JSON
//!   kernel ◀──── kernel.rs ┘
//! ```
//!
//! It changes nothing: what it asks the kernel to install, it asks in a network namespace that ends with the question.

mod files;
mod kernel;

pub(super) use files::names;

use crate::{
    cli::{Failure, StrongswanCheckArgs, StrongswanMode},
    config::import_name,
};
use esplane_control_vici::{
    check::{self, Survey, Way},
    importer::ImportSettings,
    vici::{self, Channel, Facts, Message, Names, ViciError},
};
use std::{
    io::{self, Write},
    time::Duration,
};

/// charon answers at once; a dump comes in pieces, and each has this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Prints the report; false if anything is missing.
pub fn run(args: &StrongswanCheckArgs, output: &mut impl Write) -> Result<bool, Failure> {
    let survey = survey(args)?;
    let report = check::check(&survey);
    let print = |output: &mut dyn Write| -> io::Result<()> {
        match args.json {
            true => writeln!(output, "{}", serde_json::to_string_pretty(&report)?),
            false => write!(output, "{report}"),
        }
    };
    print(output).map_err(Failure::runtime)?;
    Ok(report.ready)
}

fn survey(args: &StrongswanCheckArgs) -> Result<Survey, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::runtime)?;
    let names = files::names();
    let charon = runtime
        .block_on(ask(args, &names))
        .map_err(Failure::runtime)?;
    let settings = |file: &Option<_>, usual| {
        files::settings(file.as_deref(), usual).map_err(Failure::configuration)
    };
    Ok(Survey {
        version: charon.version,
        stats: charon.stats,
        connections: charon.connections,
        sas: charon.sas,
        swanctl_conf: settings(&args.swanctl_conf, "/etc/swanctl/swanctl.conf")?,
        strongswan_conf: settings(&args.strongswan_conf, "/etc/strongswan.conf")?,
        kernel_sas: kernel::sas(),
        kernel_policies: kernel::policies(),
        kernel_esp: kernel::esp(),
        lockdown: kernel::lockdown(),
        preloaded: files::is_preloaded(charon.process),
        udp_ports: files::udp_ports(),
        mark: ImportSettings::MARK,
        way: args.mode.map(|mode| match mode {
            StrongswanMode::Kernel => Way::Kernel,
            StrongswanMode::Preload => Way::Preload,
        }),
        only: args.only.iter().map(|name| import_name(name)).collect(),
        names,
    })
}

/// What charon says of itself.
struct Charon {
    version: vici::CharonVersion,
    stats: vici::CharonStats,
    connections: Vec<vici::Connection>,
    sas: Vec<vici::IkeSa>,
    process: Option<i32>,
}

async fn ask(args: &StrongswanCheckArgs, names: &Names) -> Result<Charon, ViciError> {
    let mut channel = Channel::open(&args.vici).await?;
    for event in ["list-conn", "list-sa"] {
        channel.register(event, ANSWER_WITHIN).await?;
    }
    let version = channel
        .request("version", Message::new(), ANSWER_WITHIN)
        .await?;
    let stats = channel
        .request("stats", Message::new(), ANSWER_WITHIN)
        .await?;
    let mut facts = Facts::new(names);
    let (mut connections, mut sas) = (Vec::new(), Vec::new());
    channel
        .stream(
            "list-conns",
            Message::new(),
            "list-conn",
            ANSWER_WITHIN,
            |message| {
                connections.extend(facts.list_conn(&message));
            },
        )
        .await?;
    channel
        .stream(
            "list-sas",
            Message::new(),
            "list-sa",
            ANSWER_WITHIN,
            |message| {
                sas.extend(facts.list_sa(&message));
            },
        )
        .await?;
    for problem in &facts.problems {
        eprintln!("esplane: left out: {problem}");
    }
    Ok(Charon {
        version: vici::charon_version(&version),
        stats: vici::charon_stats(&stats),
        connections,
        sas,
        process: channel.process(),
    })
}
