//! Packets a second: a sender that hands the kernel many datagrams at once (`UDP_SEGMENT`), and a receiver that
//! takes many at once (`UDP_GRO`). So neither end is what is measured, but what lies between.
//!
//! ```text
//!   packet-rate receive ADDRESS 64|imix SECONDS     prints packets a second
//!   packet-rate send    ADDRESS 64|imix SECONDS
//! ```
//!
//! Each size has a port of its own, so the receiver counts bytes. The receiver's time begins a moment after the first packet.

use nix::sys::socket::{
    setsockopt,
    sockopt::{UdpGroSegment, UdpGsoSegment},
};
use std::{
    error::Error,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    process::ExitCode,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

/// The first port; each further size has the next.
const PORT: u16 = 5400;
/// Bytes of IP and UDP header before each payload.
const HEADER_BYTES: usize = 28;
/// What the receiver lets pass before it counts.
const WARM_UP: Duration = Duration::from_millis(300);
/// How long the receiver waits for the first packet.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sizes of IP packets, and how many of each are sent at once.
type Mix = &'static [(usize, usize)];
const SMALL: Mix = &[(64, 64)];
/// 7 : 4 : 1; the largest fits every tunnel.
const IMIX: Mix = &[(64, 56), (576, 32), (1400, 8)];

type Outcome = Result<(), Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match parse(&arguments) {
        Some((true, address, mix, time)) => send(address, mix, time),
        Some((false, address, mix, time)) => receive(address, mix, time),
        None => Err("usage: packet-rate send|receive ADDRESS 64|imix SECONDS".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("packet-rate: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: &[String]) -> Option<(bool, IpAddr, Mix, Duration)> {
    let [role, address, mix, seconds] = arguments else {
        return None;
    };
    let sends = match role.as_str() {
        "send" => true,
        "receive" => false,
        _ => return None,
    };
    let mix = match mix.as_str() {
        "64" => SMALL,
        "imix" => IMIX,
        _ => return None,
    };
    let time = Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?;
    let bounded = time <= Duration::from_secs(120);
    bounded.then_some((sends, address.parse().ok()?, mix, time))
}

fn send(to: IpAddr, mix: Mix, time: Duration) -> Outcome {
    let sockets = mix
        .iter()
        .zip(PORT..)
        .map(|(&(packet_bytes, count), port)| {
            let payload_bytes = packet_bytes - HEADER_BYTES;
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect((to, port))?;
            setsockopt(&socket, UdpGsoSegment, &(payload_bytes as i32))?;
            Ok((socket, vec![0; payload_bytes * count]))
        });
    let sockets: Vec<(UdpSocket, Vec<u8>)> = sockets.collect::<Result<_, Box<dyn Error>>>()?;
    let end = Instant::now() + time;
    while Instant::now() < end {
        for (socket, payloads) in &sockets {
            match socket.send(payloads) {
                // Nobody listens yet, or not any more; or the queues are full: what arrives is what counts.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

fn receive(at: IpAddr, mix: Mix, time: Duration) -> Outcome {
    let mut sockets = Vec::new();
    for (&(packet_bytes, _), port) in mix.iter().zip(PORT..) {
        let socket = UdpSocket::bind(SocketAddr::new(at, port))?;
        setsockopt(&socket, UdpGroSegment, &true)?;
        setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(16 << 20))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        sockets.push((socket, packet_bytes - HEADER_BYTES));
    }
    let (packets, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let started = Instant::now();
    let rate = thread::scope(|scope| {
        for (socket, payload_bytes) in &sockets {
            let (packets, over) = (&packets, &over);
            scope.spawn(move || {
                let mut buffer = vec![0; 1 << 16];
                while !over.load(Relaxed) {
                    if let Ok(bytes) = socket.recv(&mut buffer) {
                        packets.fetch_add((bytes / payload_bytes) as u64, Relaxed);
                    }
                }
            });
        }
        while packets.load(Relaxed) == 0 && started.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(WARM_UP);
        let (before, from) = (packets.load(Relaxed), Instant::now());
        thread::sleep(time);
        let rate = (packets.load(Relaxed) - before) as f64 / from.elapsed().as_secs_f64();
        over.store(true, Relaxed);
        rate
    });
    if packets.load(Relaxed) == 0 {
        return Err("nothing arrived".into());
    }
    println!("{rate:.0}");
    Ok(())
}
