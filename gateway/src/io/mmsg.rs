//! Whole batches through `recvmmsg` and `sendmmsg`, straight from and into the batch's arena.
//!
//! ```text
//!   recvmmsg ─▶ message 0: iovec ─▶ frame 0 of the arena    control: TOS, local address
//!               message 1: iovec ─▶ frame 1                 name:    remote address
//!               …
//! ```

use super::{Traffic, check, options, raw, room_bytes};
use arrayvec::ArrayVec;
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, HEADROOM_BYTES, Outer, Verdict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Messages per system call.
pub(super) const MESSAGES_MAX: usize = 64;
/// Room for the control messages of one packet: TOS and local address of either family.
const CONTROL_BYTES: usize = 128;
/// How often one transmission waits for room in the send buffer before it gives up on the rest…
const FULL_RETRIES: u32 = 4;
/// … and how long each time. Together a few milliseconds: longer would only fill the queues before.
const FULL_WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};
/// Errors queued on a socket (ICMP) that one receipt or transmission steps over.
const QUEUED_ERRORS_MAX: u32 = 16;

/// A datagram socket that moves batches.
pub(super) struct MessageSocket {
    socket: OwnedFd,
    /// Of family AF_INET6; with IPv4 as mapped addresses if it is dual-stack.
    ipv6: bool,
    /// The address it is bound to; unspecified for any.
    bound: IpAddr,
    /// How its Don't Fragment bit is set; `None`: someone else looks after it.
    df: Option<bool>,
    messages: Messages,
}

impl MessageSocket {
    /// Takes a non-blocking socket bound to `bound`.
    pub(super) fn new(socket: OwnedFd, ipv6: bool, bound: IpAddr) -> io::Result<Self> {
        options::set_dont_fragment(socket.as_fd(), false)?;
        Ok(Self {
            socket,
            ipv6,
            bound,
            df: Some(false),
            messages: Messages::new(),
        })
    }

