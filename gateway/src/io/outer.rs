//! The public side of one worker: its UDP sockets and, where asked for, raw sockets for plain ESP.

use super::{
    Descriptors, Driver, RawEsp, RawReceive, Traffic,
    udp::{SocketError, UdpOuter},
};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Verdict};
use rustix::net::SendFlags;
use std::{
    io,
    net::{SocketAddr, SocketAddrV6},
};

/// UDP sockets, at most one of each family, and raw sockets, as one driver.
pub struct OuterSockets {
    udp: Vec<UdpOuter>,
    raw: Option<RawEsp>,
    /// Whose turn it is to receive first.
    turn: usize,
}

impl OuterSockets {
    /// Opens one for each of `workers`: UDP on each address of `listen` (one, or one of each family), and
    /// plain ESP if `plain_esp`. The first one receives all plain ESP; see [`RawEsp`].
    pub fn open_group(
        listen: &[SocketAddr],
        plain_esp: bool,
        workers: usize,
    ) -> Result<Vec<Self>, SocketError> {
        let mut group: Vec<Self> = (0..workers).map(|_| Self::new(Vec::new(), None)).collect();
        for address in listen {
            let sockets = UdpOuter::open_group(*address, workers)?;
            for (outer, socket) in group.iter_mut().zip(sockets) {
                outer.udp.push(socket);
            }
        }
        if plain_esp {
            for (worker, outer) in group.iter_mut().enumerate() {
                let receive = match worker {
                    0 => RawReceive::Everything,
                    _ => RawReceive::Nothing,
                };
                outer.raw = Some(RawEsp::open(receive)?);
            }
        }
        Ok(group)
    }

    /// Of sockets opened before.
    pub fn new(udp: Vec<UdpOuter>, raw: Option<RawEsp>) -> Self {
        Self { udp, raw, turn: 0 }
    }

    /// The port of its first UDP socket; 0 if it has none.
    pub fn port(&self) -> u16 {
        self.udp.first().map_or(0, UdpOuter::port)
    }

    /// The same sockets for the control side to send with.
    pub fn transmitter(&self) -> io::Result<OuterTransmitter> {
        let udp: io::Result<Vec<_>> = self.udp.iter().map(UdpOuter::another_sender).collect();
        let raw = self.raw.as_ref().map(RawEsp::another_sender);
        Ok(OuterTransmitter(Self::new(udp?, raw.transpose()?)))
    }
}

impl Driver for OuterSockets {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        let sources = self.udp.len() + usize::from(self.raw.is_some());
        self.turn = self.turn.wrapping_add(1);
        for source in 0..sources {
            let source = (source + self.turn) % sources;
            match (self.udp.get_mut(source), &mut self.raw) {
                (Some(udp), _) => udp.receive(batch, drops)?,
                (None, Some(raw)) => raw.receive(batch, drops)?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn transmit(&mut self, batch: &Batch, drops: &mut DropCounters) -> Traffic {
        let mut sent = Traffic::default();
        for index in 0..self.udp.len() {
            // The first socket that reaches the peer sends.
            let (earlier, rest) = self.udp.split_at_mut(index);
            let Some(socket) = rest.first_mut() else {
                break;
            };
            let (ipv4, ipv6) = (
                socket.reaches(std::net::Ipv4Addr::LOCALHOST.into()),
                socket.reaches(std::net::Ipv6Addr::LOCALHOST.into()),
            );
            sent += socket.transmit_claimed(
                batch,
                |outer| {
                    outer.udp
                        && if outer.remote.is_ipv4() { ipv4 } else { ipv6 }
                        && !earlier.iter().any(|socket| socket.claims(outer))
                },
                drops,
            );
        }
        if let Some(raw) = &mut self.raw {
            sent += raw.transmit(batch, drops);
        }
        self.count_unreachable(batch, drops);
        sent
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        let raw = self.raw.iter().flat_map(Driver::poll_descriptors);
        self.udp
            .iter()
            .map(UdpOuter::as_fd)
            .chain(raw)
            .take(4)
            .collect()
    }
}

impl OuterSockets {
    /// Packets that none of the sockets can carry: of a family, or an encapsulation, that was not opened.
    fn count_unreachable(&self, batch: &Batch, drops: &mut DropCounters) {
        let carried = |outer| {
            self.udp.iter().any(|socket| socket.claims(outer))
                || self.raw.as_ref().is_some_and(|raw| raw.claims(outer))
        };
        let lost = batch
            .packets()
            .iter()
            .filter(|packet| packet.verdict == Verdict::Forward && !carried(&packet.outer))
            .count();
        drops.add(DropReason::TransmitFailed, lost as u64);
    }
}

/// Sends by a worker's sockets from another thread: handshake messages, keepalives, dummy packets.
pub struct OuterTransmitter(OuterSockets);

impl OuterTransmitter {
    /// Sends one complete UDP payload. Never blocks.
    pub fn send_datagram(&self, to: SocketAddr, payload: &[u8]) -> io::Result<()> {
        let socket = self
            .0
            .udp
            .iter()
            .find(|socket| socket.reaches(to.ip()))
            .ok_or(io::ErrorKind::AddrNotAvailable)?;
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
    pub fn transmit(&mut self, batch: &Batch, drops: &mut DropCounters) -> Traffic {
        self.0.transmit(batch, drops)
    }
}
