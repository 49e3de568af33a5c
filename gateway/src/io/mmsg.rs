//! Whole batches through `recvmmsg` and `sendmmsg`, straight from and into the batch's arena.
//!
//! ```text
//!   recvmmsg ─▶ message 0: iovec ─▶ frame 0 of the arena    control: TOS, local address
//!               message 1: iovec ─▶ frame 1                 name:    remote address
//!               …
//!   sendmmsg ◀─ message 0: iovec ◀─ packet 0                a message by itself
//!               message 1: iovec ◀─ packet 1   ┐            control: UDP_SEGMENT: neighbours that
//!                          │        packet 2   │            differ in nothing outside go through the
//!                          iovec ◀─ packet 3   ┘            network stack as one (GSO); what lies close together
//!                                                           (1 and 2) is one piece
//! ```

use super::{
    check,
    control::{CONTROL_BYTES, Control, read_control, read_link_header_bytes, write_control},
    name::{address_from, address_into},
    raw, room_bytes,
};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, Outer};
use std::{io, mem, net::IpAddr, ops::Range, os::fd::BorrowedFd};

/// Messages per system call, and packets in them.
pub(super) const MESSAGES_MAX: usize = 128;
/// Packets that may leave as one message: what every kernel with UDP_SEGMENT takes…
const SEGMENTS_MAX: usize = 64;
/// … and their bytes: with the outer headers they must fit into one IP packet's length field.
const SEGMENTS_BYTES_MAX: usize = 65_000;

/// The structures that `recvmmsg` and `sendmmsg` work on, made once.
///
/// The pointers within `headers` and `vectors` mean something only between filling them in and the
/// system call right after it.
pub(super) struct Messages {
    headers: Box<[libc::mmsghdr]>,
    vectors: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    /// How many packets each message to be sent holds.
    segments: Box<[usize]>,
    /// A UDP header before each message, for a raw socket.
    udp: Option<UdpHeaders>,
}

/// UDP headers, from one port.
struct UdpHeaders {
    local_port: u16,
    headers: Box<[[u8; UDP_HEADER_BYTES]]>,
}

const UDP_HEADER_BYTES: usize = 8;

// SAFETY: the raw pointers are all that keeps it from being Send by itself; each points into the same
// value's own boxes (the UDP headers among them), which move along unchanged, or into a batch's arena, and is set anew
// before each use.
unsafe impl Send for Messages {}

impl Messages {
    pub(super) fn new() -> Self {
        // SAFETY: all four are plain C structures for which all bits zero is a valid value (null pointers,
        // lengths of 0).
        let (header, vector, name) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        Self {
            headers: vec![header; MESSAGES_MAX].into_boxed_slice(),
            vectors: vec![vector; MESSAGES_MAX].into_boxed_slice(),
            names: vec![name; MESSAGES_MAX].into_boxed_slice(),
            controls: vec![Control([0; CONTROL_BYTES]); MESSAGES_MAX].into_boxed_slice(),
            segments: vec![0; MESSAGES_MAX].into_boxed_slice(),
            udp: None,
        }
    }

    /// The same for a raw socket of IP protocol 17: each packet gets a UDP header from this port. Its
    /// checksum is zero; IPv6, which needs one, has the kernel fill it in.
    pub(super) fn with_udp_headers(local_port: u16) -> Self {
        let mut messages = Self::new();
        messages.vectors = vec![messages.vectors[0]; 2 * MESSAGES_MAX].into_boxed_slice();
        messages.udp = Some(UdpHeaders {
            local_port,
            headers: vec![[0; UDP_HEADER_BYTES]; MESSAGES_MAX].into_boxed_slice(),
        });
        messages
    }

    /// New ones of the same kind.
    pub(super) fn another(&self) -> Self {
        match &self.udp {
            Some(udp) => Self::with_udp_headers(udp.local_port),
            None => Self::new(),
        }
    }

