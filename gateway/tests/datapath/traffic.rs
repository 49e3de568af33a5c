//! Traffic through the tunnel that shows each lost, doubled or damaged packet.

use crate::site::{Family, Site, Sites, within};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::Read,
    net::{SocketAddr, UdpSocket},
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