    /// The same socket again, for another thread to send with. Leaves the Don't Fragment bit as it is.
    pub(super) fn another_sender(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            ipv6: self.ipv6,
            bound: self.bound,
            df: None,
            messages: Messages::new(),
        })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn bound(&self) -> IpAddr {
        self.bound
    }

    /// Whether it can send to this address.
    pub(super) fn reaches(&self, remote: IpAddr) -> bool {
        match (self.ipv6, remote) {
            (false, IpAddr::V4(_)) | (true, IpAddr::V6(_)) => true,
            // Dual-stack: IPv4 as mapped addresses.
            (true, IpAddr::V4(_)) => self.bound == IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            (false, IpAddr::V6(_)) => false,
        }
    }

    /// Fills the batch until nothing is left or it is full. `finish` sees each packet once it is in.
    pub(super) fn receive(
        &mut self,
        batch: &mut Batch,
        drops: &mut DropCounters,
        udp: bool,
        finish: impl Fn(&mut Batch, usize),
    ) -> io::Result<()> {
        let mut queued_errors = 0;
        while !batch.is_full() {
            let (asked, result) = self.messages.receive(self.socket.as_fd(), batch);
            let arrived = match result {
                Ok(arrived) => arrived,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // An ICMP error about something sent earlier: this receipt takes it off the socket.
                Err(error) if passes(&error) && queued_errors < QUEUED_ERRORS_MAX => {
                    queued_errors += 1;
                    continue;
                }
                Err(error) if passes(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            self.messages.take(arrived, batch, drops, udp, &finish);
            if arrived < asked {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Sends the Forward'ed packets that `claims` says are for this socket, in order.
    pub(super) fn transmit(
        &mut self,
        batch: &Batch,
        claims: impl Fn(&Outer) -> bool,
        drops: &mut DropCounters,
    ) -> Traffic {
        let mut sent = Traffic::default();
        let mut run: ArrayVec<usize, MESSAGES_MAX> = ArrayVec::new();
        for (index, packet) in batch.packets().iter().enumerate() {
            if packet.verdict != Verdict::Forward || !claims(&packet.outer) {
                continue;
            }
            // The kernel keeps DF per socket, not per packet: a run ends where it changes.
            let changes = self.df.is_some_and(|df| df != packet.outer.df);
            if run.is_full() || (changes && !run.is_empty()) {
                sent += self.transmit_run(batch, &run, drops);
                run.clear();
            }
            if changes {
                self.set_df(packet.outer.df);
            }
            run.push(index);
        }
        sent += self.transmit_run(batch, &run, drops);
        sent
    }

    fn set_df(&mut self, df: bool) {
        // It cannot fail on a socket where it worked before; if it does, packets leave with the other bit.
        if options::set_dont_fragment(self.socket.as_fd(), df).is_ok() {
            self.df = Some(df);
        }
    }

    /// Sends one run; what the kernel refuses is stepped over and counted.
    fn transmit_run(&mut self, batch: &Batch, run: &[usize], drops: &mut DropCounters) -> Traffic {
        let mut sent = Traffic::default();
        let (mut at, mut full, mut queued_errors) = (0, 0, 0);
        self.messages
            .prepare_to_send(batch, run, self.ipv6, self.bound);
        while at < run.len() {
            let error = match self.messages.send(self.socket.as_fd(), at..run.len()) {
                Ok(count) => {
                    for index in &run[at..at + count] {
                        sent.add(batch.packets()[*index].data_bytes());
                    }
                    at += count;
                    full = 0;
                    continue;
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) if full < FULL_RETRIES => {
                    full += 1;
                    let mut until_room = [PollFd::new(&self.socket, PollFlags::OUT)];
                    let _ = poll(&mut until_room, Some(&FULL_WAIT));
                }
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => {
                    drops.add(DropReason::TransmitQueueFull, (run.len() - at) as u64);
                    break;
                }
                // Perhaps an ICMP error about an earlier packet, taken off the socket now: try again.
                Some(libc::ECONNREFUSED) if queued_errors < QUEUED_ERRORS_MAX => {
                    queued_errors += 1;
                }
                // No route, too big, forbidden…: this packet's own fault.
                _ => {
                    drops.add(DropReason::TransmitFailed, 1);
                    at += 1;
                }
            }
        }
        sent
    }
}

/// Trouble that concerns single packets or passes by itself; the socket lives on.
fn passes(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EINTR
                | libc::ECONNREFUSED
                | libc::ECONNRESET
                | libc::EHOSTUNREACH
                | libc::EHOSTDOWN
                | libc::ENETUNREACH
                | libc::ENETDOWN
                | libc::ENOPROTOOPT
                | libc::EPROTO
                | libc::EMSGSIZE
                | libc::ENOBUFS
                | libc::ENOMEM
                | libc::EACCES
                | libc::EPERM
        )
    )
}

#[derive(Clone, Copy)]
#[repr(C, align(8))] // as cmsghdr wants it
struct Control([u8; CONTROL_BYTES]);

/// The structures that `recvmmsg` and `sendmmsg` work on, made once.
///
/// The pointers within `headers` and `vectors` mean something only between filling them in and the
/// system call right after it.
struct Messages {
    headers: Box<[libc::mmsghdr]>,
    vectors: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
}

// SAFETY: the raw pointers are all that keeps it from being Send by itself; each points into the same
// value's own boxes, which move along unchanged, or into a batch's arena, and is set anew before each use.
unsafe impl Send for Messages {}

impl Messages {
    fn new() -> Self {
        // SAFETY: all four are plain C structures for which all bits zero is a valid value (null pointers,
        // lengths of 0).
        let (header, vector, name) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        Self {
            headers: vec![header; MESSAGES_MAX].into_boxed_slice(),
            vectors: vec![vector; MESSAGES_MAX].into_boxed_slice(),
            names: vec![name; MESSAGES_MAX].into_boxed_slice(),
            controls: vec![Control([0; CONTROL_BYTES]); MESSAGES_MAX].into_boxed_slice(),
        }
    }

    /// Lets the kernel write into the spare frames; answers how many were offered and were filled.
    fn receive(&mut self, socket: BorrowedFd<'_>, batch: &mut Batch) -> (usize, io::Result<usize>) {
        let asked = MESSAGES_MAX.min(batch.capacity() - batch.len());
        for (index, frame) in batch.spare_frames().take(asked).enumerate() {
            self.vectors[index] = libc::iovec {
                iov_base: frame.as_mut_ptr().cast(),
                iov_len: frame.len(),
            };
            self.point(
                index,
                mem::size_of::<libc::sockaddr_storage>(),
                CONTROL_BYTES,
            );
        }
        // SAFETY: the first `asked` headers have just been pointed at names, controls and vectors of this
        // value and, through those, at distinct spare frames of the batch; all outlive the call, nobody else refers
        // to them during it, and each length given is that of the memory pointed to.
        let result = check(unsafe {
            libc::recvmmsg(
                raw(socket),
                self.headers.as_mut_ptr(),
                asked as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        });
        (asked, result.map(|count| count as usize))
    }

    /// Takes the first `arrived` messages into the batch.
    fn take(
        &self,
        arrived: usize,
        batch: &mut Batch,
        drops: &mut DropCounters,
        udp: bool,
        finish: &impl Fn(&mut Batch, usize),
    ) {
        let (first, frame_bytes) = (batch.len(), batch.frame_bytes());
        let room = room_bytes(batch);
        for (index, message) in self.headers[..arrived].iter().enumerate() {
            let bytes = message.msg_len as usize;
            if message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 || bytes > room {
                drops.add(DropReason::ReceiveTruncated, 1);
                continue;
            }
            // Behind a truncated packet the others move up one frame; rare, so they may be copied.
            let (from, to) = (first + index, batch.len());
            if from != to {
                let start = from * frame_bytes + HEADROOM_BYTES;
                let (arena, _) = batch.parts_mut();
                arena.copy_within(start..start + bytes, to * frame_bytes + HEADROOM_BYTES);
            }
            let outer = self.outer_of(index, udp);
            batch.push_received(bytes, outer);
            finish(batch, to);
        }
    }

    fn outer_of(&self, index: usize, udp: bool) -> Outer {
        let remote = address_from(&self.names[index]);
        let mut outer = Outer {
            remote,
            udp,
            ..Outer::NONE
        };
        let header = &self.headers[index].msg_hdr;
        // SAFETY: the kernel has filled in this header's control buffer and its length; both are this value's
        // own and untouched since. The CMSG macros walk within that length.
        let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
        while !control.is_null() {
            // SAFETY: `control` came from CMSG_FIRSTHDR or CMSG_NXTHDR and is not null, so it points to a
            // whole cmsghdr within the control buffer, followed by the data its type promises; the reads are unaligned.
            unsafe {
                let data = libc::CMSG_DATA(control);
                match ((*control).cmsg_level, (*control).cmsg_type) {
                    (libc::IPPROTO_IP, libc::IP_TOS) => outer.tos = data.read(),
                    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                        outer.tos = data.cast::<libc::c_int>().read_unaligned() as u8;
                    }
                    (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                        let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                        outer.local = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into();
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                        let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                        outer.local = IpAddr::from(info.ipi6_addr.s6_addr).to_canonical();
                    }
                    _ => {}
                }
                control = libc::CMSG_NXTHDR(header, control);
            }
        }
        outer
    }

    /// Describes one message for each packet of `run`. Good for [`Messages::send`] until `batch` changes.
    fn prepare_to_send(&mut self, batch: &Batch, run: &[usize], ipv6: bool, bound: IpAddr) {
        for (at, index) in run.iter().enumerate() {
            let outer = &batch.packets()[*index].outer;
            let data = batch.data(*index);
            self.vectors[at] = libc::iovec {
                iov_base: data.as_ptr().cast_mut().cast(),
                iov_len: data.len(),
            };
            let name_bytes = address_into(&mut self.names[at], outer.remote, ipv6);
            self.point(at, name_bytes, CONTROL_BYTES);
            let header = &mut self.headers[at].msg_hdr;
            header.msg_controllen = write_control(header, outer, bound) as _;
        }
    }

    /// Sends those messages of the run that are within `range`; answers how many went before the first
    /// that did not.
    fn send(&mut self, socket: BorrowedFd<'_>, range: std::ops::Range<usize>) -> io::Result<usize> {
        let headers = &mut self.headers[range];
        // SAFETY: `transmit_run` has prepared these headers for a batch it still borrows, so all that they point to
        // is alive and as long as they say; the kernel only reads the data, and writes `msg_len` alone.
        check(unsafe {
            libc::sendmmsg(
                raw(socket),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
            )
        })
        .map(|count| count as usize)
    }

    /// Points a header at the name, vector and control of the same index.
    fn point(&mut self, index: usize, name_bytes: usize, control_bytes: usize) {
        let header = &mut self.headers[index].msg_hdr;
        header.msg_name = std::ptr::from_mut(&mut self.names[index]).cast();
        header.msg_namelen = name_bytes as libc::socklen_t;
        header.msg_iov = &mut self.vectors[index];
        header.msg_iovlen = 1;
        header.msg_control = self.controls[index].0.as_mut_ptr().cast();
        header.msg_controllen = control_bytes as _;
        header.msg_flags = 0;
    }
}

/// Writes TOS and, where it is not the socket's own, the local address. Answers the length of it.
fn write_control(header: &libc::msghdr, outer: &Outer, bound: IpAddr) -> usize {
    let tos = libc::c_int::from(outer.tos);
    let with_local = !outer.local.is_unspecified()
        && outer.local != bound
        && outer.local.is_ipv4() == outer.remote.is_ipv4();
    // SAFETY: `header` points to CONTROL_BYTES of control buffer, more than both messages take together; each
    // closure call writes a C structure of the type its option wants.
    unsafe {
        let mut writer = ControlWriter::new(header);
        match (outer.remote.is_ipv4(), outer.local) {
            (true, IpAddr::V4(local)) => {
                writer.push(libc::IPPROTO_IP, libc::IP_TOS, tos);
                if with_local {
                    writer.push(
                        libc::IPPROTO_IP,
                        libc::IP_PKTINFO,
                        libc::in_pktinfo {
                            ipi_ifindex: 0,
                            ipi_spec_dst: in_address(local),
                            ipi_addr: in_address(Ipv4Addr::UNSPECIFIED),
                        },
                    );
                }
            }
            (true, IpAddr::V6(_)) => writer.push(libc::IPPROTO_IP, libc::IP_TOS, tos),
            (false, local) => {
                writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, tos);
                if let (true, IpAddr::V6(local)) = (with_local, local) {
                    writer.push(
                        libc::IPPROTO_IPV6,
                        libc::IPV6_PKTINFO,
                        libc::in6_pktinfo {
                            ipi6_addr: libc::in6_addr {
                                s6_addr: local.octets(),
                            },
                            ipi6_ifindex: 0,
                        },
                    );
                }
            }
        }
        writer.length
    }
}

/// Lays control messages one behind the other.
struct ControlWriter<'a> {
    header: &'a libc::msghdr,
    next: *mut libc::cmsghdr,
    length: usize,
}

