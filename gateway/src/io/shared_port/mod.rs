//! ESP in UDP on a port that another program owns: charon's 4500.
//!
//! charon's socket has `UDP_ENCAP` set, so the kernel keeps ESP for itself and every other UDP socket
//! sees nothing. What arrives is taken beside it; what leaves carries the same port:
//!
//! ```text
//!   network ──▶ kernel ──▶ UDP 4500 ──▶ charon         IKE (and the kernel's own copy of ESP, which it drops:
//!                 │                                    it has no SA that a packet could match)
//!                 ├──▶ tap.rs: packet socket ──▶ worker    ESP to our addresses, one socket a worker (fanout)
//!                 │      filter.rs says which       packet.rs: lengths and checksums, as the kernel checks them
//!   network ◀── kernel ◀── raw socket ◀── worker       of IP protocol 17, with UDP headers of our own, from
//!                                                      the SA's own address (IP_PKTINFO)
//! ```
//!
//! * A second UDP socket of that port could send many packets as one message, but charon does not share
//!   (it sets no SO_REUSEADDR), and if we came first, charon could not have its port.
//! * The packet socket sees what the kernel's IP would see: behind GRO, bridges and VLANs, before
//!   netfilter. A firewall that drops ESP in UDP by rule drops the kernel's copy only.
//! * Several datagrams of one peer arrive as one message where the kernel or the sender made
//!   them one (`PACKET_VNET_HDR`).
//! * IPv4 fragments are put together by the kernel before the fanout (`PACKET_FANOUT_FLAG_DEFRAG`);
//!   IPv6 ones are counted as `outer_malformed`.
//! * Only packets to [`AddressFilter`]'s addresses come, so that a router's transit traffic costs nothing.
//! * `XfrmInNoStates` in `/proc/net/xfrm_stat` counts the kernel's copies. Harmless.

mod filter;
mod packet;
mod tap;

use super::{
    Descriptors, Driver, Traffic, UdpOffloads, options,
    socket::{MessageSocket, Speaks},
    udp::{BUFFER_BYTES, SocketError},
};
use esplane_api::DropCounters;
use esplane_dataplane::batch::{Batch, Outer};
use filter::Filter;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with};
use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
};
use tap::Tap;

/// Where the sending IPv4 socket is bound, so that it gets no copy of every UDP packet that arrives: a
/// loopback address nobody uses (the letters ESP).
const NOWHERE_V4: Ipv4Addr = Ipv4Addr::new(127, 69, 83, 80);
/// The same for IPv6: within the prefix where everything is discarded (RFC 6666).
const NOWHERE_V6: Ipv6Addr = Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0x4500);

/// One worker's share of such a port, both families. IPv6 is left out where the kernel has none.
pub struct SharedPort {
    port: u16,
    v4: Half,
    v6: Option<Half>,
    /// Which family receives first next time, so that neither starves the other.
    v6_first: bool,
}

/// One family.
struct Half {
    /// `None`: sends only.
    tap: Option<Tap>,
    sender: MessageSocket,
}

/// Says at which of our addresses packets are taken: at none, before it is told any.
pub struct AddressFilter {
    port: u16,
    taps: Vec<(AddressFamily, OwnedFd)>,
    addresses: BTreeSet<IpAddr>,
}

impl SharedPort {
    /// Opens one for each of `workers`; the kernel spreads the peers over them. Needs CAP_NET_RAW.
    ///
    /// The port's owner may come later, or never.
    pub fn open_group(
        port: u16,
        workers: usize,
    ) -> Result<(Vec<Self>, AddressFilter), SocketError> {
        let mut filter = AddressFilter {
            port,
            taps: Vec::new(),
            addresses: BTreeSet::new(),
        };
        let v4 = halves(AddressFamily::INET, port, workers, &mut filter)?;
        let v6 = match halves(AddressFamily::INET6, port, workers, &mut filter) {
            Ok(halves) => halves.into_iter().map(Some).collect(),
            Err(error) if error.source.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                (0..workers).map(|_| None).collect::<Vec<_>>()
            }
            Err(error) => return Err(error),
        };
        let group = v4.into_iter().zip(v6).map(|(v4, v6)| Self {
            port,
            v4,
            v6,
            v6_first: false,
        });
        Ok((group.collect(), filter))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What others have made one arrives as one; what leaves, leaves one by one.
    pub fn offloads(&self) -> UdpOffloads {
        UdpOffloads {
            gso: false,
            gro: true,
        }
    }

