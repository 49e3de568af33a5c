//! An XDP program on an interface, and the two things it looks into: which networks are taken, and the sockets.

use super::{
    super::{
        assembly::{Value, assemble},
        bpf::{Map, MapKind, Program, ProgramKind},
    },
    XdpError, failed,
};
use esplane_api::IpPrefix;
use std::{
    collections::BTreeMap,
    fmt, io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
    time::Duration,
};

/// Networks that a program can know.
const NETWORKS: u32 = 1 << 16;
/// Queues that an interface can have.
const QUEUES: u32 = 1024;
/// What a program says of a frame that stays with the kernel.
const XDP_PASS: i64 = 2;
// linux/if_link.h
const SKB_MODE: u32 = 2;
const DRIVER_MODE: u32 = 4;
/// The interface may have its last program for a moment yet.
const BUSY_RETRIES: u32 = 40;
const BUSY_WAIT: Duration = Duration::from_millis(50);

/// Which frames a program takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// ESP, and ESP in UDP on these ports.
    Outer {
        /// Ours, and the one we share with a charon (or ours again).
        ports: [u16; 2],
    },
    /// Packets for networks behind tunnels.
    Inner {
        /// The interface's own MAC address.
        mac: [u8; 6],
    },
}

/// Where in the kernel the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// Behind it: works on every interface, and slower.
    Generic,
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// A program that steers. It leaves the interface when this is dropped, or the process ends, however it ends.
#[derive(Debug)]
pub struct Steering {
    interface: String,
    parts: Parts,
    mode: XdpMode,
    /// What the program knows, as it was set last.
    networks: BTreeMap<IpPrefix, u32>,
    _link: OwnedFd,
}

/// All but its place.
#[derive(Debug)]
struct Parts {
    sockets: Map,
    v4: Map,
    v6: Map,
    program: Program,
}

impl Steering {
    /// Attaches it: in the driver if that can, behind it otherwise. It takes nothing yet.
    pub fn attach(interface: &str, link: u32, taken: Taken) -> Result<Self, XdpError> {
        let parts = Parts::load(interface, taken, XDP_PASS)?;
        let (attached, mode) = match attach(&parts.program, link, DRIVER_MODE) {
            Ok(attached) => (attached, XdpMode::Native),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(failed("attach a program", interface, error));
            }
            Err(_) => {
                let attached = attach(&parts.program, link, SKB_MODE)
                    .map_err(|error| failed("attach a program", interface, error))?;
                (attached, XdpMode::Generic)
            }
        };
        Ok(Self {
            interface: interface.to_owned(),
            parts,
            mode,
            networks: BTreeMap::new(),
            _link: attached,
        })
    }

    /// Where it runs.
    pub fn mode(&self) -> XdpMode {
        self.mode
    }

    /// Its interface.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// From now on frames of this queue go to this socket.
    pub fn add_socket(&self, queue: u32, socket: impl AsFd) -> Result<(), XdpError> {
        let descriptor = socket.as_fd().as_raw_fd() as u32;
        let set = self.parts.sockets.set(&queue.to_ne_bytes(), descriptor);
        set.map_err(|error| failed("name the socket of a queue", &self.interface, error))
    }

    /// Makes exactly these the networks it knows, each with the largest packet that is taken: 0 for one that is the kernel's
    /// though a larger one is taken.
    pub fn set_networks(&mut self, wanted: &BTreeMap<IpPrefix, u32>) -> Result<(), XdpError> {
        let fails = |error| failed("name a network", &self.interface, error);
        for (network, largest) in wanted {
            if self.networks.get(network) != Some(largest) {
                let (map, key) = self.parts.place(network);
                map.set(&key, *largest).map_err(fails)?;
                self.networks.insert(*network, *largest);
            }
        }
        let gone: Vec<_> = self
            .networks
            .keys()
            .filter(|known| !wanted.contains_key(known))
            .copied()
            .collect();
        for network in gone {
            let (map, key) = self.parts.place(&network);
            map.remove(&key).map_err(fails)?;
            self.networks.remove(&network);
        }
        Ok(())
    }
}

