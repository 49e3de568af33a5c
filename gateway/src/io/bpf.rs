//! Three things of bpf(2): maps, programs, links. Each goes with its descriptor; nothing is pinned, so nothing stays
//! behind, whatever becomes of this process.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

// linux/bpf.h; missing from the libc crate.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const PROG_LOAD: libc::c_int = 5;
#[cfg(test)]
const PROG_TEST_RUN: libc::c_int = 10;
const LINK_CREATE: libc::c_int = 28;
const ATTACH_XDP: u32 = 37;

/// Kinds of maps.
#[derive(Clone, Copy)]
pub(super) enum MapKind {
    /// Sockets by queue.
    Sockets = 17,
    /// Networks, longest prefix first.
    Networks = 11,
}

/// A map lets its entries be made as they come.
const NO_PREALLOC: u32 = 1;
/// Bytes of `union bpf_attr` that any call here uses.
const ATTRIBUTES: usize = 80;

/// A map from keys to values of 32 bits.
#[derive(Debug)]
pub(super) struct Map(OwnedFd);

impl Map {
    pub(super) fn create(kind: MapKind, key_bytes: u32, entries: u32) -> io::Result<Self> {
        let mut call = Call::default();
        let flags = match kind {
            MapKind::Sockets => 0,
            MapKind::Networks => NO_PREALLOC,
        };
        for (at, value) in [
            (0, kind as u32),
            (4, key_bytes),
            (8, 4),
            (12, entries),
            (16, flags),
        ] {
            call.number(at, value);
        }
        // SAFETY: creating a map reads the attributes alone.
        unsafe { call.descriptor(MAP_CREATE) }.map(Self)
    }

    /// Sets one entry; `key` must be as long as the map was made for.
    pub(super) fn set(&self, key: &[u8], value: u32) -> io::Result<()> {
        let value = value.to_ne_bytes();
        let mut call = Call::default();
        call.number(0, self.0.as_raw_fd() as u32);
        call.pointer(8, key.as_ptr());
        call.pointer(16, value.as_ptr());
        // SAFETY: the kernel reads the key (its length by contract) and four bytes of value; both outlive the call.
        unsafe { call.make(MAP_UPDATE_ELEM) }.map(drop)
    }

    /// Removes one entry.
    pub(super) fn remove(&self, key: &[u8]) -> io::Result<()> {
        let mut call = Call::default();
        call.number(0, self.0.as_raw_fd() as u32);
        call.pointer(8, key.as_ptr());
        // SAFETY: the kernel reads the key, which outlives the call.
        unsafe { call.make(MAP_DELETE_ELEM) }.map(drop)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a program is for.
#[derive(Clone, Copy)]
pub(super) enum ProgramKind {
    /// Looks at packets and answers with a number.
    SocketFilter = 1,
    /// Steers frames at an interface.
    Xdp = 6,
}

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Program {
    /// Loads it; with the error comes what the verifier said.
    pub(super) fn load(
        kind: ProgramKind,
        code: &[u8],
        name: &str,
    ) -> Result<Self, (io::Error, String)> {
        let licence = c"Apache-2.0"; // calls no GPL-only helper
        let mut log = vec![0u8; 1 << 16];
        let load = |log: &mut [u8]| {
            let mut call = Call::default();
            call.number(0, kind as u32);
            call.number(4, (code.len() / 8) as u32);
            call.pointer(8, code.as_ptr());
            call.pointer(16, licence.as_ptr().cast());
            if !log.is_empty() {
                call.number(24, 1);
                call.number(28, log.len() as u32);
                call.pointer(32, log.as_mut_ptr());
            }
            // BPF_OBJ_NAME_LEN, with its zero at the end.
            let name = &name.as_bytes()[..name.len().min(15)];
            call.0[48..48 + name.len()].copy_from_slice(name);
            // SAFETY: code, licence and log live through the call and are as long as it says; only the log is written.
            unsafe { call.descriptor(PROG_LOAD) }
        };
        load(&mut []).map(Self).map_err(|error| {
            let _ = load(&mut log); // again, for the verifier's words
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            (error, String::from_utf8_lossy(&log[..end]).into_owned())
        })
    }

    /// Attaches an XDP program to an interface, for as long as the answer lives.
    pub(super) fn attach(&self, link: u32, flags: u32) -> io::Result<OwnedFd> {
        let mut call = Call::default();
        for (at, value) in [
            (0, self.0.as_raw_fd() as u32),
            (4, link),
            (8, ATTACH_XDP),
            (12, flags),
        ] {
            call.number(at, value);
        }
        // SAFETY: creating a link to an interface reads the attributes alone.
        unsafe { call.descriptor(LINK_CREATE) }
    }

    /// Runs it once over a frame; its answer.
    #[cfg(test)]
    pub(super) fn run(&self, frame: &[u8]) -> io::Result<u32> {
        let mut call = Call::default();
        call.number(0, self.0.as_raw_fd() as u32);
        call.number(8, frame.len() as u32);
        call.pointer(16, frame.as_ptr());
        call.number(32, 1);
        // SAFETY: the kernel reads the frame, which outlives the call, and writes the attributes alone.
        unsafe { call.make(PROG_TEST_RUN) }?;
        Ok(u32::from_ne_bytes([
            call.0[4], call.0[5], call.0[6], call.0[7],
        ]))
    }
}

/// One call's attributes.
#[repr(C, align(8))]
struct Call([u8; ATTRIBUTES]);

impl Default for Call {
    fn default() -> Self {
        Self([0; ATTRIBUTES])
    }
}

impl Call {
    fn number(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn pointer(&mut self, at: usize, value: *const u8) {
        self.0[at..at + 8].copy_from_slice(&(value as u64).to_ne_bytes());
    }

    /// # Safety
    /// Every pointer among the attributes must be good for what the command does with it.
    unsafe fn make(&mut self, command: libc::c_int) -> io::Result<libc::c_long> {
        // SAFETY: by the caller's promise; the attributes themselves are this value's, of the length given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                self.0.as_mut_ptr(),
                mem::size_of::<Self>(),
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    }

    /// # Safety
    /// As for [`Call::make`], and the command must be one that answers with a new descriptor.
    unsafe fn descriptor(&mut self, command: libc::c_int) -> io::Result<OwnedFd> {
        // SAFETY: by the caller's promise; the descriptor is new, so nobody else owns it.
        unsafe {
            self.make(command)
                .map(|new| OwnedFd::from_raw_fd(new as libc::c_int))
        }
    }
}
