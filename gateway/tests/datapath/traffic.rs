//! Traffic through the tunnel that shows each lost, doubled or damaged packet.

use crate::site::{Family, Site, Sites, within};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};
use rustix::event::{PollFd, PollFlags};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    ops::Range,
    thread,
    time::Duration,
};

/// Datagrams on their way at once, per flow: fewer than fit into the default receive buffer of the one
/// socket that echoes for all flows.
const WINDOW: usize = 8;
const PATIENCE: Duration = Duration::from_secs(10);

/// A UDP socket in a site's namespace; it stays there.
pub fn bind(site: &Site, address: &str) -> UdpSocket {
    let address: SocketAddr = address.parse().unwrap();
    let socket =
        within(site.namespace(), || UdpSocket::bind(address)).expect("an address of the site");
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Sends `count` datagrams in each of `flows` flows of each family from a to b, where each is sent back;
/// answers how many there and back were seen, which are all.
pub fn echo_numbered_datagrams(sites: &Sites, flows: usize, count: usize) -> usize {
    for family in [Family::V4, Family::V6] {
        let port = 7000;
        let [near, far] =
            [&sites.a, &sites.b].map(|site| SocketAddr::new(site.inner(family), port));
        let echo = bind(&sites.b, &far.to_string());
        thread::scope(|scope| {
            let echoing = scope.spawn(|| {
                let mut buffer = [0; 2048];
                for _ in 0..flows * count {
                    let (bytes, from) = echo.recv_from(&mut buffer).unwrap_or_else(|error| {
                        panic!(
                            "{error}\na {:?}\nb {:?}",
                            sites.a.snapshot(),
                            sites.b.snapshot()
                        )
                    });
                    echo.send_to(&buffer[..bytes], from).unwrap();
                }
            });
            for flow in 0..flows {
                let from = SocketAddr::new(near.ip(), near.port() + flow as u16);
                let socket = bind(&sites.a, &from.to_string());
                scope.spawn(move || one_flow(&socket, far, count));
            }
            echoing.join().expect("all arrive");
        });
    }
    2 * flows * count
}

fn one_flow(socket: &UdpSocket, far: SocketAddr, count: usize) {
    let (mut sent, mut buffer) = (0, [0; 2048]);
    let mut seen = vec![false; count];
    for received in 0..count {
        while sent < count && sent < received + WINDOW {
            socket.send_to(&datagram(sent), far).unwrap();
            sent += 1;
        }
        let (bytes, from) = socket.recv_from(&mut buffer).expect("an echo");
        // The kernel moves a flow to the TUN queue its answers come from, so one may overtake another once.
        let number = u32::from_be_bytes(buffer[..4].try_into().unwrap()) as usize;
        assert_eq!((&buffer[..bytes], from), (&datagram(number)[..], far));
        assert!(
            !std::mem::replace(&mut seen[number], true),
            "{number} came twice"
        );
    }
}

/// Every size up to the MTU comes up, and each datagram has bytes of its own.
fn datagram(number: usize) -> Vec<u8> {
    let bytes = 4 + number * 37 % 1340;
    let mut datagram = (number as u32).to_be_bytes().to_vec();
    datagram.resize(bytes, number as u8);
    datagram
}

/// Sends `bytes` over each of `streams` connections of each family in each direction, all at once, and
/// compares each byte that arrives.
pub fn bulk(sites: &Sites, families: &[Family], streams: usize, bytes: usize) {
    thread::scope(|scope| {
        for family in families {
            for [from, to] in [[&sites.a, &sites.b], [&sites.b, &sites.a]] {
                for stream in 0..streams {
                    scope.spawn(move || one_stream(from, to, *family, stream, bytes));
                }
            }
        }
    });
}

/// The next connection; a peer that never comes is a failure, not a wait for ever.
fn accept(listener: &TcpListener) -> TcpStream {
    let mut waiting = [PollFd::new(listener, PollFlags::IN)];
    let timeout = PATIENCE.try_into().unwrap();
    let came = rustix::event::poll(&mut waiting, Some(&timeout)).unwrap();
    assert_eq!(
        came,
        1,
        "nobody has connected to {:?}",
        listener.local_addr()
    );
    listener.accept().unwrap().0
}

fn one_stream(from: &Site, to: &Site, family: Family, stream: usize, bytes: usize) {
    let address = SocketAddr::new(to.inner(family), 0);
    let listener = within(to.namespace(), || TcpListener::bind(address)).unwrap();
    let address = listener.local_addr().unwrap();
    let content = move |range: Range<usize>| -> Vec<u8> {
        range
            .map(|at| ((at ^ (at >> 9)).wrapping_mul(0x9e37_79b1 + stream) >> 7) as u8)
            .collect()
    };
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut socket = within(from.namespace(), || {
                TcpStream::connect_timeout(&address, PATIENCE)
            })
            .unwrap();
            socket.set_write_timeout(Some(PATIENCE)).unwrap();
            let mut at = 0;
            while at < bytes {
                // Large pieces, and now and then a few bytes that leave by themselves.
                let piece = [150_000, 1, 77, 40_000, 1340][at % 5].min(bytes - at);
                socket.write_all(&content(at..at + piece)).unwrap();
                at += piece;
            }
            socket.shutdown(Shutdown::Write).unwrap();
            assert_eq!(
                socket.read(&mut [0]).unwrap(),
                0,
                "the other end closes last"
            );
        });
        let mut socket = accept(&listener);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut at, mut buffer) = (0, vec![0; 1 << 16]);
        loop {
            let got = socket.read(&mut buffer).unwrap_or_else(|error| {
                panic!("{error}\na {:?}\nb {:?}", from.snapshot(), to.snapshot())
            });
            assert!(
                buffer[..got] == content(at..at + got),
                "damaged from byte {at} on"
            );
            at += got;
            if got == 0 {
                break;
            }
        }
        assert_eq!(at, bytes);
    });
}