impl Parts {
    /// `otherwise`: the verdict on a taken frame whose queue has no socket.
    fn load(interface: &str, taken: Taken, otherwise: i64) -> Result<Self, XdpError> {
        let fails = |error| failed("make a map", interface, error);
        let sockets = Map::create(MapKind::Sockets, 4, QUEUES).map_err(fails)?;
        let v4 = Map::create(MapKind::Networks, 8, NETWORKS).map_err(fails)?;
        let v6 = Map::create(MapKind::Networks, 20, NETWORKS).map_err(fails)?;
        let map = |map: &Map| Value::Map(map.as_fd().as_raw_fd());
        let mut names = vec![
            ("sockets", map(&sockets)),
            ("networks4", map(&v4)),
            ("networks6", map(&v6)),
            ("otherwise", Value::Number(otherwise)),
        ];
        let text = match taken {
            Taken::Outer { ports } => {
                // As they are loaded from the frame.
                let [port, other] = ports.map(|port| Value::Number(port.to_be().into()));
                names.extend([("port", port), ("other_port", other)]);
                include_str!("outer.bpf")
            }
            Taken::Inner { mac } => {
                let [a, b, c, d, e, f] = mac;
                let mac = u64::from_ne_bytes([a, b, c, d, e, f, 0, 0]);
                names.push(("mac", Value::Number(mac.cast_signed())));
                include_str!("inner.bpf")
            }
        };
        let code = assemble(text, &names)?;
        let program =
            Program::load(ProgramKind::Xdp, &code, "esplane").map_err(|(source, log)| {
                let interface = interface.to_owned();
                match log.is_empty() {
                    true => failed("load a program", &interface, source),
                    false => XdpError::Verifier {
                        interface,
                        source,
                        log,
                    },
                }
            })?;
        Ok(Self {
            sockets,
            v4,
            v6,
            program,
        })
    }

    /// The map and the key of a network: the length of its prefix, and its address.
    fn place(&self, network: &IpPrefix) -> (&Map, Vec<u8>) {
        let mut key = u32::from(network.length()).to_ne_bytes().to_vec();
        match network.address() {
            IpAddr::V4(address) => {
                key.extend(address.octets());
                (&self.v4, key)
            }
            IpAddr::V6(address) => {
                key.extend(address.octets());
                (&self.v6, key)
            }
        }
    }
}