impl<'a> ControlWriter<'a> {
    /// # Safety
    /// `header` must point to a control buffer of `msg_controllen` bytes that nobody else uses.
    unsafe fn new(header: &'a libc::msghdr) -> Self {
        Self {
            header,
            // SAFETY: the caller's promise.
            next: unsafe { libc::CMSG_FIRSTHDR(header) },
            length: 0,
        }
    }

    /// # Safety
    /// `value` must be of the C type that the option takes.
    unsafe fn push<T>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) {
        let bytes = mem::size_of::<T>() as libc::c_uint;
        // SAFETY: CMSG_SPACE computes. `next` lies within the control buffer, and there is room for the message,
        // for this is checked first; the fields of a cmsghdr and the bytes behind it may be written freely.
        unsafe {
            let space = libc::CMSG_SPACE(bytes) as usize;
            if self.next.is_null() || self.length + space > CONTROL_BYTES {
                return;
            }
            (*self.next).cmsg_level = level;
            (*self.next).cmsg_type = kind;
            (*self.next).cmsg_len = libc::CMSG_LEN(bytes) as _;
            libc::CMSG_DATA(self.next)
                .cast::<T>()
                .write_unaligned(value);
            self.length += space;
            self.next = self.header.msg_control.cast::<u8>().add(self.length).cast();
        }
    }
}

