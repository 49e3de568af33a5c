//! A datagram socket that moves batches: what UDP and raw sockets have in common.

use super::{
    Traffic, UdpOffloads,
    gro::GroReceiver,
    mmsg::{MESSAGES_MAX, Messages},
    options,
};
use arrayvec::ArrayVec;
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer, Verdict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};
use tracing::info;

/// How often the transmission of one run waits for room in the send buffer before it gives up on the rest…
const FULL_RETRIES: u32 = 4;
/// … and how long each time. Together a few milliseconds: longer would only fill the queues before.
const FULL_WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};
/// Errors queued on a socket (ICMP) that one receipt or transmission steps over.
const QUEUED_ERRORS_MAX: u32 = 16;

/// Which addresses a socket can have to do with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Speaks {
    /// A socket of family AF_INET.
    V4,
    /// A socket of family AF_INET6.
    V6,
    /// A socket of family AF_INET6 to which IPv4 addresses appear as mapped ones.
    Both,
}

/// A datagram socket that moves batches.
pub(super) struct MessageSocket {
    socket: OwnedFd,
    speaks: Speaks,
    /// The address it is bound to; unspecified for any.
    bound: IpAddr,
    /// How its Don't Fragment bit is set; `None`: IPv6 has none, or someone else looks after it.
    df: Option<bool>,
    /// Whether neighbours may leave as one message (UDP_SEGMENT).
    gso: bool,
    /// Takes apart messages of many datagrams, where the kernel makes such.
    gro: Option<Box<GroReceiver>>,
    messages: Messages,
    losses: options::Losses,
}

impl MessageSocket {
    /// Takes a non-blocking socket bound to `bound`.
    pub(super) fn new(socket: OwnedFd, speaks: Speaks, bound: IpAddr) -> io::Result<Self> {
        let mut new = Self {
            socket,
            speaks,
            bound,
            df: None,
            gso: false,
            gro: None,
            messages: Messages::new(),
            losses: options::Losses::default(),
        };
        if speaks != Speaks::V6 {
            options::set_dont_fragment(new.as_fd(), false)?;
            new.df = Some(false);
        }
        Ok(new)
    }

    /// The same socket again, for another thread to send with. Leaves the Don't Fragment bit as it is.
    pub(super) fn another_sender(&self) -> io::Result<Self> {
        Ok(Self {
            socket: self.socket.try_clone()?,
            speaks: self.speaks,
            bound: self.bound,
            df: None,
            gso: self.gso,
            gro: None,
            messages: self.messages.another(),
            losses: options::Losses::default(),
        })
    }

    /// Lets packets that differ in nothing outside leave and arrive as one message, where the kernel
    /// can. For UDP, and before anything is received. Answers what is on.
    pub(super) fn set_offloads(&mut self, on: bool) -> UdpOffloads {
        self.gso = on && options::can_segment(self.as_fd());
        let gro = options::set_gro(self.as_fd(), on).is_ok() && on;
        self.gro = gro.then(|| Box::new(GroReceiver::new()));
        UdpOffloads { gso: self.gso, gro }
    }

