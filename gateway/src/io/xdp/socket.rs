//! One AF_XDP socket: one queue of one interface, over memory of its own.

use super::{
    super::{check, raw},
    XdpError, failed,
    ring::{Consumer, Producer},
    umem::{MTU_MAX, Umem},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::{
    fs, io, mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread,
    time::Duration,
};

/// Entries of each ring: some milliseconds of traffic at full speed.
const RING: u32 = 2048;
/// Frames: as many for what arrives as for what leaves.
const FRAMES: usize = 2 * RING as usize;
/// Bytes that may wait in the kernel on their way out.
const SEND_BUFFER_BYTES: libc::c_int = 16 << 20;
/// A queue may be taken for a moment after its last owner has gone.
const BUSY_RETRIES: u32 = 40;
const BUSY_WAIT: Duration = Duration::from_millis(50);
/// How often one flush calls the kernel: where it copies, it takes 32 packets a call.
const KICKS_MAX: usize = 2 * FRAMES / 32;
/// XDP_MAX_TX_SKB_BUDGET of Linux 6.18; missing from the libc crate.
const MAX_TX_BUDGET: libc::c_int = 9;

/// One queue's socket.
pub struct XdpSocket {
    // Before the memory: closed first.
    socket: OwnedFd,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    rx: Consumer<libc::xdp_desc>,
    tx: Producer<libc::xdp_desc>,
    umem: Umem,
    /// Frames that nothing leaves from at the moment.
    free: Vec<u64>,
    /// Whether something was added to `tx` since the last flush.
    unflushed: bool,
    queue: u32,
    mtu: usize,
    zero_copy: bool,
    /// What was lost when it was asked last.
    lost: Lost,
}

impl XdpSocket {
    /// Opens a queue of an interface with this number, name and MTU.
    pub fn open(link: u32, interface: &str, mtu: u32, queue: u32) -> Result<Self, XdpError> {
        if mtu as usize > MTU_MAX {
            let interface = interface.to_owned();
            return Err(XdpError::Mtu { interface, mtu });
        }
        let mut zero_copy = true;
        let mut tries = 0;
        loop {
            match Self::try_open(link, mtu as usize, queue, zero_copy) {
                Ok(socket) => return Ok(socket),
                Err((_, error)) if zero_copy && lacks_zero_copy(&error) => zero_copy = false,
                Err((_, error))
                    if error.raw_os_error() == Some(libc::EBUSY) && tries < BUSY_RETRIES =>
                {
                    tries += 1;
                    thread::sleep(BUSY_WAIT);
                }
                Err((doing, error)) => return Err(failed(doing, interface, error)),
            }
        }
    }

    fn try_open(
        link: u32,
        mtu: usize,
        queue: u32,
        zero_copy: bool,
    ) -> Result<Self, (&'static str, io::Error)> {
        let doing = |doing: &'static str| move |error: io::Error| (doing, error);
        let family = AddressFamily::from_raw(libc::AF_XDP as _);
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map_err(|error| ("open a socket", error.into()))?;
        let umem = Umem::new(FRAMES, mtu).map_err(doing("get memory"))?;
        // SAFETY: a plain C structure for which all bits zero is valid.
        let mut region: libc::xdp_umem_reg = unsafe { mem::zeroed() };
        region.addr = umem.start();
        region.len = umem.bytes() as u64;
        region.chunk_size = umem.frame_bytes() as u32;
        let fd = socket.as_fd();
        set(fd, libc::XDP_UMEM_REG, &region).map_err(doing("share memory"))?;
        for ring in [
            libc::XDP_UMEM_FILL_RING,
            libc::XDP_UMEM_COMPLETION_RING,
            libc::XDP_RX_RING,
            libc::XDP_TX_RING,
        ] {
            set(fd, ring, &RING).map_err(doing("make a ring"))?;
        }
        let offsets = offsets(fd).map_err(doing("find the rings"))?;
        // SAFETY: the offsets are the kernel's own for this socket, each ring has RING entries of the type that
        // linux/if_xdp.h gives it, and sides are as there.
        let rings = unsafe {
            (|| {
                let fill = libc::XDP_UMEM_PGOFF_FILL_RING as _;
                let completion = libc::XDP_UMEM_PGOFF_COMPLETION_RING as _;
                Ok((
                    Producer::map(fd, fill, &offsets.fr, RING)?,
                    Consumer::map(fd, completion, &offsets.cr, RING)?,
                    Consumer::map(fd, libc::XDP_PGOFF_RX_RING, &offsets.rx, RING)?,
                    Producer::map(fd, libc::XDP_PGOFF_TX_RING as _, &offsets.tx, RING)?,
                ))
            })()
        };
        let (mut fill, completion, rx, tx) = rings.map_err(doing("map the rings"))?;
        // SAFETY: as for `region`.
        let mut name: libc::sockaddr_xdp = unsafe { mem::zeroed() };
        name.sxdp_family = libc::AF_XDP as _;
        name.sxdp_ifindex = link;
        name.sxdp_queue_id = queue;
        name.sxdp_flags = libc::XDP_USE_NEED_WAKEUP
            | if zero_copy {
                libc::XDP_ZEROCOPY
            } else {
                libc::XDP_COPY
            };
        let frame_bytes = umem.frame_bytes() as u64;
        let mut frames = (0..FRAMES as u64).map(|frame| frame * frame_bytes);
        for frame in frames.by_ref().take(RING as usize) {
            let _ = fill.push(frame); // as many as the ring has room for
        }
        fill.submit();
        let bytes = mem::size_of_val(&name) as libc::socklen_t;
        // SAFETY: the kernel reads a sockaddr_xdp of this length.
        check(unsafe { libc::bind(raw(fd), (&raw const name).cast(), bytes) })
            .map_err(doing("take a queue"))?;
        // Both speed up what works anyway, and older kernels know only the first.
        let _ =
            rustix::net::sockopt::set_socket_send_buffer_size_force(fd, SEND_BUFFER_BYTES as usize);
        let _ = set(fd, MAX_TX_BUDGET, &(RING as libc::c_int));
        Ok(Self {
            free: frames.collect(),
            socket,
            fill,
            completion,
            rx,
            tx,
            umem,
            unflushed: false,
            queue,
            mtu,
            zero_copy,
            lost: Lost::default(),
        })
    }

    /// Which queue it is.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Whether the network card itself reads and writes our memory.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// The largest IP packet it takes.
    pub(super) fn mtu(&self) -> usize {
        self.mtu
    }

    /// Shows each frame that has arrived, at most `limit`, and gives it back to the kernel.
    pub(super) fn receive(&mut self, limit: usize, mut take: impl FnMut(&mut [u8])) -> usize {
        let mut count = 0;
        while count < limit
            && let Some(entry) = self.rx.pop()
        {
            // SAFETY: the kernel has handed us this frame by the ring, and gets it back by `fill` below, behind the use.
            if let Some(frame) = unsafe { self.umem.packet_mut(entry.addr, entry.len as usize) } {
                take(frame);
            }
            // There are as many frames for receipt as the ring has entries, so there is room.
            let _ = self.fill.push(self.umem.frame_of(entry.addr));
            count += 1;
        }
        if count > 0 {
            self.rx.release();
            self.fill.submit();
        }
        // Where the kernel has run out of frames it waits to be called.
        if self.fill.needs_wakeup() && count > 0 {
            self.call(libc::MSG_DONTWAIT, false);
        }
        count
    }

    /// Adds a frame of `bytes` to be sent, which `write` fills; it leaves with [`XdpSocket::flush`]. `false` if
    /// there is no room, not even after the kernel has been called.
    pub(super) fn send(&mut self, bytes: usize, write: impl FnOnce(&mut [u8])) -> bool {
        if self.free.is_empty() {
            self.flush();
        }
        let Some(frame) = self.free.pop() else {
            return false;
        };
        // SAFETY: frames in `free` are ours: never yet handed over, or come back by `completion`.
        let Some(place) = (unsafe { self.umem.packet_mut(frame, bytes) }) else {
            self.free.push(frame);
            return false;
        };
        write(place);
        // SAFETY: all bits zero is a valid entry.
        let mut entry: libc::xdp_desc = unsafe { mem::zeroed() };
        (entry.addr, entry.len) = (frame, bytes as u32);
        if !self.tx.push(entry) {
            self.free.push(frame);
            return false;
        }
        self.unflushed = true;
        true
    }

    /// Shows the kernel all that was added, and lets it send.
    pub(super) fn flush(&mut self) {
        if mem::take(&mut self.unflushed) {
            self.tx.submit();
        }
        let mut kicks = 0;
        while kicks < KICKS_MAX && self.tx.needs_wakeup() && !self.tx.is_drained() {
            kicks += 1;
            // A driver that was woken goes on by itself; the copying kernel sends only during the call.
            if !self.call(libc::MSG_DONTWAIT, true) || self.zero_copy {
                break;
            }
        }
        self.complete();
    }

    fn complete(&mut self) {
        let before = self.free.len();
        while let Some(frame) = self.completion.pop() {
            self.free.push(self.umem.frame_of(frame));
        }
        if self.free.len() > before {
            self.completion.release();
        }
    }

    /// Calls the kernel to send, or to receive. Whether calling again may help.
    fn call(&self, flags: libc::c_int, to_send: bool) -> bool {
        let fd = raw(self.socket.as_fd());
        // SAFETY: no buffer, no address: both calls only wake the driver.
        let result = unsafe {
            if to_send {
                libc::sendto(fd, std::ptr::null(), 0, flags, std::ptr::null(), 0)
            } else {
                let none: *mut u8 = std::ptr::null_mut();
                libc::recvfrom(fd, none.cast(), 0, flags, none.cast(), std::ptr::null_mut())
            }
        };
        // EAGAIN: it has sent its share and there is more, or the driver's ring is full for now. EBUSY: one frame was dropped.
        let again = [Some(libc::EAGAIN), Some(libc::EBUSY)];
        result < 0 && again.contains(&io::Error::last_os_error().raw_os_error())
    }

    /// Frames that the kernel has dropped since the last call. A system call.
    pub(super) fn take_lost(&mut self) -> Lost {
        // SAFETY: all bits zero is a valid value.
        let mut counts: libc::xdp_statistics = unsafe { mem::zeroed() };
        let mut bytes = mem::size_of_val(&counts) as libc::socklen_t;
        // SAFETY: the kernel writes at most `bytes`, the structure's length.
        let got = check(unsafe {
            libc::getsockopt(
                raw(self.socket.as_fd()),
                libc::SOL_XDP,
                libc::XDP_STATISTICS,
                (&raw mut counts).cast(),
                &mut bytes,
            )
        });
        if got.is_err() {
            return Lost::default(); // the counts stay in the kernel: later
        }
        // Not `rx_fill_ring_empty_descs`: how often a frame was looked for in vain, of which `rx_dropped` counts the packets.
        let now = Lost {
            arriving: counts.rx_dropped + counts.rx_ring_full,
            leaving: counts.tx_invalid_descs,
        };
        let before = mem::replace(&mut self.lost, now);
        Lost {
            arriving: now.arriving - before.arriving,
            leaving: now.leaving - before.leaving,
        }
    }
}

/// What the kernel has dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    /// Frames for us: the ring was full, or no frame of ours was free or large enough.
    pub arriving: u64,
    /// Frames of ours that it refused to look at: a bug of ours.
    pub leaving: u64,
}

