//! Memory that packets share with the kernel, cut into frames of one size.

use std::{io, ptr, ptr::NonNull};

/// What the kernel keeps free before a packet it has received (XDP_PACKET_HEADROOM), and behind one for its own use.
const KERNEL_BYTES: usize = 256 + 320;
/// Ethernet, and one VLAN tag to be on the safe side.
const LINK_BYTES: usize = 18;
/// A frame is a page at most.
const FRAME_BYTES_MAX: usize = 4096;
/// The largest MTU whose packets fit into a frame.
pub(super) const MTU_MAX: usize = FRAME_BYTES_MAX - KERNEL_BYTES - LINK_BYTES;

/// The memory. Frames belong to the kernel or to us, as the rings say; no reference into it outlives a call.
#[derive(Debug)]
pub(super) struct Umem {
    start: NonNull<u8>,
    bytes: usize,
    frame_bytes: usize,
}

// SAFETY: the mapping is this value's alone, and is used through it alone.
unsafe impl Send for Umem {}

impl Umem {
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

    /// The frame in which an address lies.
    pub(super) fn frame_of(&self, address: u64) -> u64 {
        address - address % self.frame_bytes as u64
    }

    /// Bytes of a frame that is ours. `None` if they are not within one.
    ///
    /// # Safety
    /// The kernel must have handed us the frame, and must not get it back while the answer lives.
    pub(super) unsafe fn packet_mut(&mut self, address: u64, bytes: usize) -> Option<&mut [u8]> {
        self.within(address, bytes).then(|| {
            // SAFETY: within the mapping; `&mut self` and the caller's promise keep all others out.
            unsafe {
                std::slice::from_raw_parts_mut(self.start.as_ptr().add(address as usize), bytes)
            }
        })
    }

    fn within(&self, address: u64, bytes: usize) -> bool {
        let offset = (address % self.frame_bytes as u64) as usize;
        address < self.bytes as u64 && offset + bytes <= self.frame_bytes
    }
}

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; the socket that the kernel knows it by is closed by now, or the kernel
        // keeps the pages itself.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
