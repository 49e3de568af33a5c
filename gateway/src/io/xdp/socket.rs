//! One AF_XDP socket: one queue of one interface, over memory that it shares with others.

use super::{
    super::{check, raw},
    Queue,
    ring::{Consumer, Producer},
    umem::Umem,
};
use esplane_dataplane::{Batch, Outer};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::{
    fs, io, mem,
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

/// Entries of each ring: some milliseconds of traffic at full speed.
pub(super) const RING: u32 = 2048;
/// Bytes that may wait in the kernel on their way out.
const SEND_BUFFER_BYTES: libc::c_int = 16 << 20;
/// How often one flush calls the kernel: where it copies, it takes 32 packets a call.
const KICKS_MAX: u32 = 2 * RING / 32;
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
    /// Kept for the kernel.
    _umem: Arc<Umem>,
    /// Frames lent for what arrives, filled or not: at most [`RING`], for then a kernel that finds `rx` full finds none to copy
    /// into either, and has dropped the packet before it copies.
    lent: u32,
    /// Frames on their way out: at most [`RING`].
    in_flight: u32,
    /// Whether something was added to `tx` since the last flush.
    unflushed: bool,
    queue: u32,
    mtu: usize,
    zero_copy: bool,
    /// What was lost when it was asked last.
    lost: Lost,
}

/// How a socket gets at its memory.
#[derive(Clone, Copy)]
pub(super) enum Binding<'a> {
    /// It tells the kernel of it.
    First { zero_copy: bool },
    /// It shares it with one that has done so, and its mode too.
    Sharing {
        with: BorrowedFd<'a>,
        zero_copy: bool,
    },
}

