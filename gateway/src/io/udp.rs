//! ESP in UDP (RFC 3948) over one UDP socket, shared with the handshake.

use super::{
    Descriptors, Driver, Traffic, options,
    socket::{MessageSocket, Speaks},
};
use esplane_api::DropCounters;
use esplane_dataplane::batch::{Batch, Outer};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt,
};
use std::{
    fmt, io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};
use tracing::info;

/// Socket buffers in each direction: some milliseconds of traffic at full speed.
pub(super) const BUFFER_BYTES: usize = 8 << 20;

/// One UDP socket of a group that shares a port.
///
/// The kernel spreads packets over the group by their SPIs, so all of one SA reach the same worker in order, wherever its peer
/// moves; several SAs of one peer are spread. What leaves is spread by flows (`tun_steering.rs`), over all workers even of
/// one SA.
///
/// Listening on `[::]` it takes IPv4 as well; such peers appear with their IPv4 address. Several packets
/// of one peer leave and arrive as one message where the kernel can do so ([`UdpOffloads`]).
///
/// The kernel keeps Don't Fragment per socket. It is set anew whenever the next packet to an IPv4 peer asks for
/// the other value, one system call for each change: clear lets us and routers fragment, set refuses
/// what exceeds the interface's MTU and lets routers refuse the rest. Packets to IPv6 peers are fragmented by
/// this machine's kernel if need be.
pub struct UdpOuter {
    socket: MessageSocket,
    port: u16,
    offloads: UdpOffloads,
}

/// What the kernel does for many datagrams at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpOffloads {
    /// Packets to one peer leave as one message (`UDP_SEGMENT`).
    pub gso: bool,
    /// Packets of one peer arrive as one message (`UDP_GRO`).
    pub gro: bool,
}

impl UdpOffloads {
    fn tell_what_is_missing(self) {
        if !self.gso {
            info!("this kernel has no UDP GSO (UDP_SEGMENT): packets leave one by one");
        }
        if !self.gro {
            info!("this kernel has no UDP GRO: packets arrive one by one");
        }
    }
}

impl fmt::Display for UdpOffloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.gso, self.gro) {
            (true, true) => "GSO+GRO",
            (true, false) => "GSO",
            (false, true) => "GRO",
            (false, false) => "none",
        })
    }
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
        let mut group = (0..workers)
            .map(|_| Self::over(open(listen, true)?, listen))
            .collect::<io::Result<Vec<_>>>()
            .map_err(failed)?;
        if let [first, _, ..] = group.as_slice()
            && let Err(error) = options::steer_by_spi(first.as_fd(), workers)
        {
            info!(
                "the kernel spreads peers over the workers by their addresses, not SAs by their SPIs: {error}"
            );
        }
        for (index, socket) in group.iter_mut().enumerate() {
            let offloads = socket.set_offloads(true);
            if index == 0 {
                offloads.tell_what_is_missing();
            }
        }
        Ok(group)
    }

    /// Opens one that shares its port with no other.
    pub fn open_alone(listen: SocketAddr) -> Result<Self, SocketError> {
        let opened = || {
            let socket = open(listen, false)?;
            let listen = SocketAddr::new(listen.ip(), local_port(socket.as_fd())?);
            Self::over(socket, listen)
        };
        let mut socket = opened().map_err(|source| SocketError {
            doing: format!("send from UDP {listen}"),
            source,
        })?;
        socket.set_offloads(true);
        Ok(socket)
    }

    /// Lets the kernel take and deliver several packets as one message, if it can. Answers what is on.
    pub(super) fn set_offloads(&mut self, on: bool) -> UdpOffloads {
        self.offloads = self.socket.set_offloads(on);
        self.offloads
    }

    /// Which offloads are on.
    pub fn offloads(&self) -> UdpOffloads {
        self.offloads
    }

    fn over(socket: OwnedFd, listen: SocketAddr) -> io::Result<Self> {
        let speaks = match listen.ip() {
            IpAddr::V4(_) => Speaks::V4,
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Speaks::Both,
            IpAddr::V6(_) => Speaks::V6,
        };
        Ok(Self {
            port: listen.port(),
            offloads: UdpOffloads::default(),
            socket: MessageSocket::new(socket, speaks, listen.ip())?,
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
            offloads: UdpOffloads {
                gro: false,
                ..self.offloads
            },
        })
    }

    /// Whether it can send to this address.
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
        self.socket.is_ipv6()
    }
}

impl Driver for UdpOuter {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        self.socket.receive(batch, drops, true, |_, _| {})
    }

    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        self.socket.transmit(batch, |_| true, drops)
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        self.socket.count_lost(drops);
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

#[cfg(test)]
mod tests;
