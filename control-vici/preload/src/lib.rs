//! Mode B's library in charon's process, loaded by `LD_PRELOAD`: its NETLINK_XFRM sockets lead to Esplane.
//!
//! ```text
//!   kernel-netlink ─ socket, bind, sendto, recvfrom ─▶ here ─▶ the kernel, for every other socket
//!                                                       │
//!                       one end of a pair of sockets ◀──┘
//!                               other end ─ broker.rs (a thread) ═ unix socket ═ Esplane
//! ```
//!
//! charon's end never ends and never becomes readable without a message, whatever becomes of
//! Esplane: there is nothing to spin on. `broker.rs` connects anew, and keeps what Esplane asks it
//! to keep, so that a restarted Esplane finds every SA again.
//!
//! Only this file has `unsafe`: it stands in for functions of the C library. Each passes its arguments
//! on unless the socket is one of ours.

#![allow(unsafe_code)]

mod broker;
mod frame;

use libc::{c_char, c_int, c_void, size_t, sockaddr, sockaddr_nl, socklen_t, ssize_t};
use std::{mem, os::fd::RawFd, ptr, slice, sync::OnceLock};

/// The C library's own function of that name and type, which this library stands in front of.
///
/// `None` where there is none, which no C library lets happen.
macro_rules! real {
    ($name:literal, fn($($argument:ty),*) -> $result:ty) => {{
        type Function = unsafe extern "C" fn($($argument),*) -> $result;
        static FOUND: OnceLock<Option<Function>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // SAFETY: dlsym takes a handle of its own and a text that ends in zero.
            let found = unsafe { libc::dlsym(libc::RTLD_NEXT, $name.as_ptr().cast::<c_char>()) };
            if found.is_null() {
                return None;
            }
            // SAFETY: a function of this name has this type in every C library (POSIX, and the
            // signatures in <sys/socket.h>); it is not null.
            Some(unsafe { mem::transmute::<*mut c_void, Function>(found) })
        })
    }};
}

fn fail<T: From<i8>>(errno: c_int) -> T {
    // SAFETY: the C library's errno of this thread is always there to be written.
    unsafe { *libc::__errno_location() = errno };
    T::from(-1)
}

/// `socket(2)`.
///
/// # Safety
/// None needed: no pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    if domain == libc::AF_NETLINK && protocol == libc::NETLINK_XFRM {
        return broker::open()
            .unwrap_or_else(|error| fail(error.raw_os_error().unwrap_or(libc::ENOBUFS)));
    }
    match real!(c"socket", fn(c_int, c_int, c_int) -> c_int) {
        // SAFETY: the caller's arguments, unchanged.
        Some(real) => unsafe { real(domain, kind, protocol) },
        None => fail(libc::ENOSYS),
    }
}

/// `bind(2)`: of ours, subscribes to what the address names.
///
/// # Safety
/// As for `bind(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bind(fd: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    if broker::is_ours(fd) {
        if address.is_null() || (length as usize) < mem::size_of::<sockaddr_nl>() {
            return fail(libc::EINVAL);
        }
        // SAFETY: not null, and the caller says that so many bytes are there; read without a demand
        // on their alignment.
        let address = unsafe { ptr::read_unaligned(address.cast::<sockaddr_nl>()) };
        broker::subscribe(fd, address.nl_groups);
        return 0;
    }
    match real!(c"bind", fn(c_int, *const sockaddr, socklen_t) -> c_int) {
        // SAFETY: the caller's arguments, unchanged.
        Some(real) => unsafe { real(fd, address, length) },
        None => fail(libc::ENOSYS),
    }
}

/// `setsockopt(2)`: of ours, `NETLINK_ADD_MEMBERSHIP` subscribes; other options of netlink's are
/// taken without effect.
///
/// # Safety
/// As for `setsockopt(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: socklen_t,
) -> c_int {
    if level == libc::SOL_NETLINK && broker::is_ours(fd) {
        if name == libc::NETLINK_ADD_MEMBERSHIP
            && !value.is_null()
            && length as usize >= mem::size_of::<c_int>()
        {
            // SAFETY: not null, and the caller says that so many bytes are there; read without a
            // demand on their alignment.
            let group = unsafe { ptr::read_unaligned(value.cast::<u32>()) };
            if (1..=32).contains(&group) {
                broker::subscribe(fd, 1 << (group - 1));
            }
        }
        return 0;
    }
    match real!(
        c"setsockopt",
        fn(c_int, c_int, c_int, *const c_void, socklen_t) -> c_int
    ) {
        // SAFETY: the caller's arguments, unchanged.
        Some(real) => unsafe { real(fd, level, name, value, length) },
        None => fail(libc::ENOSYS),
    }
}

