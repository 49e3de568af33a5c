//! The public side of one worker: its UDP sockets and, where asked for, raw sockets for plain ESP and its
//! share of a port that another program owns.

use super::{
    Descriptors, Driver, RawEsp, RawReceive, SharedPort, Traffic,
    udp::{SocketError, UdpOffloads, UdpOuter},
};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer, Verdict};
use rustix::net::SendFlags;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
};

/// UDP sockets, at most one of each family for the port that all workers listen on and one more of each for a port of this worker's
/// own, and raw sockets, as one driver.
pub struct OuterSockets {
    udp: Vec<UdpOuter>,
    raw: Option<RawEsp>,
    shared: Option<SharedPort>,
    /// Which UDP socket sends to IPv4 peers, and which to IPv6 ones.
    sends: Sends,
    /// Whose turn it is to receive first.
    turn: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sends {
    v4: Option<usize>,
    v6: Option<usize>,
    /// From the worker's own port, if it has one: the port, and the two sockets.
    own: Option<(u16, Option<usize>, Option<usize>)>,
}

impl Sends {
    /// The first sockets that reach each family.
    fn by_first(udp: &[UdpOuter]) -> Self {
        let first = |remote: IpAddr| udp.iter().position(|socket| socket.reaches(remote));
        Self {
            v4: first(Ipv4Addr::LOCALHOST.into()),
            v6: first(Ipv6Addr::LOCALHOST.into()),
            own: None,
        }
    }

    fn to(self, remote: IpAddr) -> Option<usize> {
        if remote.is_ipv4() { self.v4 } else { self.v6 }
    }

    fn socket_for(self, outer: &Outer) -> Option<usize> {
        match self.own {
            Some((port, v4, _)) if port == outer.local_port && outer.remote.is_ipv4() => v4,
            Some((port, _, v6)) if port == outer.local_port => v6,
            _ => self.to(outer.remote.ip()),
        }
    }
}

impl OuterSockets {
    /// Opens one for each of `workers`: UDP on each address of `listen` (one, or one of each family), and
    /// plain ESP if `plain_esp`. The first one receives all plain ESP; see [`RawEsp`].
    pub fn open_group(
        listen: &[SocketAddr],
        plain_esp: bool,
        workers: usize,
    ) -> Result<Vec<Self>, SocketError> {
        let mut udp: Vec<Vec<UdpOuter>> = (0..workers).map(|_| Vec::new()).collect();
        for address in listen {
            let sockets = UdpOuter::open_group(*address, workers)?;
            for (of_worker, socket) in udp.iter_mut().zip(sockets) {
                of_worker.push(socket);
            }
        }
        let with_raw = |(worker, udp)| {
            let receive = match worker {
                0 => RawReceive::Everything,
                _ => RawReceive::Nothing,
            };
            let raw = plain_esp.then(|| RawEsp::open(receive)).transpose()?;
            Ok(Self::new(udp, raw))
        };
        udp.into_iter().enumerate().map(with_raw).collect()
    }

    /// Of sockets opened before. The first UDP socket that reaches a family sends to it.
    pub fn new(udp: Vec<UdpOuter>, raw: Option<RawEsp>) -> Self {
        Self {
            sends: Sends::by_first(&udp),
            udp,
            raw,
            shared: None,
            turn: 0,
        }
    }

    /// The same, and a port besides from which this worker alone sends, if that is what a packet's outer side says; what arrives
    /// there is received as well. Port 0 lets the kernel choose one.
    pub fn with_own_port(mut self, listen: &[SocketAddr], port: u16) -> Result<Self, SocketError> {
        let (mut port, mut own) = (port, Vec::new());
        for address in listen {
            let socket = UdpOuter::open_alone(SocketAddr::new(address.ip(), port))?;
            port = socket.port(); // the same for both families
            own.push(socket);
        }
        let (sends, behind) = (Sends::by_first(&own), self.udp.len());
        let at = |place: Option<usize>| place.map(|place| behind + place);
        self.sends.own = (port != 0).then(|| (port, at(sends.v4), at(sends.v6)));
        self.udp.extend(own);
        Ok(self)
    }

    /// The port from which this worker alone sends.
    pub fn own_port(&self) -> Option<u16> {
        self.sends.own.map(|(port, ..)| port)
    }

    /// The same, and ESP in UDP besides on a port that another program owns.
    pub fn beside(mut self, shared: SharedPort) -> Self {
        self.shared = Some(shared);
        self
    }

