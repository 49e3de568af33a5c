//! Socket options that need more than rustix offers.

use super::{check, raw};
use std::{io, mem, os::fd::BorrowedFd};

/// Sets one option.
///
/// # Safety
/// `T` must be the C type of this option, and pointers within it valid.
unsafe fn set<T>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes from `value`, which lives through the call; for what
    // they mean to it the caller answers.
    check(unsafe {
        libc::setsockopt(
            raw(socket),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            mem::size_of::<T>() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// Asks for `bytes` of buffer in both directions, past the system's limit where we may.
/// The kernel's limit holds silently else; it costs drops under bursts, not correctness.
pub(super) fn set_buffers(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    use rustix::net::sockopt::{
        set_socket_recv_buffer_size, set_socket_recv_buffer_size_force,
        set_socket_send_buffer_size, set_socket_send_buffer_size_force,
    };
    set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| set_socket_recv_buffer_size(socket, bytes))?;
    set_socket_send_buffer_size_force(socket, bytes)
        .or_else(|_| set_socket_send_buffer_size(socket, bytes))?;
    Ok(())
}

/// Asks for the address at which each packet arrived.
pub(super) fn report_local_address(socket: BorrowedFd<'_>, ipv6: bool) -> io::Result<()> {
    let on: libc::c_int = 1;
    let (level, name) = if ipv6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)
    } else {
        (libc::IPPROTO_IP, libc::IP_PKTINFO)
    };
    // SAFETY: both options take an int.
    unsafe { set(socket, level, name, &on) }
}

/// Whether one message may hold many datagrams (`UDP_SEGMENT`, Linux 4.18).
pub(super) fn can_segment(socket: BorrowedFd<'_>) -> bool {
    let by_message: libc::c_int = 0; // the size comes with each message
    // SAFETY: the option takes an int.
    unsafe { set(socket, libc::SOL_UDP, libc::UDP_SEGMENT, &by_message) }.is_ok()
}

/// Lets the kernel deliver many datagrams as one message (`UDP_GRO`, Linux 5.0), or not.
pub(super) fn set_gro(socket: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let on = libc::c_int::from(on);
    // SAFETY: the option takes an int.
    unsafe { set(socket, libc::SOL_UDP, libc::UDP_GRO, &on) }
}

/// Lets a group of sockets that share a port receive by SPI: the first four bytes modulo their number, in the order in
/// which they were bound. Keepalives, which are shorter, reach the first.
pub(super) fn steer_by_spi(socket: BorrowedFd<'_>, sockets: usize) -> io::Result<()> {
    let step = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    // Starts at the UDP payload. A load from beyond its end ends the program with 0.
    let program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, sockets as u32),
        step(libc::BPF_RET | libc::BPF_A, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the option takes a sock_fprog, whose program lives through the call; the kernel copies and checks it.
    unsafe {
        set(
            socket,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            &filter,
        )
    }
}

/// Lets nothing in: for a raw socket that only sends, since every raw socket gets a copy of every packet.
pub(super) fn refuse_everything(socket: BorrowedFd<'_>) -> io::Result<()> {
    let accept_no_byte = libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: 0,
    };
    attach_filter(socket, &[accept_no_byte])
}

/// Lets in what a classic BPF program accepts; takes the place of the one before.
pub(super) fn attach_filter(
    socket: BorrowedFd<'_>,
    instructions: &[libc::sock_filter],
) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: instructions.as_ptr().cast_mut(),
    };
    // SAFETY: the option takes a sock_fprog; it points to as many instructions as it says, which live
    // through the call and which the kernel only reads, checks, and copies.
    unsafe { set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program) }
}

/// Lets an IPv6 socket be bound to an address that is not ours.
pub(super) fn set_ipv6_freebind(socket: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let on = libc::c_int::from(on);
    // SAFETY: the option takes an int.
    unsafe { set(socket, libc::IPPROTO_IPV6, libc::IPV6_FREEBIND, &on) }
}

/// Lets the kernel fill in the UDP checksum of what an IPv6 raw socket sends.
pub(super) fn fill_in_udp_checksum(socket: BorrowedFd<'_>) -> io::Result<()> {
    let at: libc::c_int = 6;
    // SAFETY: the option takes an int.
    unsafe { set(socket, libc::IPPROTO_IPV6, libc::IPV6_CHECKSUM, &at) }
}

/// Lets each message of a packet socket begin with a virtio_net_hdr: several packets may come as one.
pub(super) fn set_packet_vnet_header(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int.
    unsafe { set(socket, libc::SOL_PACKET, PACKET_VNET_HDR, &on) }
}

/// Asks for a tpacket_auxdata with each message of a packet socket: where IP begins.
pub(super) fn report_link_header(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int.
    unsafe { set(socket, libc::SOL_PACKET, PACKET_AUXDATA, &on) }
}

/// From linux/if_packet.h; the C library leaves them out.
const PACKET_VNET_HDR: libc::c_int = 15;
pub(super) const PACKET_AUXDATA: libc::c_int = 8;

/// Lets packet sockets share what comes, by kind (`PACKET_FANOUT_…`), in a group; answers its number.
pub(super) fn join_packet_fanout(
    socket: BorrowedFd<'_>,
    kind: libc::c_uint,
    group: u16,
) -> io::Result<u16> {
    let wanted: libc::c_uint = kind << 16 | libc::c_uint::from(group);
    let mut joined: libc::c_uint = 0;
    let mut bytes = mem::size_of_val(&joined) as libc::socklen_t;
    // SAFETY: the option takes an int; and it answers one, into memory of that size that nobody else uses.
    unsafe {
        set(socket, libc::SOL_PACKET, libc::PACKET_FANOUT, &wanted)?;
        check(libc::getsockopt(
            raw(socket),
            libc::SOL_PACKET,
            libc::PACKET_FANOUT,
            std::ptr::from_mut(&mut joined).cast(),
            &mut bytes,
        ))?;
    }
    Ok(joined as u16)
}

/// Tells what the kernel has thrown away of a socket's messages: its receive buffer was full, or their checksum was wrong.
#[derive(Default)]
pub(super) struct Losses(u32);

impl Losses {
    /// How many since the last call. A message that held several packets counts once.
    pub(super) fn take(&mut self, socket: BorrowedFd<'_>) -> u64 {
        let Ok(now) = lost(socket) else {
            return 0; // they stay in the kernel: later
        };
        now.wrapping_sub(mem::replace(&mut self.0, now)).into()
    }
}

/// As many since the socket was opened, modulo 2³².
fn lost(socket: BorrowedFd<'_>) -> io::Result<u32> {
    const DROPS: usize = 8; // SK_MEMINFO_DROPS of linux/sock_diag.h
    let mut figures = [0u32; DROPS + 1];
    let mut bytes = mem::size_of_val(&figures) as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes`, the length of `figures`.
    check(unsafe {
        libc::getsockopt(
            raw(socket),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            figures.as_mut_ptr().cast(),
            &mut bytes,
        )
    })?;
    Ok(figures[DROPS])
}

/// What the kernel does with the Don't Fragment bit of the packets a socket sends.
///
/// Either way it believes no ICMP "fragmentation needed": an attacker could forge one (RFC 4301 §8.2.1).
pub(super) fn set_dont_fragment(socket: BorrowedFd<'_>, df: bool) -> io::Result<()> {
    let mode: libc::c_int = if df {
        libc::IP_PMTUDISC_PROBE
    } else {
        libc::IP_PMTUDISC_DONT
    };
    // SAFETY: the option takes an int.
    unsafe { set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &mode) }
}
