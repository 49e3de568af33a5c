//! ESP in UDP (RFC 3948) over one UDP socket, shared with the handshake.

use super::{Descriptors, Driver, Traffic, mmsg::MessageSocket, options};
use esplane_api::DropCounters;
use esplane_dataplane::batch::{Batch, Outer};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt,
};
use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Socket buffers in each direction: some milliseconds of traffic at full speed.
pub(super) const BUFFER_BYTES: usize = 8 << 20;

/// One UDP socket of a group that shares a port.
///
/// Listening on `[::]` it takes IPv4 as well; such peers appear with their IPv4 address. GRO is off:
/// every datagram arrives by itself.
pub struct UdpOuter {
    socket: MessageSocket,
    port: u16,
}

/// Why a socket could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}: {source}{}", hint(source))]
pub struct SocketError {
    /// What was tried.
    pub doing: String,
    /// What the kernel said.
    pub source: io::Error,
}

fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            "; another program has this port (a second esplane, or strongSwan's charon on 4500): stop it, or choose another port"
        }
        Some(libc::EADDRNOTAVAIL) => {
            "; no interface of this machine has this address: add it, or listen on 0.0.0.0 or [::]"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "; this needs root or a capability: CAP_NET_BIND_SERVICE for ports below 1024, CAP_NET_RAW for plain ESP"
        }
        Some(libc::EAFNOSUPPORT) => {
            "; this kernel has no such protocol family: IPv6 is switched off, perhaps"
        }
        _ => "",
    }
}

impl UdpOuter {
    /// Opens one socket for each of `workers`, all on `listen`; the kernel spreads the peers over them.
    /// Port 0 lets the kernel choose one for all.
    ///
    /// A port that another program listens on is refused even if that one would share it.
    pub fn open_group(listen: SocketAddr, workers: usize) -> Result<Vec<Self>, SocketError> {
        let failed = |source: io::Error| SocketError {
            doing: format!("listen on UDP {listen}"),
            source,
        };
        // One socket that does not share shows whether the port is free; a second daemon would otherwise
        // silently take half of our packets.
        let alone = open(listen, false).map_err(failed)?;
        let port = local_port(alone.as_fd()).map_err(failed)?;
        drop(alone);
        let listen = SocketAddr::new(listen.ip(), port);
        (0..workers)
            .map(|_| Self::over(open(listen, true)?, listen))
            .collect::<io::Result<_>>()
            .map_err(failed)
    }

    fn over(socket: OwnedFd, listen: SocketAddr) -> io::Result<Self> {
        Ok(Self {
            port: listen.port(),
            socket: MessageSocket::new(socket, listen.is_ipv6(), listen.ip())?,
        })
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The same socket for another thread to send with.
    pub(super) fn another_sender(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.another_sender()?,
            port: self.port,
        })
    }

    /// Whether a packet is to leave by this socket.
    pub(super) fn claims(&self, outer: &Outer) -> bool {
        outer.udp && self.reaches(outer.remote.ip())
    }

    pub(super) fn reaches(&self, remote: IpAddr) -> bool {
        self.socket.reaches(remote)
    }

    /// Like [`Driver::transmit`], for the packets that `claims` says are for this socket.
    pub(super) fn transmit_claimed(
        &mut self,
        batch: &Batch,
        claims: impl Fn(&Outer) -> bool,
        drops: &mut DropCounters,
    ) -> Traffic {
        self.socket.transmit(batch, claims, drops)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether it takes addresses of family IPv6 in system calls.
    pub(super) fn is_ipv6(&self) -> bool {
        self.socket.bound().is_ipv6()
    }
}

impl Driver for UdpOuter {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        self.socket.receive(batch, drops, true, |_, _| {})
    }

    fn transmit(&mut self, batch: &Batch, drops: &mut DropCounters) -> Traffic {
        self.socket.transmit(batch, |_| true, drops)
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        Descriptors::from_iter([self.as_fd()])
    }
}

fn open(listen: SocketAddr, shared: bool) -> io::Result<OwnedFd> {
    let family = match listen {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::DGRAM, flags, None)?;
    let dual_stack = listen.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    if listen.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, !dual_stack)?;
        sockopt::set_ipv6_recvtclass(&socket, true)?;
        options::report_local_address(socket.as_fd(), true)?;
    }
    if listen.is_ipv4() || dual_stack {
        sockopt::set_ip_recvtos(&socket, true)?;
    }
    if listen.is_ipv4() {
        options::report_local_address(socket.as_fd(), false)?;
    }
    options::set_buffers(socket.as_fd(), BUFFER_BYTES)?;
    sockopt::set_socket_reuseport(&socket, shared)?;
    bind(&socket, &listen)?;
    Ok(socket)
}

fn local_port(socket: BorrowedFd<'_>) -> io::Result<u16> {
    let address = getsockname(socket)?;
    SocketAddr::try_from(address)
        .map(|address| address.port())
        .map_err(io::Error::from)
}
