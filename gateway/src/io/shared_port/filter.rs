//! Which packets a tap wants, as a classic BPF program that the kernel runs on each.
//!
//! ESP in UDP to one of our addresses and our port: no IKE (its first four bytes are zero, RFC 3948
//! §2.2), no keepalive, nothing in transit.
//!
//! A packet socket's program sees the link header first. Register X is the base of all loads: the
//! header's length where the kind of interface tells it, else the kernel's own idea of where the
//! network header is, which it answers only for what lies in the packet's first memory.

use std::{collections::BTreeSet, net::IpAddr};

/// More than anybody's; beyond, packets to any address come. Programs must stay small for older kernels.
const ADDRESSES_MAX: usize = 64;
/// The kernel's own idea (`SKF_NET_OFF`).
const NETWORK: u32 = -0x10_0000i32 as u32;
/// Ancillary data (`SKF_AD_OFF`): how the packet came (`SKF_AD_PKTTYPE`)…
const PACKET_TYPE: u32 = (-0x1000i32 + 4) as u32;
/// … and by what kind of interface (`SKF_AD_HATYPE`).
const HARDWARE_TYPE: u32 = (-0x1000i32 + 28) as u32;
const ETHERNET_HEADER_BYTES: u32 = 14;
const UDP: u32 = 17;
const IPV6_FRAGMENT: u32 = 44;

/// A program.
pub(super) struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// For IPv4 packets.
    pub(super) fn ipv4(port: u16, addresses: &BTreeSet<IpAddr>) -> Self {
        let mut program = Self(Vec::new());
        let wanted = addresses.iter().filter_map(|address| match address {
            IpAddr::V4(v4) => Some([u32::from(*v4)]),
            IpAddr::V6(_) => None,
        });
        if !program.begin(wanted.collect(), 16) {
            return program;
        }
        program.require_byte(9, UDP);
        // No fragment that nobody has put together (RFC 791 §3.1: more to come, or an offset).
        program.load_half(6);
        program.and(0x3fff);
        program.require(0);
        // From here on X is the UDP header, behind options if need be.
        program.load_byte(0);
        program.and(0x0f);
        program.push(libc::BPF_ALU | libc::BPF_LSH, 2);
        program.push(libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X, 0);
        program.push(libc::BPF_MISC | libc::BPF_TAX, 0);
        program.accept_esp(0, port);
        program
    }

    /// For IPv6 packets without extension headers; of fragments the first, so that they are counted.
    pub(super) fn ipv6(port: u16, addresses: &BTreeSet<IpAddr>) -> Self {
        let mut program = Self(Vec::new());
        let wanted = addresses.iter().filter_map(|address| match address {
            IpAddr::V6(v6) => {
                let words = v6.octets();
                let word = |at| {
                    u32::from_be_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]])
                };
                Some([word(0), word(4), word(8), word(12)])
            }
            IpAddr::V4(_) => None,
        });
        if !program.begin(wanted.collect(), 24) {
            return program;
        }
        let mut fragment = Self(Vec::new());
        fragment.require(IPV6_FRAGMENT);
        fragment.require_byte(40, UDP);
        fragment.load_half(42);
        fragment.and(0xfff8); // the offset (RFC 8200 §4.5)
        fragment.require(0);
        fragment.load_half(48 + 2);
        fragment.require(u32::from(port));
        fragment.accept();
        program.load_byte(6);
        program.jump_if(UDP, fragment.0.len() as u8);
        program.0.extend(fragment.0);
        program.accept_esp(40, port);
        program
    }

    pub(super) fn instructions(&self) -> &[libc::sock_filter] {
        &self.0
    }

    /// To this host, by the network, and to one of the addresses wanted, whose words stand at `at`. `false`
    /// if none is wanted.
    fn begin<const WORDS: usize>(&mut self, wanted: Vec<[u32; WORDS]>, at: u32) -> bool {
        if wanted.is_empty() {
            self.refuse();
            return false;
        }
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, PACKET_TYPE);
        self.require(u32::from(libc::PACKET_HOST));
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, HARDWARE_TYPE);
        self.jump_if(u32::from(libc::ARPHRD_ETHER), 4);
        self.jump_if(u32::from(libc::ARPHRD_LOOPBACK), 3);
        self.jump_if(u32::from(libc::ARPHRD_NONE), 4);
        self.base(NETWORK);
        self.jump(3);
        self.base(ETHERNET_HEADER_BYTES);
        self.jump(1);
        self.base(0);
        if wanted.len() > ADDRESSES_MAX {
            return true;
        }
        let steps = 2 * WORDS as u32 + 1;
        for (index, words) in wanted.iter().enumerate() {
            for (word, value) in words.iter().enumerate() {
                self.load_word(at + 4 * word as u32);
                // Another: on to the next address.
                let next = 2 * (WORDS - 1 - word) as u8 + 1;
                self.0.push(instruction(
                    libc::BPF_JMP | libc::BPF_JEQ,
                    *value,
                    (0, next),
                ));
            }
            // Found: past those behind it, and past the refusal.
            self.jump(steps * (wanted.len() - 1 - index) as u32 + 1);
        }
        self.refuse();
        true
    }

    /// If this is ESP for our port in UDP, whose header starts at `at`.
    fn accept_esp(&mut self, at: u32, port: u16) {
        self.load_half(at + 2);
        self.require(u32::from(port));
        self.load_word(at + 8); // beyond the end of a keepalive: refused by the kernel
        self.0
            .push(instruction(libc::BPF_JMP | libc::BPF_JEQ, 0, (0, 1)));
        self.refuse();
        self.accept();
    }

    fn load_byte(&mut self, at: u32) {
        self.push(libc::BPF_LD | libc::BPF_B | libc::BPF_IND, at);
    }

    fn load_half(&mut self, at: u32) {
        self.push(libc::BPF_LD | libc::BPF_H | libc::BPF_IND, at);
    }

    fn load_word(&mut self, at: u32) {
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_IND, at);
    }

    fn and(&mut self, mask: u32) {
        self.push(libc::BPF_ALU | libc::BPF_AND, mask);
    }

    fn base(&mut self, value: u32) {
        self.push(libc::BPF_LDX | libc::BPF_IMM, value);
    }

    fn jump(&mut self, over: u32) {
        self.push(libc::BPF_JMP | libc::BPF_JA, over);
    }

    fn jump_if(&mut self, value: u32, over: u8) {
        self.0
            .push(instruction(libc::BPF_JMP | libc::BPF_JEQ, value, (over, 0)));
    }

    /// Refuses unless the accumulator is this.
    fn require(&mut self, value: u32) {
        self.jump_if(value, 1);
        self.refuse();
    }

    fn require_byte(&mut self, at: u32, value: u32) {
        self.load_byte(at);
        self.require(value);
    }

    /// The whole packet, however long.
    fn accept(&mut self) {
        self.push(libc::BPF_RET | libc::BPF_K, u32::MAX);
    }

    fn refuse(&mut self) {
        self.push(libc::BPF_RET | libc::BPF_K, 0);
    }

    fn push(&mut self, code: u32, k: u32) {
        self.0.push(instruction(code, k, (0, 0)));
    }
}

