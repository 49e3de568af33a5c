//! Whole batches through `recvmmsg` and `sendmmsg`, straight from and into the batch's arena.
//!
//! ```text
//!   recvmmsg ─▶ message 0: iovec ─▶ frame 0 of the arena    control: TOS, local address
//!               message 1: iovec ─▶ frame 1                 name:    remote address
//!               …
//! ```

use super::{
    check,
    control::{CONTROL_BYTES, Control, read_control, write_control},
    name::{address_from, address_into},
    raw, room_bytes,
};
use esplane_api::{DropCounters, DropReason};
use esplane_dataplane::batch::{Batch, HEADROOM_BYTES, Outer};
use std::{io, mem, net::IpAddr, ops::Range, os::fd::BorrowedFd};

/// Messages per system call.
pub(super) const MESSAGES_MAX: usize = 64;

/// The structures that `recvmmsg` and `sendmmsg` work on, made once.
///
/// The pointers within `headers` and `vectors` mean something only between filling them in and the
/// system call right after it.
pub(super) struct Messages {
    headers: Box<[libc::mmsghdr]>,
    vectors: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
}

// SAFETY: the raw pointers are all that keeps it from being Send by itself; each points into the same
// value's own boxes, which move along unchanged, or into a batch's arena, and is set anew before each use.
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
        }
    }

    /// Lets the kernel write into the spare frames; answers how many were offered and were filled.
    pub(super) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        batch: &mut Batch,
    ) -> (usize, io::Result<usize>) {
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
    pub(super) fn take(
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
        // SAFETY: the kernel has filled in this header's control buffer and its length; the buffer is this value's
        // own and untouched since.
        unsafe { read_control(&self.headers[index].msg_hdr, &mut outer) };
        outer
    }

    /// Describes one message for each packet of `run`. Good for [`Messages::send`] until `batch` changes.
    pub(super) fn prepare_to_send(
        &mut self,
        batch: &Batch,
        run: &[usize],
        ipv6: bool,
        bound: IpAddr,
    ) {
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
            // SAFETY: `point` has just given it a whole `Control` of its own.
            header.msg_controllen = unsafe { write_control(header, outer, bound) } as _;
        }
    }

    /// Sends those messages of the run that are within `range`; answers how many went before the first
    /// that did not.
    ///
    /// # Safety
    /// [`Messages::prepare_to_send`] must have been the last call, for this run, and its batch be unchanged.
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