    /// The port of its first UDP socket; 0 if it has none.
    pub fn port(&self) -> u16 {
        self.udp.first().map_or(0, UdpOuter::port)
    }

    /// Which offloads its UDP sockets have.
    pub fn offloads(&self) -> UdpOffloads {
        let shared = self.shared.as_ref().map(SharedPort::offloads);
        let own = self.udp.first().map(UdpOuter::offloads);
        own.or(shared).unwrap_or_default()
    }

    /// The same with every packet by itself: to compare with. Before anything is received.
    pub fn without_offloads(mut self) -> Self {
        for socket in &mut self.udp {
            socket.set_offloads(false);
        }
        self
    }

    /// The same sockets for the control side to send with.
    pub fn transmitter(&self) -> io::Result<OuterTransmitter> {
        let udp: io::Result<Vec<_>> = self.udp.iter().map(UdpOuter::another_sender).collect();
        let raw = self.raw.as_ref().map(RawEsp::another_sender);
        let shared = self.shared.as_ref().map(SharedPort::another_sender);
        let mut sockets = Self::new(udp?, raw.transpose()?);
        sockets.shared = shared.transpose()?;
        sockets.sends = self.sends;
        Ok(OuterTransmitter(sockets))
    }
}

impl Driver for OuterSockets {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        self.turn = self.turn.wrapping_add(1);
        let udp = self.udp.len();
        for source in 0..udp + 2 {
            let source = (source + self.turn) % (udp + 2);
            match (self.udp.get_mut(source), &mut self.raw, &mut self.shared) {
                (Some(udp), _, _) => udp.receive(batch, drops)?,
                (None, Some(raw), _) if source == udp => raw.receive(batch, drops)?,
                (None, _, Some(shared)) if source > udp => shared.receive(batch, drops)?,
                (None, _, _) => {}
            }
        }
        Ok(())
    }

    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        let (mut sent, sends) = (Traffic::default(), self.sends);
        let shared_port = self.shared.as_ref().map(SharedPort::port);
        for (index, socket) in self.udp.iter_mut().enumerate() {
            let claims = |outer: &Outer| {
                outer.udp
                    && Some(outer.local_port) != shared_port
                    && sends.socket_for(outer) == Some(index)
            };
            sent += socket.transmit_claimed(batch, claims, drops);
        }
        if let Some(raw) = &mut self.raw {
            sent += raw.transmit(batch, drops);
        }
        if let Some(shared) = &mut self.shared {
            sent += shared.transmit(batch, drops);
        }
        self.count_unreachable(batch, drops);
        sent
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        for udp in &mut self.udp {
            udp.count_lost(drops);
        }
        if let Some(raw) = &mut self.raw {
            raw.count_lost(drops);
        }
        if let Some(shared) = &mut self.shared {
            shared.count_lost(drops);
        }
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        let raw = self.raw.iter().flat_map(Driver::poll_descriptors);
        let shared = self.shared.iter().flat_map(Driver::poll_descriptors);
        let udp = self.udp.iter().map(UdpOuter::as_fd);
        udp.chain(raw)
            .chain(shared)
            .take(super::DESCRIPTORS_MAX)
            .collect()
    }
}

impl OuterSockets {
    /// Packets that none of the sockets can carry: of a family, or an encapsulation, that was not opened.
    fn count_unreachable(&self, batch: &Batch, drops: &mut DropCounters) {
        let carried = |outer: &Outer| match &self.shared {
            _ if !outer.udp => self.raw.as_ref().is_some_and(|raw| raw.claims(outer)),
            Some(shared) if shared.port() == outer.local_port => shared.claims(outer),
            _ => self.sends.socket_for(outer).is_some(),
        };
        let lost = batch
            .packets()
            .iter()
            .filter(|packet| {
                packet.verdict == Verdict::Forward && !carried(&batch.outer_of(packet))
            })
            .count();
        drops.add(DropReason::TransmitFailed, lost as u64);
    }
}

/// Sends by a worker's sockets from another thread: handshake messages, keepalives, dummy packets.
pub struct OuterTransmitter(OuterSockets);

impl OuterTransmitter {
    /// Sends one complete UDP payload. Never blocks.
    pub fn send_datagram(&self, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let sender = self
            .0
            .sends
            .to(to.ip())
            .ok_or(io::ErrorKind::AddrNotAvailable)?;
        let socket = &self.0.udp[sender];
        let to = match to {
            SocketAddr::V4(to) if socket.is_ipv6() => {
                SocketAddrV6::new(to.ip().to_ipv6_mapped(), to.port(), 0, 0).into()
            }
            to => to,
        };
        rustix::net::sendto(socket.as_fd(), payload, SendFlags::DONTWAIT, &to)?;
        Ok(())
    }