    /// Writes the UDP headers itself: for a raw socket of IP protocol 17.
    pub(super) fn with_udp_headers(mut self, local_port: u16) -> Self {
        self.messages = Messages::with_udp_headers(local_port);
        self
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether it can send to this address.
    pub(super) fn reaches(&self, remote: IpAddr) -> bool {
        match self.speaks {
            Speaks::V4 => remote.is_ipv4(),
            Speaks::V6 => remote.is_ipv6(),
            Speaks::Both => true,
        }
    }

    /// Whether system calls on it take addresses of family AF_INET6.
    pub(super) fn is_ipv6(&self) -> bool {
        self.speaks != Speaks::V4
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
        if let Some(gro) = &mut self.gro {
            gro.unpack(batch, drops); // what the last batch had no room for
        }
        while !batch.is_full() {
            let (asked, result) = match &mut self.gro {
                Some(gro) => gro.receive(self.socket.as_fd(), batch, drops),
                None => self.messages.receive(self.socket.as_fd(), batch),
            };
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
            if self.gro.is_none() {
                self.messages.take(arrived, batch, drops, udp, &finish);
            }
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
            if packet.verdict != Verdict::Forward {
                continue;
            }
            let outer = batch.outer_of(packet);
            if !claims(&outer) {
                continue;
            }
            // The kernel keeps DF per socket, not per packet: a run ends where it changes.
            let ipv4 = outer.remote.is_ipv4();
            let changes = ipv4 && self.df.is_some_and(|df| df != outer.df);
            if run.is_full() || (changes && !run.is_empty()) {
                sent += self.transmit_run(batch, &run, drops);
                run.clear();
            }
            if changes {
                self.set_df(outer.df);
            }
            run.push(index);
        }
        sent += self.transmit_run(batch, &run, drops);
        sent
    }

    /// Counts what the kernel had no room for since the last call.
    pub(super) fn count_lost(&mut self, drops: &mut DropCounters) {
        let lost = self.losses.take(self.socket.as_fd());
        drops.add(DropReason::OuterOverrun, lost);
    }

    fn set_df(&mut self, df: bool) {
        // It cannot fail on a socket where it worked before; if it does, packets leave with the other bit.
        if options::set_dont_fragment(self.socket.as_fd(), df).is_ok() {
            self.df = Some(df);
        }
    }

    /// Sends one run; what the kernel refuses is stepped over and counted.
    fn transmit_run(
        &mut self,
        batch: &Batch,
        mut run: &[usize],
        drops: &mut DropCounters,
    ) -> Traffic {
        let mut sent = Traffic::default();
        let (mut full, mut queued_errors, mut gather) = (0, 0, self.gso);
        let ipv6 = self.is_ipv6();
        'prepare: while !run.is_empty() {
            let messages = &mut self.messages;
            let prepared = messages.prepare_to_send(batch, run, ipv6, self.bound, gather);
            let mut at = 0;
            while at < prepared {
                // SAFETY: prepared just now, so many, and `batch` is borrowed until we return.
                let result = unsafe { self.messages.send(self.socket.as_fd(), at..prepared) };
                let error = match result {
                    Ok(count) => {
                        let packets = self.messages.segments()[at..at + count].iter().sum();
                        let (gone, rest) = run.split_at(packets);
                        for index in gone {
                            sent.add(batch.packets()[*index].data_bytes());
                        }
                        (run, at) = (rest, at + count);
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
                        drops.add(DropReason::TransmitQueueFull, run.len() as u64);
                        return sent;
                    }
                    // Perhaps an ICMP error about an earlier packet, taken off the socket now: try again.
                    Some(libc::ECONNREFUSED) if queued_errors < QUEUED_ERRORS_MAX => {
                        queued_errors += 1;
                    }
                    // Several packets at once, and one may be to blame, or that they are several (they exceed
                    // the MTU, and only single ones are fragmented): from here on one by one.
                    error if self.messages.segments()[at] > 1 => {
                        gather = false;
                        self.note_refused_segments(error);
                        continue 'prepare;
                    }
                    // No route, too big, forbidden…: this packet's own fault.
                    _ => {
                        drops.add(DropReason::TransmitFailed, 1);
                        (run, at) = (&run[1..], at + 1);
                    }
                }
            }
        }
        sent
    }

    /// EIO says that the way out cannot finish the checksums of segments: no use in trying again.
    fn note_refused_segments(&mut self, error: Option<i32>) {
        if error == Some(libc::EIO) {
            self.gso = false;
            info!("the network interface cannot segment UDP; packets leave one by one from now on");
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Netlink;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
    use std::net::Ipv4Addr;

    /// Behind a router that answers no ARP the kernel keeps packets, and with them the send buffer, for
    /// seconds: long past our patience.
    #[test]
    fn a_send_buffer_that_stays_full_costs_packets_but_each_is_counted() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let story = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let netlink = Netlink::open().unwrap();
                netlink.add_veth_pair("link", "nobody").await.unwrap();
                for name in ["link", "nobody"] {
                    let link = netlink.link_index(name).await.unwrap();
                    netlink.set_up(link).await.unwrap();
                }
                let link = netlink.link_index("link").await.unwrap();
                let here = "192.0.2.1".parse().unwrap();
                netlink.add_address(link, here, 24).await.unwrap();
            });
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None).unwrap();
            sockopt::set_socket_send_buffer_size(&socket, 4096).unwrap();
            let any = Ipv4Addr::UNSPECIFIED.into();
            let mut socket = MessageSocket::new(socket, Speaks::V4, any).unwrap();
            let outer = Outer {
                remote: "192.0.2.99:4500".parse().unwrap(),
                udp: true,
                ..Outer::NONE
            };
            let mut batch = Batch::new(100, 2048);
            while batch.push(&[0; 1000], outer) {}
            for packet in batch.packets_mut() {
                packet.verdict = Verdict::Forward;
            }
            let mut drops = DropCounters::default();
            let sent = socket.transmit(&batch, |_| true, &mut drops);
            let full = drops[DropReason::TransmitQueueFull];
            assert!(sent.packets > 0 && full > 0, "{sent:?} {drops:?}");
            assert_eq!((sent.packets + full, drops.unexpected()), (100, full));
        };
        std::thread::spawn(story).join().unwrap();
    }
}