impl AsFd for XdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// How many receive queues an interface of this thread's network namespace has.
pub fn queues_of(interface: &str) -> u32 {
    // Of the namespace whose /sys is mounted; a thread in another one asks the driver.
    channels(interface).unwrap_or_else(|_| {
        let directory = format!("/sys/class/net/{interface}/queues");
        let names = fs::read_dir(directory).into_iter().flatten().flatten();
        let receives =
            |name: &fs::DirEntry| name.file_name().as_encoded_bytes().starts_with(b"rx-");
        (names.filter(receives).count() as u32).max(1)
    })
}

/// What the driver says of its queues (ETHTOOL_GCHANNELS).
fn channels(interface: &str) -> io::Result<u32> {
    /// From linux/ethtool.h; missing from the libc crate.
    #[repr(C)]
    struct Channels {
        command: u32,
        maxima: [u32; 4],
        rx: u32,
        tx: u32,
        other: u32,
        combined: u32,
    }
    const GCHANNELS: u32 = 0x3c;
    let mut channels = Channels {
        command: GCHANNELS,
        maxima: [0; 4],
        rx: 0,
        tx: 0,
        other: 0,
        combined: 0,
    };
    // SAFETY: an ifreq is a plain C structure; all bits zero is a valid one.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(interface.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut channels).cast();
    let any_socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    // SAFETY: SIOCETHTOOL with this command writes one ethtool_channels, which `ifru_data` points to.
    check(unsafe {
        libc::ioctl(
            raw(any_socket.as_fd()),
            libc::SIOCETHTOOL as _,
            &mut request,
        )
    })?;
    match channels.rx + channels.combined {
        0 => Err(io::ErrorKind::Unsupported.into()),
        count => Ok(count),
    }
}