impl XdpSocket {
    /// Opens a queue. An error says what could not be done.
    pub(super) fn open(
        queue: &Queue,
        umem: &Arc<Umem>,
        binding: Binding<'_>,
    ) -> Result<Self, (&'static str, io::Error)> {
        let doing = |doing: &'static str| move |error: io::Error| (doing, error);
        let family = AddressFamily::from_raw(libc::AF_XDP as _);
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map_err(|error| ("open a socket", error.into()))?;
        let fd = socket.as_fd();
        if let Binding::First { .. } = binding {
            // SAFETY: a plain C structure for which all bits zero is valid.
            let mut region: libc::xdp_umem_reg = unsafe { mem::zeroed() };
            region.addr = umem.start();
            region.len = umem.bytes() as u64;
            region.chunk_size = umem.frame_bytes() as u32;
            set(fd, libc::XDP_UMEM_REG, &region).map_err(doing("share memory"))?;
        }
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
        let (fill, completion, rx, tx) = rings.map_err(doing("map the rings"))?;
        let zero_copy = bind(fd, queue, binding).map_err(doing(match binding {
            Binding::First { .. } => "take a queue",
            Binding::Sharing { .. } => "take a queue that shares memory with another (Linux 5.10)",
        }))?;
        // Both speed up what works anyway, and older kernels know only the first.
        let _ =
            rustix::net::sockopt::set_socket_send_buffer_size_force(fd, SEND_BUFFER_BYTES as usize);
        let _ = set(fd, MAX_TX_BUDGET, &(RING as libc::c_int));
        Ok(Self {
            socket,
            fill,
            completion,
            rx,
            tx,
            _umem: Arc::clone(umem),
            lent: 0,
            in_flight: 0,
            unflushed: false,
            queue: queue.number,
            mtu: queue.mtu as usize,
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

    /// Takes the frames that have arrived into the batch, while it has room for packets; `read` looks at each, Ethernet and
    /// all, as in [`Batch::push_lent`]. Answers how many frames had no packet. Then lends the kernel spare frames again.
    pub(super) fn receive(
        &mut self,
        batch: &mut Batch,
        mut read: impl FnMut(&mut [u8]) -> Option<(Range<usize>, Outer)>,
    ) -> usize {
        let mut refused = 0;
        let before = self.lent;
        while batch.len() < batch.capacity()
            && let Some(entry) = self.rx.pop()
        {
            let start = entry.addr as usize;
            let written = start..start.saturating_add(entry.len as usize);
            refused += usize::from(!batch.push_lent(written, &mut read));
            self.lent = self.lent.saturating_sub(1);
        }
        if self.lent < before {
            self.rx.release();
        }
        self.refill(batch);
        refused
    }

    fn refill(&mut self, batch: &mut Batch) {
        let before = self.lent;
        while self.lent < RING
            && let Some(frame) = batch.lend()
        {
            let _always = self.fill.push(frame.start as u64); // it has as many entries
            self.lent += 1;
        }
        if self.lent > before {
            self.fill.submit();
            // Where the kernel has run out of frames it waits to be called.
            if self.fill.needs_wakeup() {
                self.call(libc::MSG_DONTWAIT, false);
            }
        }
    }

    /// Whether one frame more can be sent, be it after the kernel has been called.
    pub(super) fn has_room(&mut self, batch: &mut Batch) -> bool {
        if self.in_flight == RING {
            self.flush(batch);
        }
        self.in_flight < RING
    }

    /// Takes a packet out of the batch, Ethernet and all, to be sent; it leaves with [`XdpSocket::flush`]. `false` if there
    /// is no room, or the batch does not let it go.
    pub(super) fn send(&mut self, batch: &mut Batch, index: usize) -> bool {
        if self.in_flight == RING {
            return false;
        }
        let Some(data) = batch.take(index) else {
            return false;
        };
        // SAFETY: all bits zero is a valid entry.
        let mut entry: libc::xdp_desc = unsafe { mem::zeroed() };
        (entry.addr, entry.len) = (data.start as u64, data.len() as u32);
        if !self.tx.push(entry) {
            let _was_taken = batch.give_back(data.start); // not so: fewer are in flight than it has entries
            return false;
        }
        self.in_flight += 1;
        self.unflushed = true;
        true
    }

    /// Shows the kernel all that was added, and lets it send. What has left comes back to the batch.
    pub(super) fn flush(&mut self, batch: &mut Batch) {
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
        self.complete(batch);
    }

    /// Gives frames that have left back to the batch whose packets they were, and pushes those that have not.
    pub(super) fn reclaim(&mut self, batch: &mut Batch) {
        if self.in_flight > 0 {
            self.flush(batch);
        }
    }

    fn complete(&mut self, batch: &mut Batch) {
        let before = self.in_flight;
        while let Some(frame) = self.completion.pop() {
            let _was_taken = batch.give_back(frame as usize);
            self.in_flight = self.in_flight.saturating_sub(1);
        }
        if self.in_flight < before {
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

pub(super) fn lacks_zero_copy(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::EPROTONOSUPPORT)
    )
}

/// Binds a socket to its queue. Answers whether the network card itself reads and writes the memory.
fn bind(fd: BorrowedFd<'_>, queue: &Queue, binding: Binding<'_>) -> io::Result<bool> {
    // SAFETY: a plain C structure for which all bits zero is valid.
    let mut name: libc::sockaddr_xdp = unsafe { mem::zeroed() };
    name.sxdp_family = libc::AF_XDP as _;
    name.sxdp_ifindex = queue.link;
    name.sxdp_queue_id = queue.number;
    let zero_copy = match binding {
        Binding::First { zero_copy } => {
            let mode = if zero_copy {
                libc::XDP_ZEROCOPY
            } else {
                libc::XDP_COPY
            };
            name.sxdp_flags = libc::XDP_USE_NEED_WAKEUP | mode;
            zero_copy
        }
        // The kernel gives it the mode of the first.
        Binding::Sharing { with, zero_copy } => {
            name.sxdp_flags = libc::XDP_SHARED_UMEM;
            name.sxdp_shared_umem_fd = raw(with) as u32;
            zero_copy
        }
    };
    let bytes = mem::size_of_val(&name) as libc::socklen_t;
    // SAFETY: the kernel reads a sockaddr_xdp of this length.
    check(unsafe { libc::bind(raw(fd), (&raw const name).cast(), bytes) })?;
    Ok(zero_copy)
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
        io::xdp::{Steering, Taken, WorkerQueues},
        netlink::Netlink,
    };
    use std::{collections::BTreeMap, thread};

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
            to.receive(); // lends the kernel frames
            while lost.arriving == 0 {
                assert!(sent < 10 * RING, "{sent} frames, and none is lost");
                sent += from.send(&FRAME);
                lost = to.socket.take_lost();
            }
            let mut arrived = 0;
            while let received @ 1.. = to.receive() {
                arrived += received;
            }
            assert_eq!(arrived, RING as usize);
            // Some may yet be on their way, but each is counted once.
            let later = to.socket.take_lost().arriving;
            assert!(u64::from(RING) + lost.arriving + later <= sent.into());
            assert_eq!(from.send(&[]), 1, "an entry that is none");
            assert_eq!(from.socket.take_lost().leaving, 1);
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

    /// One end: its socket and the batch that it works with.
    struct End {
        socket: XdpSocket,
        batch: Batch,
    }

    impl End {
        fn open(link: u32, name: &str, sends: bool) -> Self {
            let queue = [Queue {
                interface: name.to_owned(),
                link,
                mtu: 1500,
                number: 0,
            }];
            let mut queues = WorkerQueues::open(&[], &queue, 64, 1400).unwrap();
            let (leaving, arriving) = queues.frames.batches(64);
            Self {
                socket: queues.outer.remove(0),
                batch: if sends { leaving } else { arriving },
            }
        }

        fn send(&mut self, frame: &[u8]) -> u32 {
            self.batch.clear();
            self.socket.reclaim(&mut self.batch);
            assert!(self.batch.push(frame, Outer::NONE));
            let sent = self.socket.send(&mut self.batch, 0);
            self.socket.flush(&mut self.batch);
            sent.into()
        }

        /// How many frames have come.
        fn receive(&mut self) -> usize {
            self.batch.clear();
            let read = |frame: &mut [u8]| {
                assert_eq!(frame, FRAME);
                Some((0..frame.len(), Outer::NONE))
            };
            assert_eq!(self.socket.receive(&mut self.batch, read), 0);
            self.batch.len()
        }
    }

    /// Sockets on both ends of a pair of interfaces.
    fn linked() -> (End, End, Steering) {
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
        let (from, to) = (End::open(one, "one", true), End::open(two, "two", false));
        steering.add_socket(0, &to.socket).unwrap();
        let taken = BTreeMap::from([("10.2.0.0/16".parse().unwrap(), 1500)]);
        steering.set_networks(&taken).unwrap();
        (from, to, steering)
    }
}