    /// Sends a batch, like [`Driver::transmit`]; the Don't Fragment bit stays as the worker has set it.
    pub fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        self.0.transmit(batch, drops)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forwarded(remote: &str, udp: bool) -> Batch {
        let mut batch = Batch::new(1, 512);
        let outer = Outer {
            remote: remote.parse().unwrap(),
            udp,
            ..Outer::NONE
        };
        assert!(batch.push(b"esp", outer));
        batch.packets_mut()[0].verdict = Verdict::Forward;
        batch
    }

    #[test]
    fn what_no_socket_can_carry_is_counted() {
        let listen = ["127.0.0.1:0".parse().unwrap()];
        let mut sockets = OuterSockets::open_group(&listen, false, 1)
            .unwrap()
            .remove(0);
        for (remote, udp) in [("[2001:db8::1]:4500", true), ("192.0.2.1:0", false)] {
            let mut drops = DropCounters::default();
            let sent = sockets.transmit(&mut forwarded(remote, udp), &mut drops);
            assert_eq!(
                (sent.packets, drops[DropReason::TransmitFailed]),
                (0, 1),
                "{remote}"
            );
        }
    }

    #[test]
    fn a_worker_sends_from_its_own_port_what_is_said_to_leave_there_and_receives_there_too() {
        let receivers = ["127.0.0.1:0", "[::1]:0"].map(|at| std::net::UdpSocket::bind(at).unwrap());
        for listen in [&["127.0.0.1:0", "[::1]:0"][..], &["[::]:0"]] {
            let listen: Vec<SocketAddr> = listen.iter().map(|at| at.parse().unwrap()).collect();
            let sockets = OuterSockets::open_group(&listen, false, 1)
                .unwrap()
                .remove(0);
            assert_eq!(sockets.own_port(), None);
            let mut sockets = sockets.with_own_port(&listen, 0).unwrap();
            let own = sockets.own_port().unwrap();
            assert_ne!(own, sockets.port());
            for receiver in &receivers {
                let to = receiver.local_addr().unwrap();
                let mut drops = DropCounters::default();
                let mut batch = forwarded(&to.to_string(), true);
                for port in [own, 4500, 0] {
                    let outer = Outer {
                        local_port: port,
                        ..batch.outer_of(&batch.packets()[0])
                    };
                    batch.set_outer(0, outer);
                    assert_eq!(sockets.transmit(&mut batch, &mut drops).packets, 1);
                    let (_, from) = receiver.recv_from(&mut [0; 16]).unwrap();
                    assert_eq!(from.port() == own, port == own, "{from} for {port}");
                }
                let back = SocketAddr::new(to.ip(), own);
                receiver.send_to(b"esp", back).unwrap();
                let mut arrived = Batch::new(4, 2048);
                for _ in 0..100 {
                    sockets.receive(&mut arrived, &mut drops).unwrap();
                    if !arrived.is_empty() {
                        break;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                assert_eq!(arrived.outer_of(&arrived.packets()[0]).remote, to);
                assert_eq!(drops, DropCounters::default());
            }
        }
    }

    #[test]
    fn each_family_leaves_by_its_own_socket_and_the_control_side_by_the_same() {
        let receivers = ["127.0.0.1:0", "[::1]:0"].map(|at| std::net::UdpSocket::bind(at).unwrap());
        for listen in [&["127.0.0.1:0", "[::1]:0"][..], &["[::]:0"]] {
            let listen: Vec<_> = listen.iter().map(|at| at.parse().unwrap()).collect();
            let mut group = OuterSockets::open_group(&listen, false, 2).unwrap();
            let transmitter = group[0].transmitter().unwrap();
            for receiver in &receivers {
                let to = receiver.local_addr().unwrap();
                let mut drops = DropCounters::default();
                let mut batch = forwarded(&to.to_string(), true);
                assert_eq!(group[1].transmit(&mut batch, &mut drops).packets, 1);
                transmitter.send_datagram(to, b"noise").unwrap();
                let mut buffer = [0; 16];
                let (bytes, from_worker) = receiver.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..bytes], b"esp");
                let (bytes, from_control) = receiver.recv_from(&mut buffer).unwrap();
                assert_eq!(&buffer[..bytes], b"noise");
                assert_eq!(from_worker, from_control);
                assert_eq!(drops, DropCounters::default());
            }
        }
    }
}