    /// Lets the kernel write into the spare frames; answers how many were offered and were filled.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        batch: &mut Batch,
    ) -> (usize, io::Result<usize>) {
        let asked = MESSAGES_MAX.min(batch.capacity() - batch.len());
        let result = self.receive_into(socket, batch.spare_frames().take(asked));
        (asked, result)
    }

    /// Lets the kernel write one message into each of the buffers; answers how many it has filled.
    pub(super) fn receive_into<'a>(
        &mut self,
        socket: BorrowedFd<'_>,
        buffers: impl Iterator<Item = &'a mut [u8]>,
    ) -> io::Result<usize> {
        let mut asked = 0;
        for buffer in buffers.take(MESSAGES_MAX) {
            self.vectors[asked] = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let name_bytes = mem::size_of::<libc::sockaddr_storage>();
            self.point(asked, asked..asked + 1, name_bytes, CONTROL_BYTES);
            asked += 1;
        }
        // SAFETY: the first `asked` headers have just been pointed at names, controls and vectors of this
        // value and, through those, at the buffers, which are distinct, being borrowed mutably for all of 'a;
        // all outlive the call, nobody else refers to them during it, and each length given is that of the
        // memory pointed to.
        let result = check(unsafe {
            libc::recvmmsg(
                raw(socket),
                self.headers.as_mut_ptr(),
                asked as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        });
        result.map(|count| count as usize)
    }

    /// The length of a message received.
    pub(super) fn received_bytes(&self, index: usize) -> usize {
        self.headers[index].msg_len as usize
    }

    /// Whether the kernel had to cut a message, or what it says of it.
    pub(super) fn is_truncated(&self, index: usize) -> bool {
        self.headers[index].msg_hdr.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0
    }

    /// Takes the first `arrived` messages into the batch.
    pub(super) fn take(
        &self,
        arrived: usize,
        batch: &mut Batch,
        drops: &mut DropCounters,
        udp: bool,
        finish: &impl Fn(&mut Batch, usize),
    ) {
        let mut skipped = 0;
        let room = room_bytes(batch);
        for (index, message) in self.headers[..arrived].iter().enumerate() {
            let bytes = message.msg_len as usize;
            if message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 || bytes > room {
                drops.add(DropReason::ReceiveTruncated, 1);
                skipped += 1;
                continue;
            }
            // Behind a truncated packet the others move up one frame; rare, so they may be copied.
            if skipped > 0 {
                batch.move_up(skipped, bytes);
            }
            let (outer, _alone) = self.outer_of(index, udp);
            batch.push_received(bytes, outer);
            finish(batch, batch.len() - 1);
        }
    }

    /// The outer side of a message received and, if it holds several datagrams, their size.
    pub(super) fn outer_of(&self, index: usize, udp: bool) -> (Outer, Option<usize>) {
        let remote = address_from(&self.names[index]);
        let mut outer = Outer {
            remote,
            udp,
            ..Outer::NONE
        };
        // SAFETY: the kernel has filled in this header's control buffer and its length, or the header was never
        // used and says that it has none; the buffer is this value's own and untouched since.
        let segment = unsafe { read_control(&self.headers[index].msg_hdr, &mut outer) };
        (outer, segment)
    }

    /// How many bytes of link header a packet socket has put before a packet, where it says so.
    pub(super) fn link_header_bytes(&self, index: usize) -> Option<usize> {
        // SAFETY: as in `outer_of`.
        unsafe { read_link_header_bytes(&self.headers[index].msg_hdr) }
    }

    /// Describes the packets of `run` (at most [`MESSAGES_MAX`]) as messages, several packets in one where
    /// `gather` allows. Answers how many messages; good for [`Messages::send`] until `batch` changes.
    pub(super) fn prepare_to_send(
        &mut self,
        batch: &Batch,
        run: &[usize],
        ipv6: bool,
        bound: IpAddr,
        gather: bool,
    ) -> usize {
        let (mut message, mut at) = (0, 0);
        while let Some(first) = run.get(at) {
            let gather = gather && self.udp.is_none();
            let count = if gather { alike(batch, &run[at..]) } else { 1 };
            let packet = &batch.packets()[*first];
            let outer = batch.outer_of(packet);
            let mut remote = outer.remote;
            let vectors = match &mut self.udp {
                Some(udp) => {
                    let header = &mut udp.headers[message];
                    *header = udp_header(udp.local_port, remote.port(), packet.data_bytes());
                    remote.set_port(0); // a raw socket takes it for the protocol
                    let vectors = 2 * message..2 * message + 2;
                    self.vectors[vectors.start] = vector(header);
                    self.vectors[vectors.start + 1] = vector(batch.data(*first));
                    vectors
                }
                None => {
                    let mut end = at;
                    for index in &run[at..at + count] {
                        let next = vector(batch.data(*index));
                        // Packets that lie close together are one piece to the kernel.
                        match self.vectors[at..end].last_mut() {
                            Some(last) if adjoins(last, &next) => last.iov_len += next.iov_len,
                            _ => {
                                self.vectors[end] = next;
                                end += 1;
                            }
                        }
                    }
                    at..end
                }
            };
            let name_bytes = address_into(&mut self.names[message], remote, ipv6);
            self.point(message, vectors, name_bytes, CONTROL_BYTES);
            let segment = (count > 1).then_some(packet.data_bytes() as u16);
            let header = &mut self.headers[message].msg_hdr;
            // SAFETY: `point` has just given it a whole `Control` of its own.
            let control = unsafe { write_control(header, &outer, bound, segment) };
            header.msg_controllen = control as _;
            self.segments[message] = count;
            (message, at) = (message + 1, at + count);
        }
        message
    }

    /// How many packets each of the messages prepared holds.
    pub(super) fn segments(&self) -> &[usize] {
        &self.segments
    }

    /// Sends those of the prepared messages that are within `range`; answers how many went before the
    /// first that did not.
    ///
    /// # Safety
    /// [`Messages::prepare_to_send`] must have been the last call that changes this value, must have answered at least
    /// `range.end`, and its batch must be unchanged.
    pub(super) unsafe fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        range: Range<usize>,
    ) -> io::Result<usize> {
        let headers = &mut self.headers[range];
        // SAFETY: by the caller's promise all that these headers point to is alive and as long as they say; the
        // kernel only reads the data, and writes `msg_len` alone.
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

    /// Points a header at the name and control of the same index, and at these vectors.
    fn point(
        &mut self,
        index: usize,
        vectors: Range<usize>,
        name_bytes: usize,
        control_bytes: usize,
    ) {
        let header = &mut self.headers[index].msg_hdr;
        let vectors = &mut self.vectors[vectors];
        header.msg_name = std::ptr::from_mut(&mut self.names[index]).cast();
        header.msg_namelen = name_bytes as libc::socklen_t;
        header.msg_iov = vectors.as_mut_ptr();
        header.msg_iovlen = vectors.len() as _;
        header.msg_control = self.controls[index].0.as_mut_ptr().cast();
        header.msg_controllen = control_bytes as _;
        header.msg_flags = 0;
    }
}