fn in_address(address: Ipv4Addr) -> libc::in_addr {
    libc::in_addr {
        s_addr: u32::from_ne_bytes(address.octets()),
    }
}

/// A socket address as Rust has it; IPv4-mapped ones become IPv4.
fn address_from(name: &libc::sockaddr_storage) -> SocketAddr {
    let name = std::ptr::from_ref(name);
    // SAFETY: a sockaddr_storage is large enough and aligned for either family's structure, and every bit
    // pattern is a valid one.
    let (family, v4, v6) = unsafe {
        (
            libc::c_int::from((*name).ss_family),
            &*name.cast::<libc::sockaddr_in>(),
            &*name.cast::<libc::sockaddr_in6>(),
        )
    };
    match family {
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let port = u16::from_be(v6.sin6_port);
            match IpAddr::V6(ip).to_canonical() {
                IpAddr::V4(ip) => SocketAddrV4::new(ip, port).into(),
                // A link-local peer is reached through its interface only.
                IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into(),
            }
        }
        _ => {
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into()
        }
    }
}

/// Writes an address for a socket of family AF_INET6 or not; answers its length.
fn address_into(name: &mut libc::sockaddr_storage, address: SocketAddr, ipv6: bool) -> usize {
    let name = std::ptr::from_mut(name);
    match address {
        SocketAddr::V4(address) if !ipv6 => {
            let value = libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: address.port().to_be(),
                sin_addr: in_address(*address.ip()),
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room and alignment for a sockaddr_in.
            unsafe { name.cast::<libc::sockaddr_in>().write(value) };
            mem::size_of::<libc::sockaddr_in>()
        }
        address => {
            let (ip, scope) = match address {
                SocketAddr::V4(address) => (address.ip().to_ipv6_mapped(), 0),
                SocketAddr::V6(address) => (*address.ip(), address.scope_id()),
            };
            let value = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: ip.octets(),
                },
                sin6_scope_id: scope,
            };
            // SAFETY: a sockaddr_storage has room and alignment for a sockaddr_in6.
            unsafe { name.cast::<libc::sockaddr_in6>().write(value) };
            mem::size_of::<libc::sockaddr_in6>()
        }
    }
}
