//! Plain ESP (IP protocol 50) over raw sockets.
//!
//! A raw socket gets a copy of *every* ESP packet that reaches the machine; there is no sharing out as among
//! UDP sockets. So one worker receives ([`RawReceive::Everything`]) and the others only send.
//!
//! An open raw socket also keeps the kernel from answering each packet with ICMP "protocol unreachable", as
//! long as its buffer is not full; one that refuses everything never is, so there is always one of those.

use super::{
    Descriptors, Driver, Traffic, options,
    socket::{MessageSocket, Speaks},
    udp::{BUFFER_BYTES, SocketError},
};
use esplane_api::DropCounters;
use esplane_dataplane::batch::{Batch, Outer};
use rustix::net::{
    AddressFamily, Protocol, RawProtocol, SocketFlags, SocketType, socket_with, sockopt,
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    os::fd::{AsFd, OwnedFd},
};

/// IANA's number of ESP.
const ESP: Protocol = Protocol::from_raw(match NonZeroU32::new(50) {
    Some(number) => number as RawProtocol,
    None => unreachable!(),
});

/// What a worker's raw sockets are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawReceive {
    /// Sending, and receiving every ESP packet of the machine. For one worker only.
    Everything,
    /// Sending only.
    Nothing,
}

/// Raw sockets for both families. IPv6 is left out where the kernel has none.
pub struct RawEsp {
    v4: MessageSocket,
    v6: Option<MessageSocket>,
    receives: bool,
    /// Beside a socket that receives: so that bursts cause no ICMP.
    _guards: Vec<OwnedFd>,
    /// Which family receives first next time, so that neither starves the other.
    v6_first: bool,
}

impl RawEsp {
    /// Opens them. Needs CAP_NET_RAW.
    pub fn open(receive: RawReceive) -> Result<Self, SocketError> {
        let failed = |source| SocketError {
            doing: "open a raw socket for plain ESP (IP protocol 50)".to_owned(),
            source,
        };
        let v4 = open(AddressFamily::INET, receive)
            .and_then(|socket| MessageSocket::new(socket, Speaks::V4, Ipv4Addr::UNSPECIFIED.into()))
            .map_err(failed)?;
        let v6 = match open(AddressFamily::INET6, receive) {
            Ok(socket) => Some(
                MessageSocket::new(socket, Speaks::V6, Ipv6Addr::UNSPECIFIED.into())
                    .map_err(failed)?,
            ),
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => None,
            Err(error) => return Err(failed(error)),
        };
        let guards = match receive {
            RawReceive::Everything => guards(v6.is_some()).map_err(failed)?,
            RawReceive::Nothing => Vec::new(),
        };
        Ok(Self {
            v4,
            v6,
            _guards: guards,
            receives: receive == RawReceive::Everything,
            v6_first: false,
        })
    }

    /// The same sockets for another thread to send with.
    pub(super) fn another_sender(&self) -> io::Result<Self> {
        let v6 = self.v6.as_ref().map(MessageSocket::another_sender);
        Ok(Self {
            v4: self.v4.another_sender()?,
            v6: v6.transpose()?,
            receives: false,
            _guards: Vec::new(),
            v6_first: false,
        })
    }

    /// Whether a packet is to leave by these sockets.
    pub(super) fn claims(&self, outer: &Outer) -> bool {
        !outer.udp && (outer.remote.is_ipv4() || self.v6.is_some())
    }

    fn receive_v4(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        self.v4.receive(batch, drops, false, strip_ipv4_header)
    }

    fn receive_v6(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        match &mut self.v6 {
            // The kernel has taken the IPv6 header off and says in control messages what was in it.
            Some(v6) => v6.receive(batch, drops, false, |batch, index| {
                let mut outer = batch.outer_of(&batch.packets()[index]);
                outer.remote.set_port(0);
                batch.set_outer(index, outer);
            }),
            None => Ok(()),
        }
    }
}

impl Driver for RawEsp {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        if !self.receives {
            return Ok(());
        }
        self.v6_first = !self.v6_first;
        if self.v6_first {
            self.receive_v6(batch, drops)?;
            self.receive_v4(batch, drops)
        } else {
            self.receive_v4(batch, drops)?;
            self.receive_v6(batch, drops)
        }
    }

    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        let mut sent = self
            .v4
            .transmit(batch, |outer| !outer.udp && outer.remote.is_ipv4(), drops);
        if let Some(v6) = &mut self.v6 {
            sent += v6.transmit(batch, |outer| !outer.udp && outer.remote.is_ipv6(), drops);
        }
        sent
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        if self.receives {
            for socket in [Some(&mut self.v4), self.v6.as_mut()].into_iter().flatten() {
                socket.count_lost(drops);
            }
        }
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        if !self.receives {
            return Descriptors::new();
        }
        [&self.v4]
            .into_iter()
            .chain(&self.v6)
            .map(MessageSocket::as_fd)
            .collect()
    }
}

fn guards(ipv6: bool) -> io::Result<Vec<OwnedFd>> {
    let families = [
        Some(AddressFamily::INET),
        ipv6.then_some(AddressFamily::INET6),
    ];
    let families = families.into_iter().flatten();
    families
        .map(|family| open(family, RawReceive::Nothing))
        .collect()
}

fn open(family: AddressFamily, receive: RawReceive) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::RAW, flags, Some(ESP))?;
    if receive == RawReceive::Nothing {
        options::refuse_everything(socket.as_fd())?;
    }
    if family == AddressFamily::INET6 {
        sockopt::set_ipv6_recvtclass(&socket, true)?;
        options::report_local_address(socket.as_fd(), true)?;
    }
    options::set_buffers(socket.as_fd(), BUFFER_BYTES)?;
    Ok(socket)
}

/// A raw IPv4 socket delivers the header too, reassembled and checked by the kernel: reads and strips it.
fn strip_ipv4_header(batch: &mut Batch, index: usize) {
    let Some(header) = batch.data(index).first_chunk::<20>().copied() else {
        return; // shorter than any header: no ESP either, as the dataplane will say
    };
    let header_bytes = i32::from(header[0] & 0x0f) * 4;
    let destination: [u8; 4] = [header[16], header[17], header[18], header[19]];
    let mut outer = batch.outer_of(&batch.packets()[index]);
    outer.tos = header[1];
    outer.df = header[6] & 0x40 != 0;
    outer.local = IpAddr::from(destination);
    outer.remote.set_port(0);
    batch.set_outer(index, outer);
    let _shorter_than_it_says = batch.packets_mut()[index].grow(-header_bytes, 0);
}
