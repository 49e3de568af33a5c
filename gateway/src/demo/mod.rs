//! `esplane demo`: the whole product on one machine, in ten seconds, leaving nothing behind.
//!
//! ```text
//!  ┌──────┐      ┌─────────┐        ┌──────────┐        ┌─────────┐      ┌──────┐
//!  │  h1  ├──────┤ gateway ╞════════╡ internet ╞════════╡ gateway ├──────┤  h2  │
//!  │      │      │   g1    │  ESP   │ wiretap  │  ESP   │   g2    │      │      │
//!  └──────┘      └─────────┘        └──────────┘        └─────────┘      └──────┘
//!   traffic      real process                           real process     traffic
//! ```
//!
//! The story, in `perform`:
//!
//! 1. get the right to make namespaces, from root or in a user namespace (`privileges.rs`);
//! 2. build five machines out of network namespaces and cables (`namespaces.rs`, `topology.rs`);
//! 3. tap the wire between the gateways (`wiretap.rs`);
//! 4. start two gateways with generated keys, `esplane run -c FILE` each (`gateways.rs`);
//! 5. send a few pings while there is no SA: they are held, trigger the handshake, and are answered;
//! 6. let ping, UDP and TCP run both ways while the gateways rekey every two seconds (`traffic/`);
//! 7. wait for stragglers, ask the gateways what they dropped, and tell (`report.rs`).
//!
//! Everything hangs on descriptors and threads of this process, so that the kernel clears up even
//! after SIGKILL; see `interrupt.rs` for Ctrl-C.

mod gateways;
mod interrupt;
mod live;
mod namespaces;
mod privileges;
mod report;
mod topology;
mod traffic;
mod wiretap;

#[cfg(test)]
mod tests;

use crate::{cli::DemoArgs, keys::KeyCommandError, netlink::NetlinkError};
use gateways::Gateways;
use interrupt::Interrupt;
use live::Live;
use privileges::{PrivilegeError, Scratch};
use report::{FirstContact, Report};
use std::{
    io::{self, IsTerminal, Write},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};
use topology::{A, B, Topology};
use traffic::{
    Ends, Stop,
    ping::{PingResult, Pinger},
    tcp::{TcpBulk, TcpResult},
    udp::{UdpResult, UdpStream},
};
use wiretap::Wiretap;

/// Why the demo could not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Not allowed, or not possible here.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// A namespace could not be made.
    #[error("cannot make a network namespace for {name}: {source}")]
    Namespace {
        /// Whose.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Netlink refused.
    #[error("on {machine}: {source}")]
    Configure {
        /// Where.
        machine: &'static str,
        /// Why.
        source: NetlinkError,
    },
    /// No keys for a gateway.
    #[error("cannot make keys for {name}: {source}")]
    Keys {
        /// Whose.
        name: &'static str,
        /// Why.
        source: KeyCommandError,
    },
    /// A gateway does not do its work.
    #[error("gateway {name}: {what}; the end of its log:\n{log}")]
    Gateway {
        /// Which.
        name: &'static str,
        /// What is wrong.
        what: String,
        /// What it said last.
        log: String,
    },
    /// A system call failed.
    #[error("cannot {action} {place}: {source}")]
    Io {
        /// What.
        action: &'static str,
        /// Where.
        place: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Ctrl-C.
    #[error("interrupted; everything is cleared away")]
    Interrupted,
}

impl DemoError {
    fn io(action: &'static str, place: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            place,
            source,
        }
    }
}

