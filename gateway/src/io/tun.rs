//! The private side: one queue of a multi-queue TUN interface.
//!
//! ```text
//!   with offloads (vnet.rs)   super-packets of up to 64 KiB both ways, checksums left to us
//!   without                   one system call, one packet, straight into and from its frame
//! ```

use super::{
    Descriptors, Driver, Traffic, check, link_losses::LinkLosses, offload::VNET_BYTES, raw,
    room_bytes, tun_steering, vnet::SuperPackets,
};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer, Verdict};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use std::{
    fmt,
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread,
    time::Duration,
};
use tracing::info;

/// Packets that the kernel holds for each queue unless told otherwise.
pub const TUN_QUEUE_PACKETS: u32 = 4096;
/// How often and how long to wait for a name that is about to become free.
const BUSY_RETRIES: u32 = 20;
const BUSY_WAIT: Duration = Duration::from_millis(50);

/// What to open.
#[derive(Clone, Debug)]
pub struct TunOptions {
    /// The interface's name, at most 15 bytes. One with `%d` lets the kernel choose a number.
    pub name: String,
    /// How many queues: one a worker.
    pub queues: usize,
    /// Packets that the kernel holds for each queue until a worker reads them.
    pub queue_packets: u32,
    /// Whether to use what the kernel offers for many packets at once.
    pub offloads: bool,
}

impl TunOptions {
    /// With the default queue length and all offloads there are.
    pub fn new(name: impl Into<String>, queues: usize) -> Self {
        Self {
            name: name.into(),
            queues,
            queue_packets: TUN_QUEUE_PACKETS,
            offloads: true,
        }
    }
}

/// One queue. The interface goes when the last of its queues is closed.
#[derive(Debug)]
pub struct TunQueue {
    file: OwnedFd,
    name: String,
    offloads: TunOffloads,
    /// There if the queue was opened for super-packets.
    super_packets: Option<SuperPackets>,
    /// With the first queue: what the queues had no room for.
    losses: Option<LinkLosses>,
}

/// What the kernel leaves to us, and takes from us, for many packets at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunOffloads {
    /// Checksums of packets from this machine come half done; we finish them.
    pub checksum: bool,
    /// TCP segments as one super-packet.
    pub tso: bool,
    /// UDP datagrams of one length as one super-packet (Linux 6.2).
    pub uso: bool,
}

impl fmt::Display for TunOffloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.checksum, self.tso, self.uso) {
            (_, true, true) => "TSO+USO",
            (_, true, false) => "TSO",
            (_, false, true) => "USO",
            (true, false, false) => "checksums",
            (false, false, false) => "none",
        })
    }
}

