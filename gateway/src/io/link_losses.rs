//! What an interface has thrown away on its way to us: packets for which the queues of a TUN had no room.
//!
//! The kernel counts them per interface and tells only over netlink (RTM_GETSTATS, Linux 4.7). So one queue asks for all.

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netdevice, recv, send,
    socket_with,
};
use std::{io, os::fd::OwnedFd};

// linux/rtnetlink.h, linux/netlink.h, linux/if_link.h
const RTM_NEWSTATS: u16 = 92;
const RTM_GETSTATS: u16 = 94;
const NLM_F_REQUEST: u16 = 1;
const IFLA_STATS_LINK_64: u16 = 1;
/// A netlink header, and an if_stats_msg behind it.
const HEADERS_BYTES: usize = 16 + 12;
/// Where `tx_dropped` is in a rtnl_link_stats64: the eighth of its numbers.
const TX_DROPPED_AT: usize = 7 * 8;

/// Tells what one interface has thrown away.
#[derive(Debug)]
pub(super) struct LinkLosses {
    /// Of the network namespace in which the interface is.
    socket: OwnedFd,
    request: [u8; HEADERS_BYTES],
    before: u64,
}

impl LinkLosses {
    /// Of the interface of this name in this thread's network namespace, from now on.
    pub(super) fn of(name: &str) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // No protocol: NETLINK_ROUTE is 0.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        let index = netdevice::name_to_index(&socket, name)?;
        let mut losses = Self {
            socket,
            request: request(index),
            before: 0,
        };
        losses.before = losses.ask()?;
        Ok(losses)
    }

    /// How many packets since the last call; a super-packet counts once.
    pub(super) fn take(&mut self) -> u64 {
        let Ok(now) = self.ask() else {
            return 0; // they stay in the kernel: later
        };
        now.saturating_sub(std::mem::replace(&mut self.before, now))
    }

    /// As many since the interface was made. The kernel has answered before it returns from the question.
    fn ask(&self) -> io::Result<u64> {
        send(&self.socket, &self.request, SendFlags::empty())?;
        let mut answer = [0; 512];
        let (bytes, _) = recv(&self.socket, &mut answer, RecvFlags::empty())?;
        tx_dropped(&answer[..bytes]).ok_or(io::ErrorKind::Unsupported.into())
    }
}

fn request(index: u32) -> [u8; HEADERS_BYTES] {
    let mut message = [0; HEADERS_BYTES];
    message[0..4].copy_from_slice(&(HEADERS_BYTES as u32).to_ne_bytes());
    message[4..6].copy_from_slice(&RTM_GETSTATS.to_ne_bytes());
    message[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message[20..24].copy_from_slice(&index.to_ne_bytes());
    let which = 1u32 << (IFLA_STATS_LINK_64 - 1);
    message[24..28].copy_from_slice(&which.to_ne_bytes());
    message
}

/// `None` if the answer is an error, or lacks it.
fn tx_dropped(answer: &[u8]) -> Option<u64> {
    let u16_at = |bytes: &[u8], at: usize| {
        let two = bytes.get(at..)?.first_chunk()?;
        Some(u16::from_ne_bytes(*two))
    };
    if u16_at(answer, 4)? != RTM_NEWSTATS {
        return None;
    }
    let mut attributes = answer.get(HEADERS_BYTES..)?;
    loop {
        let bytes = usize::from(u16_at(attributes, 0)?);
        if bytes < 4 {
            return None;
        }
        if u16_at(attributes, 2)? == IFLA_STATS_LINK_64 {
            let number = attributes.get(..bytes)?.get(4 + TX_DROPPED_AT..)?;
            return Some(u64::from_ne_bytes(*number.first_chunk()?));
        }
        attributes = attributes.get(bytes.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_behind_other_attributes_and_errors_have_none() {
        let mut answer = request(7).to_vec();
        answer[4..6].copy_from_slice(&RTM_NEWSTATS.to_ne_bytes());
        let padding = [4u16, 0].map(u16::to_ne_bytes);
        answer.extend(padding.as_flattened());
        let head = [4 + 24 * 8, IFLA_STATS_LINK_64].map(u16::to_ne_bytes);
        answer.extend(head.as_flattened());
        answer.extend((100..124u64).flat_map(u64::to_ne_bytes));
        assert_eq!(tx_dropped(&answer), Some(107));
        for bytes in 0..answer.len() {
            assert_eq!(tx_dropped(&answer[..bytes]), None, "{bytes}");
        }
        answer[4] = 2; // NLMSG_ERROR
        assert_eq!(tx_dropped(&answer), None);
    }

    #[test]
    fn the_kernel_says_it_of_the_loopback_interface() {
        let mut losses = LinkLosses::of("lo").unwrap();
        assert_eq!(losses.take(), 0);
        assert!(LinkLosses::of("no-such-link").is_err());
    }
}