    /// The same sockets for another thread to send with.
    pub(super) fn another_sender(&self) -> io::Result<Self> {
        let another = |half: &Half| {
            Ok(Half {
                tap: None,
                sender: half.sender.another_sender()?,
            })
        };
        Ok(Self {
            port: self.port,
            v4: another(&self.v4)?,
            v6: self
                .v6
                .as_ref()
                .map(another)
                .transpose()
                .map_err(|error: io::Error| error)?,
            v6_first: false,
        })
    }

    /// Whether a packet is to leave by this port.
    pub(super) fn claims(&self, outer: &Outer) -> bool {
        outer.udp && outer.local_port == self.port && (outer.remote.is_ipv4() || self.v6.is_some())
    }
}

impl Driver for SharedPort {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        self.v6_first = !self.v6_first;
        let mut order = [Some(&mut self.v4), self.v6.as_mut()];
        if self.v6_first {
            order.reverse();
        }
        let taps = order
            .into_iter()
            .flatten()
            .filter_map(|half| half.tap.as_mut());
        for tap in taps {
            tap.receive(batch, drops)?;
        }
        Ok(())
    }

    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        let port = self.port;
        let ours = |outer: &Outer| outer.udp && outer.local_port == port;
        let claims = |outer: &Outer| ours(outer) && outer.remote.is_ipv4();
        let mut sent = self.v4.sender.transmit(batch, claims, drops);
        if let Some(v6) = &mut self.v6 {
            let claims = |outer: &Outer| ours(outer) && outer.remote.is_ipv6();
            sent += v6.sender.transmit(batch, claims, drops);
        }
        sent
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        for half in [Some(&mut self.v4), self.v6.as_mut()].into_iter().flatten() {
            if let Some(tap) = &mut half.tap {
                tap.count_lost(drops);
            }
        }
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        [Some(&self.v4), self.v6.as_ref()]
            .into_iter()
            .flatten()
            .filter_map(|half| half.tap.as_ref())
            .map(Tap::as_fd)
            .collect()
    }
}

impl AddressFilter {
    /// Takes packets at exactly these addresses from now on. Answers whether that is a change.
    pub fn listen_at(&mut self, addresses: BTreeSet<IpAddr>) -> io::Result<bool> {
        if addresses == self.addresses {
            return Ok(false);
        }
        for (family, tap) in &self.taps {
            let filter = match *family {
                AddressFamily::INET6 => Filter::ipv6(self.port, &addresses),
                _ => Filter::ipv4(self.port, &addresses),
            };
            options::attach_filter(tap.as_fd(), filter.instructions())?;
        }
        self.addresses = addresses;
        Ok(true)
    }
}

fn halves(
    family: AddressFamily,
    port: u16,
    workers: usize,
    filter: &mut AddressFilter,
) -> Result<Vec<Half>, SocketError> {
    let name = if family == AddressFamily::INET6 {
        "IPv6"
    } else {
        "IPv4"
    };
    let cannot = |doing: String| move |source| SocketError { doing, source };
    let receiving = || {
        cannot(format!(
            "receive ESP in UDP on port {port} ({name}) beside its owner (a packet socket)"
        ))
    };
    let sending = || {
        cannot(format!(
            "send ESP in UDP from port {port} ({name}) beside its owner"
        ))
    };
    let taps = Tap::open_group(family == AddressFamily::INET6, workers).map_err(receiving())?;
    let mut halves = Vec::new();
    for tap in taps {
        let handle = tap.as_fd().try_clone_to_owned().map_err(receiving())?;
        filter.taps.push((family, handle));
        halves.push(Half {
            tap: Some(tap),
            sender: sender(family, port).map_err(sending())?,
        });
    }
    Ok(halves)
}

/// A socket that sends UDP from any port and receives nothing.
fn sender(family: AddressFamily, port: u16) -> io::Result<MessageSocket> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::RAW, flags, Some(ipproto::UDP))?;
    let ipv6 = family == AddressFamily::INET6;
    let (nowhere, speaks) = match ipv6 {
        true => (IpAddr::V6(NOWHERE_V6), Speaks::V6),
        false => (IpAddr::V4(NOWHERE_V4), Speaks::V4),
    };
    options::refuse_everything(socket.as_fd())?;
    options::set_buffers(socket.as_fd(), BUFFER_BYTES)?;
    if ipv6 {
        options::fill_in_udp_checksum(socket.as_fd())?;
        // The address is nobody's. Only for the binding: packets shall have an address of ours.
        options::set_ipv6_freebind(socket.as_fd(), true)?;
    }
    bind(&socket, &SocketAddr::new(nowhere, 0))?;
    if ipv6 {
        options::set_ipv6_freebind(socket.as_fd(), false)?;
    }
    Ok(MessageSocket::new(socket, speaks, nowhere)?.with_udp_headers(port))
}