/// Why a TUN interface could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// A name no interface can have.
    #[error("`{0}` is no name for an interface; use 1 to 15 letters, digits, `-`, `_` or `.`")]
    Name(String),
    /// The device file is missing.
    #[error(
        "there is no /dev/net/tun; load the module (`modprobe tun`), or give the container the device (`--device /dev/net/tun`)"
    )]
    NoDevice,
    /// Not allowed.
    #[error("not allowed to make the TUN interface `{0}`; this needs root or CAP_NET_ADMIN")]
    NotAllowed(String),
    /// Another process has it.
    #[error(
        "the interface `{0}` is in use by another process; stop that one, or choose another name"
    )]
    InUse(String),
    /// It exists, but is no multi-queue TUN.
    #[error(
        "an interface `{0}` exists that is not a multi-queue TUN; remove it (`ip link delete {0}`), or choose another name"
    )]
    OtherKind(String),
    /// Anything else.
    #[error("cannot {doing} the TUN interface `{name}`: {source}")]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// The interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl TunQueue {
    /// Opens all queues of one interface, in the network namespace of this thread. The interface is
    /// down and has no address yet.
    pub fn open(options: &TunOptions) -> Result<Vec<Self>, TunError> {
        let mut queues: Vec<Self> = Vec::with_capacity(options.queues);
        if options.queues > 0 {
            queues.push(open_first(&options.name, options.offloads)?);
        }
        while queues.len() < options.queues {
            let queue = open_queue(&queues[0].name, options.offloads)?;
            queues.push(queue);
        }
        if options.offloads
            && let Some(first) = queues.first()
        {
            let offloads = switch_offloads_on(first)
                .map_err(|source| kernel("set the header of", &first.name, source))?;
            for queue in &mut queues {
                queue.offloads = offloads;
                queue.super_packets = Some(SuperPackets::new(offloads));
            }
        }
        if let [first, _, ..] = queues.as_slice()
            && let Err(error) = tun_steering::attach(first.file.as_fd())
        {
            info!(
                "the kernel itself chooses queues of {} ({error}): flows may move between workers",
                first.name
            );
        }
        if let Some(queue) = queues.first_mut() {
            match LinkLosses::of(&queue.name) {
                Ok(losses) => queue.losses = Some(losses),
                Err(error) => info!(
                    "packets for which {} has no room are not counted here but by `ip -statistics link show` ({error})",
                    queue.name
                ),
            }
            match set_queue_length(&queue.name, options.queue_packets) {
                // In a user namespace; there only netlink may (`network.rs`).
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                outcome => outcome
                    .map_err(|source| kernel("set the queue length of", &queue.name, source))?,
            }
        }
        Ok(queues)
    }

    /// The interface's name as the kernel has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which offloads are on.
    pub fn offloads(&self) -> TunOffloads {
        self.offloads
    }

    fn receive_plain(&self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        let room = room_bytes(batch);
        let mut too_big = 0;
        while too_big < batch.capacity() {
            let Some(frame) = batch.next_frame() else {
                break;
            };
            match rustix::io::read(&self.file, frame) {
                // The kernel cuts silently; a frame is larger than the MTU, so only a cut packet fills it.
                Ok(bytes) if bytes >= room => {
                    drops.add(DropReason::InnerTooBig, 1);
                    too_big += 1;
                }
                Ok(bytes) => batch.push_received(bytes, Outer::NONE),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn transmit_plain(&self, batch: &Batch, drops: &mut DropCounters) -> Traffic {
        let mut sent = Traffic::default();
        for (index, packet) in batch.packets().iter().enumerate() {
            if packet.verdict != Verdict::Forward {
                continue;
            }
            match write(self.file.as_fd(), &[IoSlice::new(batch.data(index))]) {
                Ok(()) => sent.add(packet.data_bytes()),
                Err(_) => drops.add(DropReason::DeliverFailed, 1),
            }
        }
        sent
    }
}

/// Writes one packet, or super-packet, to the interface, which takes it whole or not at all.
pub(super) fn write(file: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> io::Result<()> {
    let mut waited = false;
    loop {
        match rustix::io::writev(file, parts) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if !waited => {
                waited = true;
                let wait = Timespec {
                    tv_sec: 0,
                    tv_nsec: 2_000_000,
                };
                let _ = poll(&mut [PollFd::new(&file, PollFlags::OUT)], Some(&wait));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

impl Driver for TunQueue {
    fn receive(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> io::Result<()> {
        match &mut self.super_packets {
            Some(super_packets) => super_packets.receive(self.file.as_fd(), batch, drops),
            None => self.receive_plain(batch, drops),
        }
    }

    fn transmit(&mut self, batch: &mut Batch, drops: &mut DropCounters) -> Traffic {
        match &mut self.super_packets {
            Some(super_packets) => super_packets.transmit(self.file.as_fd(), batch, drops),
            None => self.transmit_plain(batch, drops),
        }
    }

    fn count_lost(&mut self, drops: &mut DropCounters) {
        if let Some(losses) = &mut self.losses {
            drops.add(DropReason::InnerOverrun, losses.take());
        }
    }

    fn poll_descriptors(&self) -> Descriptors<'_> {
        Descriptors::from_iter([self.file.as_fd()])
    }
}

/// Opens the first queue of an interface that nobody else has: the kernel would let a second daemon
/// join, and give it half of our packets.
fn open_first(name: &str, vnet: bool) -> Result<TunQueue, TunError> {
    for wait in (0..BUSY_RETRIES).rev() {
        let existed = exists(name).map_err(|error| kernel("look for", name, error))?;
        let queue = open_queue(name, vnet)?;
        // One that outlives its owner was made for us beforehand (`ip tuntap add … multi_queue`).
        let made_for_us = || is_persistent(&queue);
        if !existed || made_for_us().map_err(|error| kernel("examine", name, error))? {
            return Ok(queue);
        }
        drop(queue);
        if wait > 0 {
            thread::sleep(BUSY_WAIT); // its owner may be about to end
        }
    }
    Err(TunError::InUse(name.to_owned()))
}

fn exists(name: &str) -> io::Result<bool> {
    let any_socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    Ok(rustix::net::netdevice::name_to_index(any_socket, name).is_ok())
}

fn is_persistent(queue: &TunQueue) -> io::Result<bool> {
    let mut request = request_for(&queue.name).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNGETIFF writes one ifreq, which `request` is; it sets the flags read below.
    let flags = unsafe {
        check(libc::ioctl(
            raw(queue.file.as_fd()),
            libc::TUNGETIFF as _,
            &mut request,
        ))?;
        request.ifr_ifru.ifru_flags
    };
    Ok(libc::c_int::from(flags) & libc::IFF_PERSIST != 0)
}

fn open_queue(name: &str, vnet: bool) -> Result<TunQueue, TunError> {
    let mut request = request_for(name).ok_or_else(|| TunError::Name(name.to_owned()))?;
    let with_header = if vnet { libc::IFF_VNET_HDR } else { 0 };
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | with_header) as libc::c_short;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|error| {
        match io::Error::from(error) {
            error if error.kind() == io::ErrorKind::NotFound => TunError::NoDevice,
            error if error.raw_os_error() == Some(libc::ENODEV) => TunError::NoDevice,
            error if error.kind() == io::ErrorKind::PermissionDenied => {
                TunError::NotAllowed(name.to_owned())
            }
            error => kernel("open /dev/net/tun for", name, error),
        }
    })?;
    let mut tries = 0;
    while let Err(error) = attach(file.as_fd(), &mut request) {
        let name = || name.to_owned();
        match error.raw_os_error() {
            // For a moment after its last owner has gone.
            Some(libc::EBUSY) if tries < BUSY_RETRIES => thread::sleep(BUSY_WAIT),
            Some(libc::EBUSY) => return Err(TunError::InUse(name())),
            Some(libc::EPERM) => return Err(TunError::NotAllowed(name())),
            Some(libc::EINVAL) => return Err(TunError::OtherKind(name())),
            _ => return Err(kernel("make", &name(), error)),
        }
        tries += 1;
    }
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| byte.cast_unsigned())
        .take_while(|byte| *byte != 0)
        .collect();
    Ok(TunQueue {
        file,
        name: String::from_utf8_lossy(&name).into_owned(),
        offloads: TunOffloads::default(),
        super_packets: None,
        losses: None,
    })
}

fn attach(file: BorrowedFd<'_>, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is, with name and flags filled in.
    check(unsafe { libc::ioctl(raw(file), libc::TUNSETIFF as _, request) }).map(drop)
}

/// Switches on what the kernel has, for all queues of the interface; says what it has not.
fn switch_offloads_on(queue: &TunQueue) -> io::Result<TunOffloads> {
    // An interface made beforehand may have a longer one.
    let header_bytes = VNET_BYTES as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which lives through the call.
    check(unsafe {
        libc::ioctl(
            raw(queue.file.as_fd()),
            libc::TUNSETVNETHDRSZ as _,
            &header_bytes,
        )
    })?;
    let tso = libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    let all = TunOffloads {
        checksum: true,
        tso: true,
        uso: true,
    };
    for (flags, offloads, missing) in [
        (libc::TUN_F_CSUM | tso | uso, all, ""),
        (
            libc::TUN_F_CSUM | tso,
            TunOffloads { uso: false, ..all },
            "this kernel's TUN has no USO: UDP packets come and go one by one",
        ),
    ] {
        // SAFETY: TUNSETOFFLOAD takes its flags as the argument itself and touches no memory of ours.
        let set = unsafe {
            libc::ioctl(
                raw(queue.file.as_fd()),
                libc::TUNSETOFFLOAD as _,
                libc::c_ulong::from(flags),
            )
        };
        if check(set).is_ok() {
            if !missing.is_empty() {
                info!("{missing}");
            }
            return Ok(offloads);
        }
    }
    info!("this kernel's TUN has no TSO: packets come and go one by one");
    Ok(TunOffloads::default())
}

fn set_queue_length(name: &str, packets: u32) -> io::Result<()> {
    let mut request = request_for(name).ok_or(io::ErrorKind::InvalidInput)?;
    request.ifr_ifru.ifru_metric = packets.cast_signed(); // `ifr_qlen` is another name of the same int
    let any_socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: SIOCSIFTXQLEN reads one ifreq with the name and an int, both filled in.
    check(unsafe { libc::ioctl(raw(any_socket.as_fd()), SIOCSIFTXQLEN as _, &mut request) })
        .map(drop)
}

/// From linux/sockios.h; missing from the libc crate.
const SIOCSIFTXQLEN: u32 = 0x8943;

/// An `ifreq` with this name, if it can be one.
fn request_for(name: &str) -> Option<libc::ifreq> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len());
    let clean = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    if !fits || !clean || name == "." || name == ".." {
        return None;
    }
    // SAFETY: an ifreq is a plain C structure; all bits zero is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Some(request)
}

fn kernel(doing: &'static str, name: &str, source: io::Error) -> TunError {
    TunError::Kernel {
        doing,
        name: name.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_interface_can_have_is_refused_before_anything_is_opened() {
        for name in ["", "a/b", "..", "sixteen-letters-", "with space", "a:b"] {
            let error = TunQueue::open(&TunOptions::new(name, 1)).unwrap_err();
            assert!(matches!(error, TunError::Name(_)), "{name}: {error}");
            assert!(error.to_string().contains("1 to 15"), "{error}");
        }
        assert!(request_for("fifteen-letters").is_some());
    }
}
