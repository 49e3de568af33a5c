//! A crowd of sites for one hub: as many gateways as asked for, each with keys, a socket and an address of its own, all in this
//! process. What they say to the hub is what as many daemons would say.
//!
//! ```text
//!   crowd peers SITES                           prints the hub's `peers:`
//!   crowd run   SITES HUB HUB_KEY HUB_ADDRESS   HUB: where it listens; HUB_ADDRESS: what answers pings behind it
//! ```
//!
//! Site n sends from 127.1.x.y, and has 100.(64 + x).y.0/24 behind it (`x` and `y` are n's two bytes). Each one pings through its
//! tunnel until it is answered; then a line says how long that took for all. They stay, keepalives and all, until standard input
//! ends.

use esplane_api::{IpPrefix, Now, SelectorPair, TunnelId};
use esplane_control_noise::{LoadPolicy, PeerConfig, PublicKey, StaticSecretKey};
use esplane_tests::sim::{Gateway, GatewaySpec, Random};
use std::{
    error::Error,
    io::{ErrorKind, Read},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Bounded, as every site has a socket and as two bytes of addresses tell them apart.
const SITES_MAX: u16 = 10_000;
/// How long a site waits for an answer before it asks again.
const PATIENCE: Duration = Duration::from_secs(2);
/// Sites that ask for the first time, a turn. A hub under load answers fewer, and the others ask again.
const BEGINNERS: usize = 20;
/// All must have been answered by then.
const TIME_MAX: Duration = Duration::from_secs(120);

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["peers", sites] => count(sites).map(print_peers),
        ["run", sites, hub, key, address] => Hub::parse(hub, key, address)
            .and_then(|hub| Ok((hub, count(sites)?)))
            .and_then(|(hub, sites)| run(&hub, sites)),
        _ => Err("usage: crowd peers SITES | crowd run SITES HUB HUB_KEY HUB_ADDRESS".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crowd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn count(text: &str) -> Result<u16, Box<dyn Error>> {
    let sites = text.parse().ok().filter(|sites| *sites <= SITES_MAX);
    sites.ok_or_else(|| format!("`{text}` is no number of sites; at most {SITES_MAX}").into())
}

fn print_peers(sites: u16) {
    println!("peers:");
    for site in 0..sites {
        println!("  - name: site-{site}");
        println!("    public_key: {}", key(site).public_key());
        println!("    routes: [{}]", network(site));
    }
}

struct Hub {
    endpoint: SocketAddr,
    key: PublicKey,
    address: Ipv4Addr,
}

impl Hub {
    fn parse(endpoint: &str, key: &str, address: &str) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            endpoint: endpoint.parse()?,
            key: key.parse()?,
            address: address.parse()?,
        })
    }
}

/// Anybody may know it: it protects nothing. Not the first byte: X25519 does not use all its bits.
fn key(site: u16) -> StaticSecretKey {
    let mut seed = [7; 32];
    seed[1..3].copy_from_slice(&site.to_be_bytes());
    StaticSecretKey::generate(seed)
}

fn network(site: u16) -> IpPrefix {
    let [x, y] = site.to_be_bytes();
    format!("100.{}.{y}.0/24", 64 + x)
        .parse()
        .expect("a network")
}

struct Site {
    number: u16,
    gateway: Gateway,
    socket: UdpSocket,
    asked: Option<Duration>,
    answered: bool,
}

fn run(hub: &Hub, sites: u16) -> Outcome {
    let clock = Clock(Instant::now());
    let mut random = Random::new(clock.now().unix.as_nanos() as u64);
    let sites = (0..sites).map(|site| Site::new(site, hub, clock.now(), &mut random));
    let mut sites: Vec<Site> = sites.collect::<Result<_, _>>()?;
    let (started, mut told, mut last_second) = (clock.now().monotonic, false, 0);
    let ended = until_input_ends();
    while !ended.load(Relaxed) {
        let now = clock.now();
        let second = now.monotonic.as_secs() != last_second;
        last_second = now.monotonic.as_secs();
        let mut beginners = 0;
        for site in &mut sites {
            if site.asked.is_none() {
                beginners += 1;
                if beginners > BEGINNERS {
                    continue;
                }
            }
            site.turn(now, second, hub)?;
        }
        let took = now.monotonic - started;
        let answered = sites.iter().filter(|site| site.answered).count();
        if answered == sites.len() && !told {
            told = true;
            println!("answered {answered} after {:.1} s", took.as_secs_f64());
        }
        if took > TIME_MAX && !told {
            return Err(format!("{answered} of {} were answered", sites.len()).into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

impl Site {
    fn new(number: u16, hub: &Hub, now: Now, random: &mut Random) -> Result<Self, Box<dyn Error>> {
        let [x, y] = number.to_be_bytes();
        let socket = UdpSocket::bind((Ipv4Addr::new(127, 1, x, y), 4501))?;
        socket.set_nonblocking(true)?;
        let behind: IpPrefix = format!("{}/32", hub.address).parse()?;
        let peer = PeerConfig {
            endpoint: Some(hub.endpoint),
            selectors: vec![SelectorPair::to(behind)],
            ..PeerConfig::new(TunnelId(1), "hub", hub.key)
        };
        let spec = GatewaySpec {
            worker_ports: Vec::new(),
            name: format!("site-{number}"),
            private_key: key(number),
            address: socket.local_addr()?,
            under_load: LoadPolicy::default(),
            peers: vec![peer],
        };
        Ok(Self {
            number,
            gateway: Gateway::start(spec, now, random),
            socket,
            asked: None,
            answered: false,
        })
    }

    fn turn(&mut self, now: Now, second: bool, hub: &Hub) -> Outcome {
        let mut datagram = [0; 2048];
        loop {
            match self.socket.recv_from(&mut datagram) {
                Ok((bytes, from)) => self.gateway.receive(now, from, &datagram[..bytes]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.answered |= !self.gateway.take_delivered().is_empty();
        let impatient = |asked| now.monotonic >= asked + PATIENCE;
        if !self.answered && self.asked.is_none_or(impatient) {
            self.asked = Some(now.monotonic);
            let [x, y] = self.number.to_be_bytes();
            let ping = ping(Ipv4Addr::new(100, 64 + x, y, 1), hub.address);
            self.gateway.send_clear(now, &[ping]);
        }
        if second {
            self.gateway.second(now);
        }
        self.gateway.wake(now);
        for datagram in self.gateway.take_outbox() {
            // A full buffer loses it, as a network would.
            let _ = self.socket.send_to(&datagram.payload, datagram.to);
        }
        Ok(())
    }
}

/// An ICMP echo request (RFC 792).
fn ping(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    const ICMP: u8 = 1;
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, ICMP, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    set_checksum(&mut packet, 10);
    let mut echo = [8, 0, 0, 0, 0, 1, 0, 1];
    set_checksum(&mut echo, 2);
    packet.extend(echo);
    packet
}

/// The Internet checksum (RFC 1071) of bytes in which it is still zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let pairs = bytes.as_chunks::<2>().0.iter();
    let mut sum: u32 = pairs.map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    bytes[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

struct Clock(Instant);

impl Clock {
    fn now(&self) -> Now {
        Now {
            monotonic: self.0.elapsed(),
            unix: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
        }
    }
}

/// Becomes true when nothing more comes.
fn until_input_ends() -> &'static AtomicBool {
    static ENDED: AtomicBool = AtomicBool::new(false);
    thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        ENDED.store(true, Relaxed);
    });
    &ENDED
}
