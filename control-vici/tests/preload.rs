//! The preload library in a process of its own: this test, run again, plays charon on a socket that it
//! believes to be netlink's.
//!
//! ```text
//!   this process: server::run on a socket of the test's        again, with LD_PRELOAD: charon's part
//!        killed and begun anew ◀───── unix socket ─────▶ library ─ socket(AF_NETLINK, …, NETLINK_XFRM)
//! ```

use esplane_api::{AeadSuite, KeyMaterial, Limits, Now};
use esplane_control_vici::kernel::server;
use esplane_control_vici::xfrm::message::parse_error;
use esplane_control_vici::xfrm::sa::{build_sa, usersa_id};
use esplane_control_vici::xfrm::wire::{Builder, flag, kind, messages};
use esplane_control_vici::xfrm::{
    Progress, SaKey, XfrmCipher, XfrmEvent, XfrmMode, XfrmRequest, XfrmSa,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_XFRM};
use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};
use tokio::{sync::mpsc, task::JoinHandle};

const CHARON: &str = "ESPLANE_TEST_PLAYS_CHARON";
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if env::var_os(CHARON).is_some() {
        return charon();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(PATIENCE, story())
            .await
            .expect("the story ends in time");
    });
    println!("test charon_outlives_esplane ... ok");
}

/// charon starts before Esplane, asks, sees Esplane killed, asks again.
async fn story() {
    let directory = env::temp_dir().join(format!("esplane-preload-test-{}", std::process::id()));
    let socket = directory.join("xfrm.sock");
    let mut charon = Charon::start(&socket);

    // It asks while nobody is there, and has its answer once somebody is.
    charon.write("add");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut esplane = Esplane::start(&socket);
    assert!(matches!(esplane.told().await, XfrmEvent::Snapshot(sas) if sas.is_empty()));
    assert!(matches!(esplane.told().await, XfrmEvent::Installed(sa) if sa.key == the_sa().key));
    assert_eq!(charon.reads(), "added 0");
    esplane.asks(XfrmRequest::Store {
        key: the_sa().key,
        progress: Progress {
            sent: Some(1 << 26),
            packets: 5,
            bytes: 500,
            ..Progress::default()
        },
    });
    assert!(matches!(esplane.told().await, XfrmEvent::Reply(reply) if reply.done));

    // Killed, and begun anew: it finds what it had, and charon notices nothing.
    esplane.kill().await;
    let mut esplane = Esplane::start(&socket);
    let XfrmEvent::Snapshot(found) = esplane.told().await else {
        panic!()
    };
    let [sa] = &found[..] else {
        panic!("{found:?}")
    };
    assert_eq!(
        (sa.key, sa.sequence_sent, sa.packets),
        (the_sa().key, 1 << 26, 5)
    );
    let (XfrmCipher::Aead(a), XfrmCipher::Aead(b)) = (&sa.cipher, &the_sa().cipher) else {
        panic!()
    };
    assert!(a.same_secret(b));
    esplane.asks(XfrmRequest::Expire {
        key: sa.key,
        hard: false,
    });
    assert_eq!(charon.asks("event"), "event 24 from 0");

    // Killed for longer than charon is to wait: what it wants forgotten is done; what it wants to
    // know is not known. Esplane hears of both when it is back.
    esplane.kill().await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(charon.asks("get"), "get error 100");
    assert_eq!(charon.asks("delete"), "deleted 0");
    let mut esplane = Esplane::start(&socket);
    assert!(matches!(esplane.told().await, XfrmEvent::Snapshot(sas) if sas.len() == 1));
    assert!(matches!(esplane.told().await, XfrmEvent::Removed(key) if key == the_sa().key));
    assert_eq!(charon.asks("get"), "get error 3");
    // Waiting costs nothing: nothing was there to be read all the time.
    assert_eq!(charon.asks("idle"), "idle true");

    charon.end();
    esplane.kill().await;
    let _ = std::fs::remove_dir_all(directory);
}

/// The kernel's part, as the daemon runs it.
struct Esplane {
    task: JoinHandle<()>,
    events: mpsc::Receiver<XfrmEvent>,
    requests: mpsc::Sender<XfrmRequest>,
}

impl Esplane {
    fn start(socket: &Path) -> Self {
        let (ask, mut asked) = mpsc::channel(8);
        let (tell, events) = mpsc::channel(8);
        let socket = socket.to_owned();
        let task = tokio::spawn(async move {
            let clock = || Now {
                monotonic: Duration::from_secs(7),
                unix: Duration::from_secs(1_700_000_000),
            };
            let random = Box::new(|| 7);
            server::run(&socket, &mut asked, &tell, clock, random)
                .await
                .unwrap();
        });
        Self {
            task,
            events,
            requests: ask,
        }
    }

