//! Flows stay with their queue of a TUN.
//!
//! By itself the kernel moves a flow to the queue that its answers were last written to: from one worker to another in the
//! middle of a transfer, where packets overtake each other. And all flows of one peer end up with the worker that its ESP
//! reaches. `tun_queue.bpf` spreads flows over the workers instead, and leaves each where it is.

use super::{
    assembly::assemble,
    bpf::{Program, ProgramKind},
    check, raw,
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

/// From linux/if_tun.h; missing from the libc crate.
const TUNSETSTEERINGEBPF: u32 = 0x8004_54e0;

/// Attaches the program to the interface that `queue` is of; it goes with the interface.
pub(super) fn attach(queue: BorrowedFd<'_>) -> io::Result<()> {
    let program = load()?;
    let descriptor = program.as_fd().as_raw_fd();
    // SAFETY: TUNSETSTEERINGEBPF reads an int, which lives through the call; the interface keeps the program itself.
    check(unsafe { libc::ioctl(raw(queue), TUNSETSTEERINGEBPF as _, &descriptor) }).map(drop)
}

fn load() -> io::Result<Program> {
    let code = assemble(include_str!("tun_queue.bpf"), &[]).map_err(io::Error::other)?;
    Program::load(ProgramKind::SocketFilter, &code, "esplane_tun").map_err(|(error, _)| error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn v4(protocol: u8, from: [u8; 4], to: [u8; 4], ports: [u16; 2], fragment: u16) -> Vec<u8> {
        let mut packet = vec![0; 20];
        (packet[0], packet[9]) = (0x45, protocol);
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[12..16].copy_from_slice(&from);
        packet[16..20].copy_from_slice(&to);
        finish(packet, ports)
    }

    fn v6(from: u8, to: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        (packet[0], packet[6], packet[23], packet[39]) = (0x60, 6, from, to);
        finish(packet, ports)
    }

    fn finish(mut packet: Vec<u8>, ports: [u16; 2]) -> Vec<u8> {
        packet.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
        packet.extend([0; 30]);
        packet
    }

    #[test]
    fn a_flow_has_one_queue_both_ways_and_flows_are_spread() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let program = load().unwrap();
        // The kernel takes off what it takes for an Ethernet header.
        let queue = |packet: &[u8]| program.run(&[&[0; 14], packet].concat()).unwrap();
        let (here, there) = ([10, 1, 0, 2], [10, 2, 0, 2]);
        let mut seen = BTreeSet::new();
        for port in 40_000..40_064u16 {
            let way = v4(6, here, there, [port, 443], 0x4000);
            let back = v4(6, there, here, [443, port], 0x4000);
            assert_eq!(queue(&way), queue(&back));
            let way6 = v6(1, 2, [port, 443]);
            assert_eq!(queue(&way6), queue(&v6(2, 1, [443, port])));
            seen.extend([queue(&way) % 4, 4 + queue(&way6) % 4]);
        }
        assert_eq!(seen.len(), 8, "64 flows over four queues in both families");
        // Fragments stay together: the later ones have no ports.
        let first = v4(17, here, there, [1, 2], 0x2000);
        let later = v4(17, here, there, [3, 4], 0x00b9);
        assert_eq!(queue(&first), queue(&later));
        assert_eq!(
            queue(&v4(1, here, there, [1, 2], 0)),
            queue(&v4(1, here, there, [3, 4], 0))
        );
        assert_eq!(queue(&[0x10; 60]), 0, "neither IPv4 nor IPv6");
    }
}
