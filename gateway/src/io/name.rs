//! Socket addresses as the kernel has them.

use std::{
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
};

/// A socket address as Rust has it; IPv4-mapped ones become IPv4.
pub(super) fn address_from(name: &libc::sockaddr_storage) -> SocketAddr {
    let name = std::ptr::from_ref(name);
    // SAFETY: a sockaddr_storage is large enough and aligned for either family's structure, and every bit
    // pattern is a valid one.
    let (family, v4, v6) = unsafe {
        (
            libc::c_int::from((*name).ss_family),
            &*name.cast::<libc::sockaddr_in>(),
            &*name.cast::<libc::sockaddr_in6>(),
        )
    };
    match family {
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            let port = u16::from_be(v6.sin6_port);
            match IpAddr::V6(ip).to_canonical() {
                IpAddr::V4(ip) => SocketAddrV4::new(ip, port).into(),
                // A link-local peer is reached through its interface only.
                IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into(),
            }
        }
        _ => {
            let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
            SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into()
        }
    }
}

/// Writes an address for a socket of family AF_INET6 or not; answers its length.
pub(super) fn address_into(
    name: &mut libc::sockaddr_storage,
    address: SocketAddr,
    ipv6: bool,
) -> usize {
    let name = std::ptr::from_mut(name);
    match address {
        SocketAddr::V4(address) if !ipv6 => {
            let value = libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: address.port().to_be(),
                sin_addr: in_address(*address.ip()),
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room and alignment for a sockaddr_in.
            unsafe { name.cast::<libc::sockaddr_in>().write(value) };
            mem::size_of::<libc::sockaddr_in>()
        }
        address => {
            let (ip, scope) = match address {
                SocketAddr::V4(address) => (address.ip().to_ipv6_mapped(), 0),
                SocketAddr::V6(address) => (*address.ip(), address.scope_id()),
            };
            let value = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: ip.octets(),
                },
                sin6_scope_id: scope,
            };
            // SAFETY: a sockaddr_storage has room and alignment for a sockaddr_in6.
            unsafe { name.cast::<libc::sockaddr_in6>().write(value) };
            mem::size_of::<libc::sockaddr_in6>()
        }
    }
}

/// An IPv4 address.
pub(super) fn in_address(address: Ipv4Addr) -> libc::in_addr {
    libc::in_addr {
        s_addr: u32::from_ne_bytes(address.octets()),
    }
}