fn lacks_zero_copy(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::EPROTONOSUPPORT)
    )
}

fn set<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &T) -> io::Result<()> {
    let bytes = mem::size_of::<T>() as libc::socklen_t;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the kernel reads `bytes`, the value's own length.
    check(unsafe { libc::setsockopt(raw(socket), libc::SOL_XDP, option, value, bytes) }).map(drop)
}

fn offsets(socket: BorrowedFd<'_>) -> io::Result<libc::xdp_mmap_offsets> {
    // SAFETY: all bits zero is a valid value.
    let mut offsets: libc::xdp_mmap_offsets = unsafe { mem::zeroed() };
    let mut bytes = mem::size_of_val(&offsets) as libc::socklen_t;
    let place = (&raw mut offsets).cast();
    // SAFETY: the kernel writes at most `bytes`, the structure's length.
    check(unsafe {
        libc::getsockopt(
            raw(socket),
            libc::SOL_XDP,
            libc::XDP_MMAP_OFFSETS,
            place,
            &mut bytes,
        )
    })?;
    if bytes as usize != mem::size_of_val(&offsets) {
        // A kernel before 5.4 has no need_wakeup.
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(offsets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        io::xdp::{Steering, Taken},
        netlink::Netlink,
    };
    use std::collections::BTreeMap;

    /// Nobody takes frames out: the ring fills, and what comes then is lost but counted.
    #[test]
    fn what_a_full_ring_has_no_room_for_is_counted() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let story = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let (mut from, mut to, _steering) = linked();
            let mut lost = Lost::default();
            let mut sent = 0;
            while lost.arriving == 0 {
                assert!(sent < 10 * RING, "{sent} frames, and none is lost");
                let write = |frame: &mut [u8]| frame.copy_from_slice(&FRAME);
                sent += u32::from(from.send(FRAME.len(), write));
                from.flush();
                lost = to.take_lost();
            }
            let mut arrived = 0;
            to.receive(usize::MAX, |frame| {
                assert_eq!(frame, FRAME);
                arrived += 1;
            });
            assert_eq!(arrived, RING);
            // Some may yet be on their way, but each is counted once.
            let later = to.take_lost().arriving;
            assert!(u64::from(RING) + lost.arriving + later <= sent.into());
            assert!(from.send(0, |_| ()), "an entry that is none");
            from.flush();
            assert_eq!(from.take_lost().leaving, 1);
        };
        thread::spawn(story).join().unwrap();
    }

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
    /// To [`MAC`], IPv4, to 10.2.0.2.
    const FRAME: [u8; 60] = {
        let mut frame = [0; 60];
        (frame[0], frame[5], frame[6]) = (MAC[0], MAC[5], 2);
        (frame[12], frame[14], frame[17], frame[22]) = (8, 0x45, 46, 64);
        (frame[30], frame[31], frame[33]) = (10, 2, 2);
        frame
    };

    /// Sockets on both ends of a pair of interfaces.
    fn linked() -> (XdpSocket, XdpSocket, Steering) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let [one, two] = runtime.block_on(async {
            let netlink = Netlink::open().unwrap();
            netlink.add_veth_pair("one", "two").await.unwrap();
            let mut links = [0; 2];
            for (link, name) in links.iter_mut().zip(["one", "two"]) {
                *link = netlink.link_index(name).await.unwrap();
                netlink.set_quiet(*link).await.unwrap();
                netlink.set_up(*link).await.unwrap();
            }
            links
        });
        let mut steering = Steering::attach("two", two, Taken::Inner { mac: MAC }).unwrap();
        let from = XdpSocket::open(one, "one", 1500, 0).unwrap();
        let to = XdpSocket::open(two, "two", 1500, 0).unwrap();
        steering.add_socket(0, &to).unwrap();
        let taken = BTreeMap::from([("10.2.0.0/16".parse().unwrap(), 1500)]);
        steering.set_networks(&taken).unwrap();
        (from, to, steering)
    }
}