fn attach(program: &Program, link: u32, mode: u32) -> io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        match program.attach(link, mode) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < BUSY_RETRIES => {
                tries += 1;
                thread::sleep(BUSY_WAIT);
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the programs say of a frame that they would take, here where no socket is.
    const TAKEN: u32 = 1;
    const PASSED: u32 = 2;
    const MAC: [u8; 6] = [0xf2, 0, 0, 0, 0xfe, 1];
    const ESP: [u8; 8] = [0, 0, 1, 0, 0, 0, 0, 1];
    const HANDSHAKE: [u8; 8] = [0, 0, 0, 0, 9, 9, 9, 9];

    /// `None` where nothing can be loaded, which is said.
    fn load(taken: Taken, networks: &[(&str, u32)]) -> Option<Parts> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let parts = Parts::load("test", taken, TAKEN.into()).unwrap();
        for (network, largest) in networks {
            let (map, key) = parts.place(&network.parse().unwrap());
            map.set(&key, *largest).unwrap();
        }
        Some(parts)
    }

    fn frame(mac: [u8; 6], kind: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = mac.to_vec();
        frame.extend([2; 6]);
        frame.extend(kind.to_be_bytes());
        frame.extend(packet);
        frame.resize(frame.len().max(60), 0);
        frame
    }

    fn v4(above: u8, to: [u8; 4], change: impl Fn(&mut Vec<u8>), payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0u8; 20];
        (packet[0], packet[8], packet[9]) = (0x45, 64, above);
        packet[16..20].copy_from_slice(&to);
        packet[3] = 20 + payload.len() as u8;
        change(&mut packet);
        packet.extend(payload);
        frame(MAC, 0x0800, &packet)
    }

    fn v6(above: u8, to: &str, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0u8; 40];
        (packet[0], packet[6], packet[7]) = (0x60, above, hop_limit);
        packet[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        packet[24..].copy_from_slice(&to.parse::<std::net::Ipv6Addr>().unwrap().octets());
        packet.extend(payload);
        frame(MAC, 0x86dd, &packet)
    }

    fn in_vlan(mut frame: Vec<u8>) -> Vec<u8> {
        frame.splice(12..12, [0x81, 0, 0, 5]);
        frame
    }

    fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0x11, 0x94];
        datagram.extend(port.to_be_bytes());
        datagram.extend([0; 4]);
        datagram.extend(payload);
        datagram
    }

    fn check(parts: &Parts, classes: &[(&str, Vec<u8>, u32)]) {
        for (class, frame, verdict) in classes {
            assert_eq!(parts.program.run(frame).unwrap(), *verdict, "{class}");
        }
    }

    #[test]
    fn outside_only_esp_for_us_is_taken() {
        let ours = [("192.0.2.1/32", u32::MAX), ("2001:db8::1/128", u32::MAX)];
        let Some(parts) = load(
            Taken::Outer {
                ports: [4501, 4500],
            },
            &ours,
        ) else {
            return;
        };
        let (us, same) = ([192, 0, 2, 1], |_: &mut Vec<u8>| {});
        check(
            &parts,
            &[
                ("ESP", v4(50, us, same, &ESP), TAKEN),
                ("ESP in UDP", v4(17, us, same, &udp(4500, &ESP)), TAKEN),
                ("ESP over IPv6", v6(50, "2001:db8::1", 64, &ESP), TAKEN),
                (
                    "ESP in UDP over IPv6",
                    v6(17, "2001:db8::1", 64, &udp(4500, &ESP)),
                    TAKEN,
                ),
                (
                    "a handshake",
                    v4(17, us, same, &udp(4500, &HANDSHAKE)),
                    PASSED,
                ),
                (
                    "a handshake over IPv6",
                    v6(17, "2001:db8::1", 64, &udp(4500, &HANDSHAKE)),
                    PASSED,
                ),
                ("the other port", v4(17, us, same, &udp(4501, &ESP)), TAKEN),
                ("another port", v4(17, us, same, &udp(500, &ESP)), PASSED),
                (
                    "another port over IPv6",
                    v6(17, "2001:db8::1", 64, &udp(500, &ESP)),
                    PASSED,
                ),
                ("transit", v4(50, [192, 0, 2, 9], same, &ESP), PASSED),
                ("transit over IPv6", v6(50, "2001:db8::9", 64, &ESP), PASSED),
                (
                    "a first fragment",
                    v4(50, us, |ip| ip[6] = 0x20, &ESP),
                    PASSED,
                ),
                ("a later fragment", v4(50, us, |ip| ip[7] = 9, &ESP), PASSED),
                (
                    "do not fragment",
                    v4(50, us, |ip| ip[6] = 0x40, &ESP),
                    TAKEN,
                ),
                (
                    "IP options",
                    v4(50, us, |ip| ip[0] = 0x46, &[0; 16]),
                    PASSED,
                ),
                ("IKE", v4(17, us, same, &udp(500, &[7; 28])), PASSED),
                (
                    "IKE beside ESP",
                    v4(17, us, same, &udp(4500, &[0, 0, 0, 0, 7, 7, 7, 7])),
                    PASSED,
                ),
                ("a keepalive", v4(17, us, same, &udp(4500, &[0xff])), TAKEN),
                ("ssh", v4(6, us, same, &[0; 20]), PASSED),
                ("ssh over IPv6", v6(6, "2001:db8::1", 64, &[0; 20]), PASSED),
                ("ICMP", v4(1, us, same, &[0; 20]), PASSED),
                (
                    "a neighbour's question",
                    v6(58, "2001:db8::1", 255, &[135, 0, 0, 0, 0, 0, 0, 0]),
                    PASSED,
                ),
                (
                    "a fragment over IPv6",
                    v6(44, "2001:db8::1", 64, &[50, 0, 0, 1, 0, 0, 0, 9]),
                    PASSED,
                ),
                (
                    "a fragment of UDP over IPv6",
                    v6(44, "2001:db8::1", 64, &[17, 0, 0, 1, 0, 0, 0, 9]),
                    PASSED,
                ),
                (
                    "an extension header",
                    v6(0, "2001:db8::1", 64, &[50, 0, 0, 0, 0, 0, 0, 0]),
                    PASSED,
                ),
                ("ARP", frame(MAC, 0x0806, &[0; 28]), PASSED),
                ("a VLAN", in_vlan(v4(50, us, same, &ESP)), PASSED),
                (
                    "a VLAN over IPv6",
                    in_vlan(v6(50, "2001:db8::1", 64, &ESP)),
                    PASSED,
                ),
                ("an empty frame", frame(MAC, 0x0800, &[]), PASSED),
                (
                    "no IPv4 behind its number",
                    frame(MAC, 0x0800, &[0x60; 40]),
                    PASSED,
                ),
            ],
        );
    }

    #[test]
    fn inside_only_what_the_kernel_would_route_into_a_tunnel_is_taken() {
        let networks = [
            ("10.2.0.0/16", 100),
            ("10.2.9.0/24", 0),
            ("fd00:2::/32", 100),
            ("fd00:2:0:9::/64", 0),
        ];
        let Some(parts) = load(Taken::Inner { mac: MAC }, &networks) else {
            return;
        };
        let same = |_: &mut Vec<u8>| {};
        let there = [10, 2, 0, 2];
        let mut to_another = v4(6, there, same, &[0; 20]);
        to_another[0] ^= 1;
        let mut to_another_end = v4(6, there, same, &[0; 20]);
        to_another_end[5] ^= 1;
        let mut to_everyone = v4(6, there, same, &[0; 20]);
        to_everyone[..6].fill(0xff);
        check(
            &parts,
            &[
                ("into a tunnel", v4(6, there, same, &[0; 20]), TAKEN),
                (
                    "into a tunnel over IPv6",
                    v6(6, "fd00:2::2", 64, &[0; 20]),
                    TAKEN,
                ),
                (
                    "a fragment",
                    v4(6, there, |ip| ip[6] = 0x20, &[0; 20]),
                    TAKEN,
                ),
                ("the largest", v4(6, there, same, &[0; 80]), TAKEN),
                (
                    "the largest over IPv6",
                    v6(6, "fd00:2::2", 64, &[0; 60]),
                    TAKEN,
                ),
                ("larger", v4(6, there, same, &[0; 81]), PASSED),
                ("larger over IPv6", v6(6, "fd00:2::2", 64, &[0; 61]), PASSED),
                (
                    "a network within that is elsewhere",
                    v4(6, [10, 2, 9, 1], same, &[0; 20]),
                    PASSED,
                ),
                (
                    "the same over IPv6",
                    v6(6, "fd00:2:0:9::1", 64, &[0; 20]),
                    PASSED,
                ),
                (
                    "somewhere else",
                    v4(6, [10, 3, 0, 1], same, &[0; 20]),
                    PASSED,
                ),
                ("another machine's frame", to_another, PASSED),
                (
                    "another machine's frame, in its last byte",
                    to_another_end,
                    PASSED,
                ),
                (
                    "the last hop",
                    v4(6, there, |ip| ip[8] = 1, &[0; 20]),
                    PASSED,
                ),
                (
                    "the last hop over IPv6",
                    v6(6, "fd00:2::2", 1, &[0; 20]),
                    PASSED,
                ),
                (
                    "IP options",
                    v4(6, there, |ip| ip[0] = 0x46, &[0; 20]),
                    PASSED,
                ),
                ("ARP", frame(MAC, 0x0806, &[0; 28]), PASSED),
                (
                    "a neighbour's question",
                    v6(58, "fe80::1", 255, &[135, 0, 0, 0, 0, 0, 0, 0]),
                    PASSED,
                ),
                (
                    "a later fragment",
                    v4(6, there, |ip| ip[7] = 9, &[0; 20]),
                    TAKEN,
                ),
                (
                    "a fragment over IPv6",
                    v6(44, "fd00:2::2", 64, &[6, 0, 0, 1, 0, 0, 0, 9]),
                    TAKEN,
                ),
                ("to everyone", to_everyone, PASSED),
                ("a VLAN", in_vlan(v4(6, there, same, &[0; 20])), PASSED),
                ("an empty frame", frame(MAC, 0x0800, &[]), PASSED),
            ],
        );
    }
}
