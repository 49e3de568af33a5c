//! A ring between us and the kernel: one writes entries, the other reads them, and each tells how far it is.

use super::super::raw;
use std::{
    io,
    marker::PhantomData,
    os::fd::BorrowedFd,
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

/// One ring as it lies in memory.
struct Ring<T> {
    mapping: *mut u8,
    bytes: usize,
    producer: *const AtomicU32,
    consumer: *const AtomicU32,
    flags: *const AtomicU32,
    entries: *mut T,
    size: u32,
    /// How far we are.
    ours: u32,
    /// How far the kernel was when we last looked.
    theirs: u32,
    owns: PhantomData<T>,
}

// SAFETY: the mapping is this value's alone; what it shares with the kernel are atomics and entries, and each entry
// belongs to one side at a time, as those say.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    /// # Safety
    /// `offsets` must be what the kernel has said of the ring at `page` of this socket, which has `size` entries of type `T`.
    unsafe fn map(
        socket: BorrowedFd<'_>,
        page: libc::off_t,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let bytes = offsets.desc as usize + size as usize * size_of::<T>();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a fresh mapping of the socket's ring, wherever the kernel likes.
        let mapping =
            unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind, raw(socket), page) };
        if mapping == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = mapping.cast::<u8>();
        // SAFETY: by the caller's promise the kernel has made the ring so; all four lie within `bytes`, aligned.
        unsafe {
            Ok(Self {
                mapping,
                bytes,
                producer: mapping.add(offsets.producer as usize).cast(),
                consumer: mapping.add(offsets.consumer as usize).cast(),
                flags: mapping.add(offsets.flags as usize).cast(),
                entries: mapping.add(offsets.desc as usize).cast(),
                size,
                ours: 0,
                theirs: 0,
                owns: PhantomData,
            })
        }
    }

    fn slot(&self) -> *mut T {
        // SAFETY: the index is below `size`, a power of two, and so within the entries.
        unsafe { self.entries.add((self.ours & (self.size - 1)) as usize) }
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: within the mapping, aligned, and only ever used as an atomic by both sides.
        unsafe { &*self.producer }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { &*self.consumer }
    }

    fn flags(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { &*self.flags }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference into it outlives a call.
        unsafe { libc::munmap(self.mapping.cast(), self.bytes) };
    }
}

/// A ring that we fill.
pub(super) struct Producer<T>(Ring<T>);

impl<T: Copy> Producer<T> {
    /// # Safety
    /// As for [`Ring::map`], of a ring that user space fills.
    pub(super) unsafe fn map(
        socket: BorrowedFd<'_>,
        page: libc::off_t,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        // SAFETY: the same promise.
        unsafe { Ring::map(socket, page, offsets, size).map(Self) }
    }

    /// Adds an entry, which the kernel sees after [`Producer::submit`]. `false` if the ring is full.
    #[must_use]
    pub(super) fn push(&mut self, entry: T) -> bool {
        let ring = &mut self.0;
        if ring.ours.wrapping_sub(ring.theirs) == ring.size {
            ring.theirs = ring.consumer().load(Ordering::Acquire);
            if ring.ours.wrapping_sub(ring.theirs) == ring.size {
                return false;
            }
        }
        // SAFETY: the slot is ours: the kernel has read what was there, as its index says.
        unsafe { ring.slot().write(entry) };
        ring.ours = ring.ours.wrapping_add(1);
        true
    }

    /// Shows the kernel all that was added.
    pub(super) fn submit(&mut self) {
        self.0.producer().store(self.0.ours, Ordering::Release);
    }

    /// Whether the kernel has read all that it was shown.
    pub(super) fn is_drained(&self) -> bool {
        self.0.consumer().load(Ordering::Acquire) == self.0.ours
    }

    /// Whether the kernel sleeps until it is called.
    pub(super) fn needs_wakeup(&self) -> bool {
        self.0.flags().load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// A ring that the kernel fills.
pub(super) struct Consumer<T>(Ring<T>);

impl<T: Copy> Consumer<T> {
    /// # Safety
    /// As for [`Ring::map`], of a ring that the kernel fills.
    pub(super) unsafe fn map(
        socket: BorrowedFd<'_>,
        page: libc::off_t,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        // SAFETY: the same promise.
        unsafe { Ring::map(socket, page, offsets, size).map(Self) }
    }

    /// The next entry, if any.
    pub(super) fn pop(&mut self) -> Option<T> {
        let ring = &mut self.0;
        if ring.ours == ring.theirs {
            ring.theirs = ring.producer().load(Ordering::Acquire);
            if ring.ours == ring.theirs {
                return None;
            }
        }
        // SAFETY: the kernel has written this entry before it moved its index past it, and `T` is what it writes.
        let entry = unsafe { ring.slot().read() };
        ring.ours = ring.ours.wrapping_add(1);
        Some(entry)
    }

    /// Gives the kernel back the slots of all entries taken.
    pub(super) fn release(&mut self) {
        self.0.consumer().store(self.0.ours, Ordering::Release);
    }
}
