//! Memory that packets share with the kernel, cut into frames of one size.

use esplane_dataplane::Memory;
use std::{io, ptr, ptr::NonNull, sync::Arc};

/// What the kernel keeps free before a packet it has received (XDP_PACKET_HEADROOM), and behind one for its own use. The
/// former holds all headers that we write before it, the latter what ESP writes behind it.
const KERNEL_BYTES: usize = 256 + 320;
/// Ethernet, and one VLAN tag to be on the safe side.
const LINK_BYTES: usize = 18;
/// A frame is a page at most.
const FRAME_BYTES_MAX: usize = 4096;
/// The largest MTU whose packets fit into a frame.
pub(super) const MTU_MAX: usize = FRAME_BYTES_MAX - KERNEL_BYTES - LINK_BYTES;

/// The memory of one worker's sockets and batches. Frames belong to the kernel or to a batch, as rings and stock say.
#[derive(Debug)]
pub(super) struct Umem {
    start: NonNull<u8>,
    bytes: usize,
    frame_bytes: usize,
}

// SAFETY: the mapping is this value's alone; what reaches into it are batches, each into its own frames.
unsafe impl Send for Umem {}
// SAFETY: as above; the value itself is never changed.
unsafe impl Sync for Umem {}

impl Umem {
    /// So many frames, for packets of up to `mtu` bytes, that is at most [`MTU_MAX`].
    pub(super) fn new(frames: usize, mtu: usize) -> io::Result<Self> {
        let frame_bytes = (mtu + LINK_BYTES + KERNEL_BYTES)
            .next_power_of_two()
            .clamp(2048, FRAME_BYTES_MAX);
        let bytes = frames * frame_bytes;
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a fresh anonymous mapping, wherever the kernel likes.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            start,
            bytes,
            frame_bytes,
        })
    }

    pub(super) fn start(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn frame_bytes(&self) -> usize {
        self.frame_bytes
    }

    /// For a batch to lie over.
    ///
    /// # Safety
    /// Of two batches over it, each must have frames of its own, and the kernel must be given only frames that a batch has
    /// lent or of which a packet was taken, each until it is given back.
    pub(super) unsafe fn memory(self: &Arc<Self>) -> Memory {
        let bytes = NonNull::slice_from_raw_parts(self.start, self.bytes);
        // SAFETY: zeros at first, mapped as long as the keeper lives, and each frame used by its owner alone, as promised.
        unsafe { Memory::lent(bytes, Box::new(Arc::clone(self))) }
    }
}

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; batches and sockets keep the value, so none is left, and where the kernel
        // still uses pages, it keeps them itself.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
