//! The two gateways: the real program in processes of their own, with the configuration files and keys
//! a user would write.

use super::{
    DemoError,
    interrupt::Interrupt,
    namespaces::Namespace,
    topology::{A, B, Site, Topology},
    wiretap::ESP_PORT,
};
use crate::{keys, show, status::Status};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Seconds between two rekeys.
pub const REKEY_SECONDS: u32 = 2;
/// The gateways' interface towards their private network.
const INTERFACE: &str = "esplane0";
/// How long a gateway may take to come up, and to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Both gateways.
pub struct Gateways {
    /// Network A's.
    pub g1: Gateway,
    /// Network B's.
    pub g2: Gateway,
}

impl Gateways {
    /// Makes keys and configurations, starts both and waits until they answer.
    pub fn start(
        topology: &Topology,
        scratch: &Path,
        interrupt: &Interrupt,
    ) -> Result<Self, DemoError> {
        let key_of = |name: &'static str| -> Result<String, DemoError> {
            let mut public = Vec::new();
            keys::keygen(Some(&scratch.join(format!("{name}.key"))), &mut public)
                .map_err(|source| DemoError::Keys { name, source })?;
            Ok(String::from_utf8_lossy(&public).trim().to_owned())
        };
        let (public1, public2) = (key_of("g1")?, key_of("g2")?);
        let start = |namespace, site, peer, peer_key| {
            let text = configuration(topology, scratch, namespace, site, peer, peer_key);
            Gateway::start(namespace, scratch, &text)
                .map_err(DemoError::io("start gateway", namespace.name()))
        };
        let gateways = Self {
            g1: start(&topology.g1, A, (B, "g2"), &public2)?,
            g2: start(&topology.g2, B, (A, "g1"), &public1)?,
        };
        for gateway in [&gateways.g1, &gateways.g2] {
            gateway.wait_until_it_answers(interrupt)?;
        }
        Ok(gateways)
    }

    /// What both tell now.
    pub fn statuses(&self) -> Result<[Status; 2], DemoError> {
        Ok([self.g1.status()?, self.g2.status()?])
    }

    /// Ends both in order.
    pub fn finish(self) -> Result<(), DemoError> {
        self.g1.finish()?;
        self.g2.finish()
    }
}

/// The file a user would write.
fn configuration(
    topology: &Topology,
    scratch: &Path,
    namespace: &Namespace,
    site: Site,
    (peer, peer_name): (Site, &str),
    peer_key: &str,
) -> String {
    let name = namespace.name();
    let scratch = scratch.display();
    let mut routes = peer.network(false).to_string();
    if topology.ipv6 {
        routes += &format!(", {:?}", peer.network(true).to_string());
    }
    format!(
        "name: {name}
private_key_file: {scratch}/{name}.key
state_dir: {scratch}/{name}.state
listen: {here}:{ESP_PORT}
interface:
  name: {INTERFACE}
peers:
  - name: {peer_name}
    public_key: {peer_key}
    endpoint: {there}:{ESP_PORT}
    routes: [{routes}]
    kem: mlkem768
    initiate: demand
    rekey:
      seconds: {REKEY_SECONDS}
api:
  listen: \"off\"
  socket: {scratch}/{name}.sock
",
        here = site.endpoint(),
        there = peer.endpoint(),
    )
}

/// One gateway: a thread within its namespace that starts the process, and stays as long as it does.
///
/// The kernel sends the process SIGKILL when that thread ends (PR_SET_PDEATHSIG speaks of the thread
/// that forked), hence also when the demo is killed.
pub struct Gateway {
    name: &'static str,
    stop: Sender<()>,
    keeper: Option<JoinHandle<io::Result<ExitStatus>>>,
    socket: PathBuf,
    log: PathBuf,
}

impl Gateway {
    fn start(namespace: &Namespace, scratch: &Path, configuration: &str) -> io::Result<Self> {
        let name = namespace.name();
        let file = scratch.join(format!("{name}.yaml"));
        write_privately(&file, configuration)?;
        fs::create_dir_all(scratch.join(format!("{name}.state")))?;
        let log = scratch.join(format!("{name}.log"));
        let output = File::create(&log)?;
        let (stop, stopped) = channel();
        let keeper = namespace.spawn("keeper", move || {
            let child = Command::new("/proc/self/exe")
                .args(["demo", "--gateway"])
                .arg(&file)
                .env(PARENT, std::process::id().to_string())
                .stdin(Stdio::null())
                .stdout(output.try_clone()?)
                .stderr(output)
                // Ctrl-C on the terminal is ours to handle, not the gateways'.
                .process_group(0)
                .spawn()?;
            keep(child, &stopped)
        })?;
        Ok(Self {
            name,
            stop,
            keeper: Some(keeper),
            socket: scratch.join(format!("{name}.sock")),
            log,
        })
    }

    fn wait_until_it_answers(&self, interrupt: &Interrupt) -> Result<(), DemoError> {
        let since = Instant::now();
        loop {
            interrupt.check()?;
            match self.status() {
                Ok(_) => return Ok(()),
                Err(error) if self.has_ended() || since.elapsed() > PATIENCE => return Err(error),
                Err(_) => interrupt.sleep(Duration::from_millis(10))?,
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.keeper.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// What it tells now.
    pub fn status(&self) -> Result<Status, DemoError> {
        let target = show::Target::Socket(self.socket.clone());
        show::fetch(&target).map_err(|source| DemoError::Gateway {
            name: self.name,
            what: source.to_string(),
            log: self.last_words(),
        })
    }

    /// Asks it to end and sees whether it does so well.
    fn finish(mut self) -> Result<(), DemoError> {
        let ended = self.end();
        match ended.map_err(DemoError::io("end gateway", self.name))? {
            Some(status) if !status.success() => Err(DemoError::Gateway {
                name: self.name,
                what: format!("it ended with {status}"),
                log: self.last_words(),
            }),
            _ => Ok(()),
        }
    }

    fn end(&mut self) -> io::Result<Option<ExitStatus>> {
        // If nobody listens, the keeper has ended, and the gateway before it.
        let _ = self.stop.send(());
        let Some(keeper) = self.keeper.take() else {
            return Ok(None);
        };
        let joined = keeper.join();
        joined
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map(Some)
    }

    /// The end of its log.
    fn last_words(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Waits for the process to end, or to be told to end it: politely, then not.
fn keep(mut child: Child, stopped: &Receiver<()>) -> io::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        match stopped.recv_timeout(Duration::from_millis(20)) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill()?;
    child.wait()
}

fn write_privately(file: &Path, text: &str) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(file)?.write_all(text.as_bytes())
}

/// Tells the child who its parent is.
const PARENT: &str = "ESPLANE_DEMO_PARENT";

/// `esplane demo --gateway FILE`, which the demo calls: arranges to die with the demo and becomes
/// `esplane run -c FILE`. Returns only if that fails.
pub fn become_gateway(file: &Path) -> io::Error {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // The parent may have died before it could be said.
    let parent = getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if std::env::var(PARENT).ok() != parent {
        return io::Error::other("this is for the demo itself; run `esplane run -c FILE`");
    }
    // An exec keeps the arrangement.
    Command::new("/proc/self/exe")
        .args(["run", "-c"])
        .arg(file)
        .env_remove(PARENT)
        .exec()
}