/// Sends many datagrams with one system call (`UDP_SEGMENT`) from a to b in both families, of several
/// lengths, the last one shorter; they must arrive one by one and in order.
pub fn send_segmented(sites: &Sites) {
    for family in [Family::V4, Family::V6] {
        let [near, far] =
            [&sites.a, &sites.b].map(|site| SocketAddr::new(site.inner(family), 7300));
        let receiver = bind(&sites.b, &far.to_string());
        let sender = bind(&sites.a, &near.to_string());
        for (segment, count, last) in [
            (1, 40, 1),
            (64, 64, 64),
            (333, 60, 7),
            (1340, 40, 1339),
            (1000, 2, 1),
        ] {
            setsockopt(&sender, UdpGsoSegment, &(segment as i32)).expect("a kernel with UDP GSO");
            let payload: Vec<u8> = (0..(count - 1) * segment + last)
                .map(|at| ((at * 7) >> 3) as u8)
                .collect();
            assert_eq!(sender.send_to(&payload, far).unwrap(), payload.len());
            let mut buffer = [0; 2048];
            for datagram in payload.chunks(segment) {
                let (bytes, from) = receiver.recv_from(&mut buffer).unwrap_or_else(|error| {
                    panic!(
                        "{error}\na {:?}\nb {:?}",
                        sites.a.snapshot(),
                        sites.b.snapshot()
                    )
                });
                assert!(
                    from == near && buffer[..bytes] == *datagram,
                    "{count} of {segment} bytes"
                );
            }
        }
    }
}

/// Pings b from a in both families; the kernel answers. Answers how many times in all.
pub fn ping(sites: &Sites, count: u8) -> usize {
    for family in [Family::V4, Family::V6] {
        within(sites.a.namespace(), || {
            let far = SocketAddr::new(sites.b.inner(family), 0);
            // Message types of echo and its reply; a raw IPv4 socket shows the IP header, too.
            let (domain, protocol, echo, reply, skip) = match family {
                Family::V4 => (Domain::IPV4, Protocol::ICMPV4, 8, 0, 20),
                Family::V6 => (Domain::IPV6, Protocol::ICMPV6, 128, 129, 0),
            };
            let mut socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
            socket.connect(&far.into()).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            for number in 0..count {
                // The checksum of ICMP is right with the number in both halves of it, for IPv6 the kernel writes it.
                let mut message = [echo, 0, 0, 0, 0xe5, 0x91, 0, number];
                let sum: u32 = message
                    .chunks(2)
                    .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
                    .sum();
                message[2..4].copy_from_slice(&(!(sum as u16 + (sum >> 16) as u16)).to_be_bytes());
                socket.send(&message).unwrap();
                let mut buffer = [0; 128];
                loop {
                    let bytes = socket.read(&mut buffer).expect("a pong");
                    let answer = &buffer[skip..bytes];
                    if answer[0] == reply && answer[4..] == message[4..] {
                        break;
                    }
                }
            }
        });
    }
    2 * usize::from(count)
}