/// Where bytes to be sent lie.
fn vector(data: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    }
}

/// Whether `next` starts where `last` ends. Both lie in one batch's arena.
fn adjoins(last: &libc::iovec, next: &libc::iovec) -> bool {
    last.iov_base.addr() + last.iov_len == next.iov_base.addr()
}

fn udp_header(source: u16, destination: u16, payload_bytes: usize) -> [u8; UDP_HEADER_BYTES] {
    let mut header = [0; UDP_HEADER_BYTES];
    header[0..2].copy_from_slice(&source.to_be_bytes());
    header[2..4].copy_from_slice(&destination.to_be_bytes());
    // The dataplane lets no packet pass that IP could not carry.
    let bytes = (UDP_HEADER_BYTES + payload_bytes) as u16;
    header[4..6].copy_from_slice(&bytes.to_be_bytes());
    header
}

/// How many packets from the first of `run` on may leave as one message: all with the same outer side and of
/// the same length, but for the last, which may be shorter.
fn alike(batch: &Batch, run: &[usize]) -> usize {
    let packets = batch.packets();
    let Some((first, rest)) = run.split_first() else {
        return 0;
    };
    let (first, mut count) = (&packets[*first], 1);
    let segment = first.data_bytes();
    let fits = |count: usize| count <= SEGMENTS_MAX && count * segment <= SEGMENTS_BYTES_MAX;
    for index in rest {
        let (packet, bytes) = (&packets[*index], packets[*index].data_bytes());
        if !batch.same_outer(packet, first) || bytes == 0 || bytes > segment || !fits(count + 1) {
            break;
        }
        count += 1;
        if bytes < segment {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Payload lengths and remote ports, and into which messages they go.
    fn messages(packets: &[(usize, u16)]) -> Vec<usize> {
        let mut batch = Batch::new(MESSAGES_MAX, 16_384);
        for (bytes, port) in packets {
            let outer = Outer {
                remote: ([192, 0, 2, 1], *port).into(),
                udp: true,
                ..Outer::NONE
            };
            assert!(batch.push(&vec![0; *bytes], outer));
        }
        let run: Vec<usize> = (0..packets.len()).collect();
        let mut messages = Messages::new();
        let bound = IpAddr::from([0, 0, 0, 0]);
        let count = messages.prepare_to_send(&batch, &run, false, bound, true);
        let alone = Messages::new().prepare_to_send(&batch, &run, false, bound, false);
        assert_eq!(alone, packets.len());
        messages.segments()[..count].to_vec()
    }

    #[test]
    fn neighbours_alike_leave_together_and_a_shorter_one_ends_the_message() {
        assert_eq!(messages(&[(100, 1), (100, 1), (60, 1), (60, 1)]), [3, 1]);
        assert_eq!(messages(&[(60, 1), (100, 1), (100, 1)]), [1, 2]);
        assert_eq!(
            messages(&[(100, 1), (100, 2), (100, 2), (100, 1)]),
            [1, 2, 1]
        );
        assert_eq!(
            messages(&[(100, 1), (0, 1), (0, 1), (100, 1)]),
            [1, 1, 1, 1]
        );
    }

    #[test]
    fn a_message_has_no_more_segments_and_bytes_than_the_kernel_takes() {
        assert_eq!(messages(&[(100, 1); 100]), [64, 36]);
        assert_eq!(messages(&[(1450, 1); 100]), [44, 44, 12]);
        assert_eq!(messages(&[(16_000, 1); 9]), [4, 4, 1]);
    }
}