    async fn told(&mut self) -> XfrmEvent {
        self.events.recv().await.expect("an event")
    }

    fn asks(&self, request: XfrmRequest) {
        self.requests.try_send(request).unwrap();
    }

    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// The other process.
struct Charon {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Charon {
    fn start(socket: &Path) -> Self {
        let mut process = Command::new(env::current_exe().unwrap())
            .env("LD_PRELOAD", library())
            .env("ESPLANE_XFRM_SOCKET", socket)
            .env(CHARON, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (to, from) = (
            process.stdin.take().unwrap(),
            process.stdout.take().unwrap(),
        );
        Self {
            process,
            to,
            from: BufReader::new(from),
        }
    }

    fn write(&mut self, line: &str) {
        writeln!(self.to, "{line}").unwrap();
    }

    /// Reading holds up this thread, so another serves meanwhile.
    fn reads(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn asks(&mut self, line: &str) -> String {
        self.write(line);
        self.reads()
    }

    fn end(mut self) {
        drop(self.to);
        let mut rest = String::new();
        let _ = self.from.read_to_string(&mut rest);
        assert!(self.process.wait().unwrap().success());
    }
}

/// Built beside this test, since the package depends on it.
fn library() -> PathBuf {
    let here = env::current_exe().unwrap();
    let found = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join("libesplane_preload.so"));
    let found = found.into_iter().find(|path| path.exists());
    found.expect("libesplane_preload.so beside the test: cargo build -p esplane-preload")
}

fn the_sa() -> XfrmSa {
    let secret: Vec<u8> = (1..=36).collect();
    XfrmSa {
        key: SaKey {
            destination: "203.0.113.1".parse().unwrap(),
            spi: "0xc0ffee01".parse().unwrap(),
            mark: (0, 0),
        },
        source: "198.51.100.1".parse().unwrap(),
        reqid: 1,
        mode: XfrmMode::Tunnel,
        mark: None,
        if_id: None,
        direction: None,
        cipher: XfrmCipher::Aead(KeyMaterial::new(AeadSuite::Aes256Gcm16, &secret).unwrap()),
        esn: true,
        window_packets: 32,
        encap: None,
        soft: Limits::NONE,
        hard: Limits::NONE,
        sequence_sent: 0,
        sequence_received: 0,
        packets: 0,
        bytes: 0,
        added_unix_seconds: 0,
    }
}

// --- in the other process

/// Does what it is told, a line each, with sockets as `kernel-netlink` has them.
fn charon() {
    let mut asks = Socket::new(NETLINK_XFRM).unwrap();
    asks.bind(&SocketAddr::new(0, 0)).unwrap();
    let mut listens = Socket::new(NETLINK_XFRM).unwrap();
    listens.bind(&SocketAddr::new(0, 0b1100_0011)).unwrap();
    let flags = flag::REQUEST | flag::ACK;
    let id = usersa_id(&the_sa().key);
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "add" => println!(
                "added {}",
                outcome(&asks, build_sa(kind::NEWSA, flags, 1, &the_sa()))
            ),
            "delete" => println!(
                "deleted {}",
                outcome(&asks, Builder::new(kind::DELSA, flags, 2, &id))
            ),
            "get" => println!(
                "get error {}",
                outcome(&asks, Builder::new(kind::GETSA, flag::REQUEST, 3, &id))
            ),
            "event" => {
                let (datagram, from) = listens.recv_from_full().unwrap();
                let one = messages(&datagram).next().unwrap().unwrap();
                println!("event {} from {}", one.kind, from.port_number());
            }
            "idle" => {
                asks.set_non_blocking(true).unwrap();
                listens.set_non_blocking(true).unwrap();
                let nothing = |socket: &Socket| {
                    let mut bytes = Vec::with_capacity(1);
                    let error = socket.recv(&mut bytes, 0).map_err(|error| error.kind());
                    error == Err(std::io::ErrorKind::WouldBlock)
                };
                println!("idle {}", nothing(&asks) && nothing(&listens));
            }
            other => panic!("{other}"),
        }
    }
}

fn outcome(socket: &Socket, request: Builder) -> i32 {
    let request = request.finish();
    socket.send_to(&request, &SocketAddr::new(0, 0), 0).unwrap();
    let (datagram, _) = socket.recv_from_full().unwrap();
    let one = messages(&datagram).next().unwrap().unwrap();
    assert_eq!(one.kind, kind::ERROR);
    parse_error(one.body).unwrap()
}