fn instruction(code: u32, k: u32, (jt, jf): (u8, u8)) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with it, for packets that are in one piece.
    fn run(filter: &Filter, packet: &[u8], hardware: u32, packet_type: u32) -> bool {
        let (mut a, mut x, mut at) = (0u32, 0u32, 0usize);
        let network = if hardware == 1 { 14 } else { 0 };
        loop {
            let step = filter.0[at];
            at += 1;
            let bytes = match u32::from(step.code) & 0x18 {
                libc::BPF_B => 1,
                libc::BPF_H => 2,
                _ => 4,
            };
            match u32::from(step.code) {
                code if code & 7 == libc::BPF_LD && code & 0xe0 == libc::BPF_ABS => {
                    a = match step.k {
                        PACKET_TYPE => packet_type,
                        HARDWARE_TYPE => hardware,
                        other => panic!("{other:#x}"),
                    }
                }
                code if code & 7 == libc::BPF_LD => {
                    let from = x.wrapping_add(step.k);
                    let from = match from.checked_sub(NETWORK) {
                        Some(behind) => network + behind as usize,
                        None => from as usize,
                    };
                    let Some(loaded) = packet.get(from..from + bytes) else {
                        return false;
                    };
                    a = loaded
                        .iter()
                        .fold(0, |sum, byte| sum << 8 | u32::from(*byte));
                }
                code if code == libc::BPF_LDX | libc::BPF_IMM => x = step.k,
                code if code == libc::BPF_ALU | libc::BPF_AND => a &= step.k,
                code if code == libc::BPF_ALU | libc::BPF_LSH => a <<= step.k,
                code if code == libc::BPF_ALU | libc::BPF_ADD | libc::BPF_X => {
                    a = a.wrapping_add(x)
                }
                code if code == libc::BPF_MISC | libc::BPF_TAX => x = a,
                code if code == libc::BPF_JMP | libc::BPF_JA => at += step.k as usize,
                code if code == libc::BPF_JMP | libc::BPF_JEQ => {
                    at += usize::from(if a == step.k { step.jt } else { step.jf });
                }
                code if code == libc::BPF_RET | libc::BPF_K => return step.k != 0,
                code => panic!("{code:#x}"),
            }
        }
    }

    fn addresses(count: u8) -> BTreeSet<IpAddr> {
        (1..=count)
            .flat_map(|last| {
                let v6 = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
                [IpAddr::from([192, 0, 2, last]), IpAddr::from(v6)]
            })
            .collect()
    }

    fn packet(ipv6: bool, last: u8, port: u16, payload: &[u8], options: usize) -> Vec<u8> {
        let mut packet = if ipv6 {
            let mut header = vec![0; 40];
            (header[0], header[6]) = (0x60, 17);
            header[24..28].copy_from_slice(&[0x20, 1, 0xd, 0xb8]);
            header[39] = last;
            header
        } else {
            let mut header = vec![0; 20 + options];
            (header[0], header[9]) = (0x45 + (options / 4) as u8, 17);
            header[16..20].copy_from_slice(&[192, 0, 2, last]);
            header
        };
        packet.extend([0x11, 0x94]);
        packet.extend(port.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend(payload);
        packet
    }

    fn accepts(ipv6: bool, count: u8, packet: &[u8]) -> bool {
        let (addresses, port) = (addresses(count), 4500);
        let filter = if ipv6 {
            Filter::ipv6(port, &addresses)
        } else {
            Filter::ipv4(port, &addresses)
        };
        let over_ethernet = [&[0; 14][..], packet].concat();
        let verdicts = [
            run(&filter, &over_ethernet, 1, 0),
            run(&filter, packet, 0xfffe, 0), // a TUN, say
            run(&filter, packet, 512, 0),    // PPP: by the kernel's idea
        ];
        assert!(
            verdicts.iter().all(|verdict| *verdict == verdicts[0]),
            "{verdicts:?}"
        );
        // What the card took in by being promiscuous.
        assert!(!run(&filter, &over_ethernet, 1, 3));
        verdicts[0]
    }

    #[test]
    fn esp_to_each_of_our_addresses_comes_and_nothing_else() {
        let esp = [0xc0, 0, 0, 1, 0, 0, 0, 1];
        for ipv6 in [false, true] {
            for count in [1, 2, 64] {
                for last in [1, count, count + 1] {
                    let there = packet(ipv6, last, 4500, &esp, 0);
                    assert_eq!(
                        accepts(ipv6, count, &there),
                        last <= count,
                        "{ipv6} {count} {last}"
                    );
                }
            }
            // More addresses than the program shall have: all of them.
            assert!(accepts(ipv6, 65, &packet(ipv6, 200, 4500, &esp, 0)));
            assert!(!accepts(ipv6, 0, &packet(ipv6, 1, 4500, &esp, 0)));
            assert!(!accepts(ipv6, 1, &packet(ipv6, 1, 4501, &esp, 0)));
            assert!(
                !accepts(ipv6, 1, &packet(ipv6, 1, 4500, &[0, 0, 0, 0, 9, 9], 0)),
                "IKE"
            );
            assert!(
                !accepts(ipv6, 1, &packet(ipv6, 1, 4500, &[0xff], 0)),
                "a keepalive"
            );
            let mut tcp = packet(ipv6, 1, 4500, &esp, 0);
            tcp[if ipv6 { 6 } else { 9 }] = 6;
            assert!(!accepts(ipv6, 1, &tcp));
        }
        assert!(
            accepts(false, 1, &packet(false, 1, 4500, &esp, 8)),
            "behind IPv4 options"
        );
    }

    #[test]
    fn of_fragments_only_the_first_of_ipv6_comes_to_be_counted() {
        let esp = [0xc0, 0, 0, 1];
        let mut v4 = packet(false, 1, 4500, &esp, 0);
        v4[6] = 0x20;
        assert!(!accepts(false, 1, &v4));
        let mut v6 = packet(true, 1, 4500, &esp, 0);
        v6[6] = 44;
        v6.splice(40..40, [17, 0, 0, 1, 0, 0, 0, 7]);
        assert!(accepts(true, 1, &v6));
        v6[42] = 5;
        assert!(!accepts(true, 1, &v6));
    }
}