/// `sendto(2)`: of ours, without the address: there is only one who could be meant.
///
/// # Safety
/// As for `sendto(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendto(
    fd: c_int,
    bytes: *const c_void,
    count: size_t,
    flags: c_int,
    address: *const sockaddr,
    length: socklen_t,
) -> ssize_t {
    let (address, length) = if broker::is_ours(fd) {
        (ptr::null(), 0)
    } else {
        (address, length)
    };
    match real!(
        c"sendto",
        fn(c_int, *const c_void, size_t, c_int, *const sockaddr, socklen_t) -> ssize_t
    ) {
        // SAFETY: the caller's arguments; no address at all is allowed where a socket has a peer.
        Some(real) => unsafe { real(fd, bytes, count, flags, address, length) },
        None => fail(libc::ENOSYS),
    }
}

/// `recvfrom(2)`: of ours, as if from the kernel (port 0): whatever says otherwise is ignored by charon.
///
/// # Safety
/// As for `recvfrom(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvfrom(
    fd: c_int,
    bytes: *mut c_void,
    count: size_t,
    flags: c_int,
    address: *mut sockaddr,
    length: *mut socklen_t,
) -> ssize_t {
    let Some(real) = real!(
        c"recvfrom",
        fn(c_int, *mut c_void, size_t, c_int, *mut sockaddr, *mut socklen_t) -> ssize_t
    ) else {
        return fail(libc::ENOSYS);
    };
    if !broker::is_ours(fd) {
        // SAFETY: the caller's arguments, unchanged.
        return unsafe { real(fd, bytes, count, flags, address, length) };
    }
    // SAFETY: the caller's buffer; no address is asked for.
    let got = unsafe { real(fd, bytes, count, flags, ptr::null_mut(), ptr::null_mut()) };
    if got >= 0 && !address.is_null() && !length.is_null() {
        // SAFETY: not null, and the caller says that `*length` bytes are there to be written.
        unsafe {
            let room = (*length as usize).min(mem::size_of::<sockaddr_nl>());
            let whole = slice::from_raw_parts_mut(address.cast::<u8>(), room);
            whole.fill(0);
            let family = (libc::AF_NETLINK as libc::sa_family_t).to_ne_bytes();
            whole
                .iter_mut()
                .zip(family)
                .for_each(|(byte, value)| *byte = value);
            *length = mem::size_of::<sockaddr_nl>() as socklen_t;
        }
    }
    got
}

/// What a fortified build calls in place of `recvfrom`.
///
/// # Safety
/// As for `recvfrom(2)`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __recvfrom_chk(
    fd: c_int,
    bytes: *mut c_void,
    count: size_t,
    room: size_t,
    flags: c_int,
    address: *mut sockaddr,
    length: *mut socklen_t,
) -> ssize_t {
    // The check that the compiler could not make.
    if count > room {
        std::process::abort();
    }
    // SAFETY: the caller's arguments; `count` fits.
    unsafe { recvfrom(fd, bytes, count, flags, address, length) }
}

/// Runs it with every signal blocked: threads begun meanwhile leave charon's signals to charon.
fn without_signals<T>(run: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are this function's own, filled before they are read.
    unsafe {
        let (mut all, mut before) = (mem::zeroed(), mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let result = run();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        result
    }
}

/// What no other open file has: its device and its number there. `None` if it is not open.
fn identity(fd: RawFd) -> Option<(u64, u64)> {
    // SAFETY: zeros are a `stat`; fstat writes one, and tells if it could not.
    unsafe {
        let mut found: libc::stat = mem::zeroed();
        (libc::fstat(fd, &mut found) == 0).then_some((found.st_dev, found.st_ino))
    }
}
