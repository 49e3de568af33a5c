//! Packet sockets that see what arrives at a port of another program.

use super::packet;
use crate::io::{
    check,
    mmsg::Messages,
    offload::{Kind, VNET_BYTES, VnetHeader},
    options, raw,
    udp::BUFFER_BYTES,
};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::{
    io, mem,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Messages per system call.
const MESSAGES_MAX: usize = 32;
/// The vnet header, any link header, and the longest IP packet.
const MESSAGE_BYTES: usize = (1 << 16) + 128;
/// Errors that one receipt steps over: an interface that goes down says so once.
const QUEUED_ERRORS_MAX: u32 = 16;

/// Flags of the vnet header: the checksum is yet to be filled in (the packet comes from this machine), or
/// the card has found it right.
const CHECKSUM_KNOWN: u8 = 1 | 2;

/// One worker's packet socket, and what it has received and not yet handed on.
pub(super) struct Tap {
    socket: OwnedFd,
    messages: Messages,
    /// Memory that no message has reached yet is not backed by pages.
    buffers: Box<[u8]>,
    /// How many messages the last receipt brought, and which is next.
    arrived: usize,
    next: usize,
    pending: Option<Datagrams>,
    /// Datagrams in a message lately: tells how many messages fill a batch.
    usual: usize,
    unpacked: usize,
    losses: options::Losses,
}

/// What is left of one message: datagrams of one sender, all but the last of one length.
struct Datagrams {
    outer: Outer,
    payload: Range<usize>,
    segment_bytes: usize,
}

impl Tap {
    /// Opens one socket for each of `workers` that takes nothing yet; the kernel keeps each peer's
    /// packets with one of them.
    pub(super) fn open_group(ipv6: bool, workers: usize) -> io::Result<Vec<Self>> {
        let mut group = None;
        (0..workers)
            .map(|_| {
                let socket = open(ipv6)?;
                group = Some(join_fanout(socket.as_fd(), ipv6, group)?);
                Ok(Self::over(socket))
            })
            .collect()
    }

    fn over(socket: OwnedFd) -> Self {
        Self {
            socket,
            messages: Messages::new(),
            buffers: vec![0; MESSAGES_MAX * MESSAGE_BYTES].into_boxed_slice(),
            arrived: 0,
            next: 0,
            pending: None,
            usual: 1,
            unpacked: 0,
            losses: options::Losses::default(),
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Counts what the kernel had no room for since the last call.
    pub(super) fn count_lost(&mut self, drops: &mut DropCounters) {
        let lost = self.losses.take(self.socket.as_fd());
        drops.add(DropReason::OuterOverrun, lost);
    }

    /// Fills the batch until nothing is left or it is full.
    pub(super) fn receive(
        &mut self,
        batch: &mut Batch,
        drops: &mut DropCounters,
    ) -> io::Result<()> {
        let mut queued_errors = 0;
        self.unpack(batch, drops);
        while !batch.is_full() {
            let free = batch.capacity() - batch.len();
            let asked = free.div_ceil(self.usual).min(MESSAGES_MAX);
            let buffers = self.buffers.chunks_exact_mut(MESSAGE_BYTES).take(asked);
            match self.messages.receive_into(self.socket.as_fd(), buffers) {
                Ok(arrived) => (self.arrived, self.next, self.unpacked) = (arrived, 0, 0),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(()),
                    // An interface went down, or a packet that a vnet header cannot describe.
                    Some(libc::EINTR | libc::ENETDOWN | libc::EINVAL)
                        if queued_errors < QUEUED_ERRORS_MAX =>
                    {
                        queued_errors += 1;
                        continue;
                    }
                    Some(libc::EINTR | libc::ENETDOWN | libc::EINVAL) => return Ok(()),
                    _ => return Err(error),
                },
            }
            let arrived = self.arrived;
            self.unpack(batch, drops);
            if arrived < asked {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Copies datagrams into the batch until none is left or the batch is full.
    fn unpack(&mut self, batch: &mut Batch, drops: &mut DropCounters) {
        loop {
            while let Some(datagrams) = &mut self.pending {
                if batch.is_full() {
                    return;
                }
                let start = datagrams.payload.start;
                let end = datagrams.payload.end.min(start + datagrams.segment_bytes);
                let buffer = &self.buffers[self.next * MESSAGE_BYTES..][..MESSAGE_BYTES];
                if !batch.push(&buffer[start..end], datagrams.outer) {
                    drops.add(DropReason::ReceiveTruncated, 1);
                }
                self.unpacked += 1;
                datagrams.payload.start = end;
                if end == datagrams.payload.end {
                    self.pending = None;
                    self.next += 1;
                }
            }
            if self.next >= self.arrived {
                if let Some(usual) = self.unpacked.checked_div(self.arrived) {
                    self.usual = usual.max(1);
                    self.arrived = 0;
                }
                return;
            }
            match self.read(self.next) {
                Ok(datagrams) => self.pending = Some(datagrams),
                Err(reason) => {
                    drops.add(reason, 1);
                    self.next += 1;
                }
            }
        }
    }

    fn read(&self, index: usize) -> Result<Datagrams, DropReason> {
        let bytes = self.messages.received_bytes(index);
        let message = &self.buffers[index * MESSAGE_BYTES..][..bytes.min(MESSAGE_BYTES)];
        if self.messages.is_truncated(index) {
            return Err(DropReason::ReceiveTruncated);
        }
        self.find(index, message).ok_or(DropReason::OuterMalformed)
    }

    fn find(&self, index: usize, message: &[u8]) -> Option<Datagrams> {
        let (vnet, frame) = message.split_first_chunk::<VNET_BYTES>()?;
        let header = VnetHeader::parse(vnet)?;
        let link_bytes = self.messages.link_header_bytes(index)?;
        let packet = frame.get(link_bytes..)?;
        let segment_bytes = match header.kind {
            None => usize::from(u16::MAX),
            Some(Kind::Udp) if header.segment_bytes > 0 => usize::from(header.segment_bytes),
            Some(Kind::Udp | Kind::Tcp4 | Kind::Tcp6) => return None,
        };
        // Of several made one, each was checked before, or has not left this machine.
        let trusted = header.kind.is_some() || vnet[0] & CHECKSUM_KNOWN != 0;
        let (outer, payload) = packet::parse(packet, trusted)?;
        let base = VNET_BYTES + link_bytes;
        Some(Datagrams {
            outer,
            payload: base + payload.start..base + payload.end,
            segment_bytes,
        })
    }
}

/// Refuses everything before it receives anything.
fn open(ipv6: bool) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)?;
    options::refuse_everything(socket.as_fd())?;
    options::set_packet_vnet_header(socket.as_fd())?;
    options::report_link_header(socket.as_fd())?;
    options::set_buffers(socket.as_fd(), BUFFER_BYTES)?;
    // The packets of one protocol, behind VLANs, bridges and bonds: each once, where IP itself gets it.
    let protocol = if ipv6 {
        libc::ETH_P_IPV6
    } else {
        libc::ETH_P_IP
    };
    // SAFETY: a plain C structure for which all bits zero is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as _;
    address.sll_protocol = (protocol as u16).to_be();
    // SAFETY: the address is a sockaddr_ll, its length is given, and it lives through the call.
    check(unsafe {
        libc::bind(
            raw(socket.as_fd()),
            std::ptr::from_ref(&address).cast(),
            mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

/// Joins the group, or founds it; answers its number.
fn join_fanout(socket: BorrowedFd<'_>, ipv6: bool, group: Option<u16>) -> io::Result<u16> {
    // The kernel puts IPv4 fragments together first: only the first one says whose they are.
    let defragment = if ipv6 {
        0
    } else {
        libc::PACKET_FANOUT_FLAG_DEFRAG
    };
    let kind = libc::PACKET_FANOUT_HASH | defragment;
    match group {
        Some(group) => options::join_packet_fanout(socket, kind, group),
        None => options::join_packet_fanout(socket, kind | libc::PACKET_FANOUT_FLAG_UNIQUEID, 0),
    }
}
