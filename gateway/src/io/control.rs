//! Control messages: the TOS byte and the local address of one packet, the segment size of several.

use super::{name::in_address, options::PACKET_AUXDATA};
use esplane_dataplane::batch::Outer;
use std::{
    mem,
    net::{IpAddr, Ipv4Addr},
};

/// Room for the control messages of one message: TOS and local address, of either family, and the
/// size of segments.
pub(super) const CONTROL_BYTES: usize = 192;

/// A control buffer.
#[derive(Clone, Copy)]
#[repr(C, align(8))] // as cmsghdr wants it
pub(super) struct Control(pub(super) [u8; CONTROL_BYTES]);

/// Reads what the kernel says of a message it has delivered. Answers the size of the datagrams if it is made
/// of several.
///
/// # Safety
/// `header` must be as the kernel has filled it in, with its control buffer alive and unchanged.
pub(super) unsafe fn read_control(header: &libc::msghdr, outer: &mut Outer) -> Option<usize> {
    let mut segment = None;
    // SAFETY: the caller's promise; the CMSG macros walk within the length that the kernel has set.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !control.is_null() {
        // SAFETY: `control` came from CMSG_FIRSTHDR or CMSG_NXTHDR and is not null, so it points to a whole
        // cmsghdr within the control buffer, followed by the data its type promises; the reads are unaligned.
        unsafe {
            let data = libc::CMSG_DATA(control);
            match ((*control).cmsg_level, (*control).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_TOS) => outer.tos = data.read(),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    outer.tos = data.cast::<libc::c_int>().read_unaligned() as u8;
                }
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                    outer.local = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes()).into();
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                    outer.local = IpAddr::from(info.ipi6_addr.s6_addr).to_canonical();
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let bytes = data.cast::<libc::c_int>().read_unaligned();
                    segment = usize::try_from(bytes).ok().filter(|bytes| *bytes > 0);
                }
                _ => {}
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    segment
}

/// Reads how many bytes of link header a packet socket has delivered before the IP packet.
///
/// # Safety
/// As for [`read_control`].
pub(super) unsafe fn read_link_header_bytes(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: the caller's promise; the CMSG macros walk within the length that the kernel has set.
    let mut control = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !control.is_null() {
        // SAFETY: `control` is not null, so it points to a whole cmsghdr within the control buffer, followed by
        // the data its type promises; the read is unaligned.
        unsafe {
            let kind = ((*control).cmsg_level, (*control).cmsg_type);
            if kind == (libc::SOL_PACKET, PACKET_AUXDATA) {
                let data = libc::CMSG_DATA(control).cast::<libc::tpacket_auxdata>();
                return Some(usize::from(data.read_unaligned().tp_net));
            }
            control = libc::CMSG_NXTHDR(header, control);
        }
    }
    None
}

/// Writes TOS, the local address where it is not the socket's own, and the size of segments if there are
/// several. Answers the length of it all.
///
/// # Safety
/// `header` must point to [`CONTROL_BYTES`] of control buffer that nobody else uses.
pub(super) unsafe fn write_control(
    header: &libc::msghdr,
    outer: &Outer,
    bound: IpAddr,
    segment: Option<u16>,
) -> usize {
    let tos = libc::c_int::from(outer.tos);
    let with_local = !outer.local.is_unspecified()
        && outer.local != bound
        && outer.local.is_ipv4() == outer.remote.is_ipv4();
    // SAFETY: the caller's promise for the buffer; each value is of the C type that its option takes.
    unsafe {
        let mut writer = ControlWriter::new(header);
        if outer.remote.is_ipv4() {
            writer.push(libc::IPPROTO_IP, libc::IP_TOS, tos);
        } else {
            writer.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, tos);
        }
        match outer.local {
            _ if !with_local => {}
            IpAddr::V4(local) => writer.push(
                libc::IPPROTO_IP,
                libc::IP_PKTINFO,
                libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: in_address(local),
                    ipi_addr: in_address(Ipv4Addr::UNSPECIFIED),
                },
            ),
            IpAddr::V6(local) => writer.push(
                libc::IPPROTO_IPV6,
                libc::IPV6_PKTINFO,
                libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr {
                        s6_addr: local.octets(),
                    },
                    ipi6_ifindex: 0,
                },
            ),
        }
        if let Some(bytes) = segment {
            writer.push(libc::SOL_UDP, libc::UDP_SEGMENT, bytes);
        }
        writer.length
    }
}

/// Lays control messages one behind the other.
struct ControlWriter<'a> {
    header: &'a libc::msghdr,
    next: *mut libc::cmsghdr,
    length: usize,
}

impl<'a> ControlWriter<'a> {
    /// # Safety
    /// `header` must point to a control buffer of `msg_controllen` bytes that nobody else uses.
    unsafe fn new(header: &'a libc::msghdr) -> Self {
        Self {
            header,
            // SAFETY: the caller's promise.
            next: unsafe { libc::CMSG_FIRSTHDR(header) },
            length: 0,
        }
    }

    /// # Safety
    /// `value` must be of the C type that the option takes.
    unsafe fn push<T>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) {
        let bytes = mem::size_of::<T>() as libc::c_uint;
        // SAFETY: CMSG_SPACE and CMSG_LEN compute. `next` lies within the control buffer, and there is room for the message,
        // for this is checked first; the fields of a cmsghdr and the bytes behind it may be written freely.
        unsafe {
            let space = libc::CMSG_SPACE(bytes) as usize;
            if self.next.is_null() || self.length + space > CONTROL_BYTES {
                return;
            }
            (*self.next).cmsg_level = level;
            (*self.next).cmsg_type = kind;
            (*self.next).cmsg_len = libc::CMSG_LEN(bytes) as _;
            libc::CMSG_DATA(self.next)
                .cast::<T>()
                .write_unaligned(value);
            self.length += space;
            self.next = self.header.msg_control.cast::<u8>().add(self.length).cast();
        }
    }
}