/// `esplane demo`. Must be called while the process has a single thread.
pub fn run(args: &DemoArgs) -> ExitCode {
    if let Some(file) = &args.gateway {
        let error = gateways::become_gateway(file);
        eprintln!("esplane: {error}");
        return ExitCode::FAILURE;
    }
    match perform(args) {
        Ok(report) => {
            let text = if args.json {
                report.to_json() + "\n"
            } else {
                report.to_text(io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
            };
            // Whoever closed our output does not want it.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::from(u8::from(!report.ok))
        }
        Err(error) => {
            eprintln!("esplane: {error}");
            match error {
                DemoError::Interrupted => ExitCode::from(interrupt::EXIT_STATUS),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// The demo from its first system call to its figures.
fn perform(args: &DemoArgs) -> Result<Report, DemoError> {
    let live = Live::new(args.json);
    // 1. The right to do it. Before any thread: a user namespace takes only a single-threaded process.
    let privileges = privileges::acquire()?;
    let interrupt = Interrupt::listen().map_err(DemoError::io("handle", "signals"))?;
    let scratch = Scratch::create(&privileges).map_err(DemoError::io("make", "a directory"))?;
    live.title(args.seconds, privileges.in_user_namespace());
    // 2. Five machines.
    let topology = Topology::build()?;
    interrupt.check()?;
    // 3. A witness.
    let wiretap = Wiretap::start(&topology)?;
    // 4. Two gateways.
    let gateways = Gateways::start(&topology, scratch.path(), &interrupt)?;
    // 5. The first packets find no SA.
    let first_contact = first_contact(&topology, &interrupt)?;
    live.first_contact(&first_contact);
    // 6. Traffic.
    let before = gateways.statuses()?;
    let traffic = Traffic::start(&topology).map_err(DemoError::io("start", "traffic"))?;
    let watched = watch(&traffic, &gateways, args.seconds, &live, &interrupt);
    // 7. The figures, also when interrupted: threads that send are not left behind.
    let carried = traffic.finish();
    watched?;
    let (ping, udp, tcp) = carried.map_err(DemoError::io("carry", "traffic"))?;
    let after = gateways.statuses()?;
    let wire = wiretap.finish().map_err(DemoError::io("tap", "the wire"))?;
    let drops_kernel = topology.kernel_drops();
    gateways.finish()?;
    Ok(Report::new(report::Observed {
        seconds: args.seconds,
        ping,
        udp,
        tcp,
        wire,
        first_contact,
        before,
        after,
        drops_kernel,
        ipv6: topology.ipv6,
    }))
}

/// Five pings at once, while the tunnel has no SA. They are held until the handshake, which they
/// trigger, has made one.
fn first_contact(topology: &Topology, interrupt: &Interrupt) -> Result<FirstContact, DemoError> {
    let stop = Arc::new(Stop::default());
    let ends = Ends {
        from: A.host(false),
        to: B.host(false),
    };
    let failed = || DemoError::io("ping from", "h1");
    let started = Instant::now();
    let pinger = Pinger::start(&topology.h1, ends, 1000, 5, stop).map_err(failed())?;
    while pinger.progress().1 < 5 && started.elapsed() < Duration::from_secs(6) {
        interrupt.sleep(Duration::from_millis(1))?;
    }
    let ping = pinger.finish().map_err(failed())?;
    Ok(FirstContact {
        sent: ping.sent,
        received: ping.received,
        longest_ms: ping.rtt_ms.max,
    })
}

/// All generators.
struct Traffic {
    stop: Arc<Stop>,
    pings: Vec<Pinger>,
    streams: Vec<UdpStream>,
    tcp: TcpBulk,
}

/// What they have carried.
type Carried = (PingResult, UdpResult, TcpResult);

impl Traffic {
    fn start(topology: &Topology) -> io::Result<Self> {
        let stop = Arc::new(Stop::default());
        let (h1, h2) = (&topology.h1, &topology.h2);
        let there = |ipv6| Ends {
            from: A.host(ipv6),
            to: B.host(ipv6),
        };
        let back = |ipv6| Ends {
            from: B.host(ipv6),
            to: A.host(ipv6),
        };
        let v6 = topology.ipv6;
        let every = traffic::ping::PER_SECOND;
        Ok(Self {
            pings: vec![
                Pinger::start(h1, there(false), every, u64::MAX, stop.clone())?,
                Pinger::start(h2, back(v6), every, u64::MAX, stop.clone())?,
            ],
            streams: vec![
                UdpStream::start(h1, h2, there(false), stop.clone())?,
                UdpStream::start(h2, h1, back(v6), stop.clone())?,
            ],
            tcp: TcpBulk::start(h1, h2, there(false), stop.clone())?,
            stop,
        })
    }

    /// Stops the senders and waits for what is under way.
    fn finish(self) -> io::Result<Carried> {
        self.stop.stop();
        let (mut ping, mut udp) = (PingResult::default(), UdpResult::default());
        for pinger in self.pings {
            ping += pinger.finish()?;
        }
        for stream in self.streams {
            udp += stream.finish()?;
        }
        Ok((ping, udp, self.tcp.finish()?))
    }
}

/// Lets the traffic run and tells once a second how it does.
fn watch(
    traffic: &Traffic,
    gateways: &Gateways,
    seconds: u32,
    live: &Live,
    interrupt: &Interrupt,
) -> Result<(), DemoError> {
    let start = Instant::now();
    let mut tcp_before = 0;
    for second in 1..=seconds {
        let due = start + Duration::from_secs(second.into());
        interrupt.sleep(due.saturating_duration_since(Instant::now()))?;
        let sum = |counts: Vec<(u64, u64)>| {
            counts
                .into_iter()
                .fold((0, 0), |(sent, received), (s, r)| (sent + s, received + r))
        };
        let tcp = traffic.tcp.progress();
        live.second(&live::Second {
            second,
            of: seconds,
            ping: sum(traffic.pings.iter().map(Pinger::progress).collect()),
            udp: sum(traffic.streams.iter().map(UdpStream::progress).collect()),
            tcp_bytes: tcp - tcp_before,
            rekeys: report::rekeys(&gateways.statuses()?),
        });
        tcp_before = tcp;
    }
    Ok(())
}
