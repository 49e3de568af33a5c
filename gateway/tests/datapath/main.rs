//! Drivers and workers against the real kernel: two gateways in network namespaces of their own.
//!
//! ```text
//!   namespace a                                                   namespace b
//!   10.1.0.1   ┌─ worker 0 ─┐  192.0.2.1           192.0.2.2  ┌─ worker 0 ─┐   10.2.0.1
//!   fd00:1::1 ─┤ TUN    ESP ├─ 2001:db8::1 ═veth═ 2001:db8::2 ┤ ESP    TUN ├─ fd00:2::1
//!       esp0   └─ worker 1 ─┘     link                link    └─ worker 1 ─┘   esp0
//! ```
//!
//! Needs root. Without it every story says so and is counted as skipped; this program has its own
//! `main` because the usual test harness cannot say that.

mod site;
mod traffic;

use esplane_api::{DropCounters, DropReason, SaEvent};
use esplane_dataplane::Batch;
use esplane_gateway::{
    io::{Driver, RawEsp, RawReceive, TunError, TunOptions, TunQueue},
    netlink::Netlink,
    worker::ToControl,
};
use site::{Encapsulation, Family, Sites, namespace, within};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    io,
    net::{SocketAddr, UdpSocket},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

type Story = fn();

const STORIES: [(&str, Story); 22] = [
    ("esp_in_udp_over_ipv4_carries_everything", || {
        carries_everything(Encapsulation::Udp, Family::V4)
    }),
    ("esp_in_udp_over_ipv6_carries_everything", || {
        carries_everything(Encapsulation::Udp, Family::V6)
    }),
    ("plain_esp_over_ipv4_carries_everything", || {
        carries_everything(Encapsulation::Plain, Family::V4)
    }),
    ("plain_esp_over_ipv6_carries_everything", || {
        carries_everything(Encapsulation::Plain, Family::V6)
    }),
    (
        "esp_beside_the_owner_of_its_port_carries_everything",
        || carries_everything(Encapsulation::Beside, Family::V4),
    ),
    (
        "esp_beside_the_owner_of_its_port_over_ipv6_carries_everything",
        || carries_everything(Encapsulation::Beside, Family::V6),
    ),
    (
        "bulk_tcp_beside_the_owner_of_the_port_arrives_whole",
        || bulk_arrives(Encapsulation::Beside, [true, true]),
    ),
    (
        "bulk_tcp_beside_the_owner_of_the_port_without_offloads",
        || bulk_arrives(Encapsulation::Beside, [false, true]),
    ),
    (
        "fragments_beside_the_owner_of_the_port_are_put_together",
        || fragments_arrive(Encapsulation::Beside),
    ),
    (
        "ike_stays_with_the_owner_of_the_port",
        ike_stays_with_its_owner,
    ),
    ("bulk_tcp_arrives_whole_with_offloads", || {
        bulk_arrives(Encapsulation::Udp, [true, true])
    }),
    ("bulk_tcp_arrives_whole_without_offloads", || {
        bulk_arrives(Encapsulation::Udp, [false, false])
    }),
    ("bulk_tcp_arrives_whole_with_offloads_on_one_side", || {
        bulk_arrives(Encapsulation::Plain, [true, false])
    }),
    (
        "datagrams_of_a_sender_with_gso_arrive_as_sent",
        datagrams_arrive_as_sent,
    ),
    (
        "packets_longer_than_the_way_out_leave_singly_in_fragments",
        || fragments_arrive(Encapsulation::Udp),
    ),
    (
        "a_full_buffer_of_plain_esp_tells_no_peer_that_nobody_is_here",
        a_full_buffer_is_silent,
    ),
    (
        "the_first_packets_wait_for_the_first_sa",
        the_first_packets_wait,
    ),
    (
        "a_tun_that_is_deleted_ends_its_workers_with_a_word",
        a_deleted_tun_is_told,
    ),
    (
        "a_name_taken_by_another_kind_of_link_is_refused",
        a_taken_name_is_refused,
    ),
    (
        "an_interface_of_another_daemon_is_not_shared",
        another_daemon_is_not_joined,
    ),
    (
        "a_packet_larger_than_a_frame_is_counted",
        a_large_packet_is_counted,
    ),
    (
        "packets_that_the_tun_has_no_room_for_are_counted",
        a_full_tun_is_counted,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments
        .iter()
        .filter(|word| !word.starts_with('-'))
        .collect();
    let wanted = STORIES
        .iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|part| name.contains(*part)));
    if arguments.iter().any(|word| word == "--list") {
        wanted.for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let root = rustix::process::geteuid().is_root();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, story) in wanted {
        let outcome = if !root {
            skipped += 1;
            "skipped: needs root"
        } else if catch_unwind(AssertUnwindSafe(story)).is_ok() {
            passed += 1;
            "ok"
        } else {
            failed += 1;
            "FAILED"
        };
        println!("test {name} ... {outcome}");
    }
    println!("\ntest result: {passed} passed; {failed} failed; {skipped} skipped");
    ExitCode::from(u8::from(failed > 0))
}

/// Numbered UDP datagrams of all sizes in several flows and pings, inner IPv4 and IPv6: all arrive, and
/// the counters of both ends agree to the packet.
fn carries_everything(encapsulation: Encapsulation, family: Family) {
    let mut sites = Sites::start(encapsulation, family);
    sites.install_sas();
    let echoed = traffic::echo_numbered_datagrams(&sites, 4, 500);
    let pinged = traffic::ping(&sites, 20);
    let packets = (echoed + pinged) as u64;
    let Sites { a, b } = sites;
    let (a, b) = (a.stop(), b.stop());
    for (here, there) in [(a, b), (b, a)] {
        // Each echo and each pong is one packet each way.
        assert_eq!(here.inner_received.packets, packets, "{here:?}");
        assert_eq!(here.outer_sent.packets, packets, "{here:?}");
        assert_eq!(there.outer_received.packets, packets, "{there:?}");
        assert_eq!(here.outer_sent.bytes, there.outer_received.bytes);
        assert_eq!(there.inner_sent, here.inner_received);
        assert_eq!(here.drops.unexpected(), 0, "{here:?}");
    }
}

/// TCP in both families, several connections each way at once: every byte arrives, and no packet is lost
/// between the interfaces.
fn bulk_arrives(encapsulation: Encapsulation, offloads: [bool; 2]) {
    let mut sites = Sites::start_with(encapsulation, Family::V4, offloads);
    sites.install_sas();
    traffic::bulk(&sites, &[Family::V4, Family::V6], 3, 2_000_000);
    nothing_is_lost(sites);
}

/// What one side has received from its network, the other has sent to its own.
fn nothing_is_lost(sites: Sites) {
    let arrived = sites.a.waits_until(|a| {
        let b = sites.b.snapshot();
        (a.inner_received, b.inner_received) == (b.inner_sent, a.inner_sent)
    });
    assert!(
        arrived,
        "a: {:?}\nb: {:?}",
        sites.a.snapshot(),
        sites.b.snapshot()
    );
    let Sites { a, b } = sites;
    for counters in [a.stop(), b.stop()] {
        assert_eq!(counters.drops.unexpected(), 0, "{counters:?}");
    }
}

/// The kernel hands many datagrams over as one packet; there they are many again, each as it was.
fn datagrams_arrive_as_sent() {
    for offloads in [[true, true], [false, true]] {
        let mut sites = Sites::start_with(Encapsulation::Udp, Family::V6, offloads);
        sites.install_sas();
        traffic::send_segmented(&sites);
        nothing_is_lost(sites);
    }
}

/// What leaves together must fit the MTU; what does not is fragmented, which works one by one only.
fn fragments_arrive(encapsulation: Encapsulation) {
    let mut sites = Sites::start(encapsulation, Family::V4);
    sites.install_sas();
    for site in [&sites.a, &sites.b] {
        site.set_link_mtu(1300);
    }
    // IPv6 has no Don't Fragment bit that the outer header could copy.
    traffic::bulk(&sites, &[Family::V6], 1, 200_000);
    nothing_is_lost(sites);
}

/// IKE and keepalives reach the port's owner as if nobody else were there, and its answers leave; ESP to an address
/// that is none of the tunnels' is nobody's.
fn ike_stays_with_its_owner() {
    for family in [Family::V4, Family::V6] {
        let mut sites = Sites::start(Encapsulation::Beside, family);
        sites.install_sas();
        let echoed = traffic::echo_numbered_datagrams(&sites, 1, 20) as u64;
        let [a, b] = [&sites.a, &sites.b].map(|site| site.charon(family));
        for (message, answer) in [
            (&b"\0\0\0\0ike"[..], &b"\0\0\0\0answer"[..]),
            (b"\xff", b"\xff"),
        ] {
            a.send_to(message, sites.b.outer_socket(family)).unwrap();
            assert_eq!(
                site::next_ike(&b),
                (message.to_vec(), sites.a.outer_socket(family))
            );
            b.send_to(answer, sites.a.outer_socket(family)).unwrap();
            assert_eq!(
                site::next_ike(&a),
                (answer.to_vec(), sites.b.outer_socket(family))
            );
        }
        // The tunnel has moved elsewhere, so what still comes to the old address is not even looked at.
        sites.b.listen_at(&["192.0.2.200", "2001:db8::200"]);
        a.send_to(b"\x11\x11\x11\x11 esp", sites.b.outer_socket(family))
            .unwrap();
        sites.b.listen_at(&["192.0.2.2", "2001:db8::2"]);
        let echoed = echoed + traffic::echo_numbered_datagrams(&sites, 1, 20) as u64;
        let Sites { a, b } = sites;
        for counters in [a.stop(), b.stop()] {
            assert_eq!(counters.outer_received.packets, echoed, "{counters:?}");
            assert_eq!(counters.drops.unexpected(), 0, "{counters:?}");
        }
    }
}

/// More plain ESP than the receiving socket takes: the kernel, which has no ESP of its own here, must not answer
/// with ICMP "protocol unreachable". Without any socket it does, so the sender would notice.
fn a_full_buffer_is_silent() {
    let namespaces = [namespace(), namespace()];
    site::connect(&namespaces).expect("a cable between the namespaces");
    let [here, there] = &namespaces;
    for (family, domain) in [(Family::V4, Domain::IPV4), (Family::V6, Domain::IPV6)] {
        let to = SockAddr::from(SocketAddr::new(site::outer_address(1, family), 0));
        let sender = within(here, || {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(50)))?;
            socket.connect(&to)?;
            socket.set_write_timeout(Some(Duration::from_secs(10)))?;
            Ok::<_, io::Error>(socket)
        });
        let sender = sender.expect("a raw socket");
        let send = |count: usize| {
            for _ in 0..count {
                // A queue that is full for a moment is no matter here.
                let _ = sender.send(&[0xc0; 1200]);
            }
            sender.take_error().expect("the socket's error")
        };
        within(there, || {
            let deaf = RawEsp::open(RawReceive::Everything).expect("raw sockets");
            assert!(send(8000).is_none());
            drop(deaf);
        });
        let start = Instant::now();
        while send(1).is_none() {
            let patience = Duration::from_secs(10);
            assert!(
                start.elapsed() < patience,
                "nobody is there, and nobody says so"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Packets sent before there is an SA wait, and all arrive, in order, once there is one.
fn the_first_packets_wait() {
    let mut sites = Sites::start(Encapsulation::Udp, Family::V4);
    let receiver = traffic::bind(&sites.b, "10.2.0.1:7100");
    let sender = traffic::bind(&sites.a, "10.1.0.1:7100");
    for number in 0..30u8 {
        sender.send_to(&[number], "10.2.0.1:7100").unwrap();
    }
    let event = sites.a.control.blocking_recv();
    assert!(
        matches!(event, Some(ToControl::Event(SaEvent::SaNeeded { .. }))),
        "{event:?}"
    );
    sites.a.wait_until(|counters| counters.held_packets == 30);
    sites.install_sas();
    for number in 30..40u8 {
        sender.send_to(&[number], "10.2.0.1:7100").unwrap();
    }
    for number in 0..40u8 {
        let mut buffer = [0; 8];
        let (bytes, _) = receiver.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..bytes], [number]);
    }
    let Sites { a, b } = sites;
    let (a, b) = (a.stop(), b.stop());
    assert_eq!((a.drops.unexpected(), b.drops.unexpected()), (0, 0));
}

fn a_deleted_tun_is_told() {
    let mut sites = Sites::start(Encapsulation::Udp, Family::V4);
    within(sites.a.namespace(), || {
        site::block_on(async {
            let netlink = Netlink::open().unwrap();
            let tun = netlink.link_index("esp0").await.unwrap();
            netlink.remove_link(tun).await.unwrap();
        });
    });
    let told = sites.a.control.blocking_recv();
    assert!(
        matches!(told, Some(ToControl::WorkerFailed { .. })),
        "{told:?}"
    );
}

fn a_taken_name_is_refused() {
    let alone = namespace();
    within(&alone, || {
        site::block_on(async {
            let netlink = Netlink::open().unwrap();
            netlink.add_veth_pair("esp0", "other").await.unwrap();
        });
        let error = TunQueue::open(&TunOptions::new("esp0", 2)).unwrap_err();
        assert!(matches!(error, TunError::OtherKind(_)), "{error}");
        assert!(error.to_string().contains("ip link delete esp0"), "{error}");
    });
}

fn another_daemon_is_not_joined() {
    let alone = namespace();
    within(&alone, || {
        let first = TunQueue::open(&TunOptions::new("esp%d", 2)).unwrap();
        assert_eq!((first[0].name(), first[1].name()), ("esp0", "esp0"));
        let error = TunQueue::open(&TunOptions::new("esp0", 1)).unwrap_err();
        assert!(matches!(error, TunError::InUse(_)), "{error}");
        drop(first);
        TunQueue::open(&TunOptions::new("esp0", 1)).unwrap();
    });
}

/// An MTU raised behind the daemon's back: such packets are counted, the others pass.
fn a_large_packet_is_counted() {
    let mut sites = Sites::start(Encapsulation::Udp, Family::V4);
    sites.install_sas();
    let receiver = traffic::bind(&sites.b, "10.2.0.1:7200");
    let sender = traffic::bind(&sites.a, "10.1.0.1:7200");
    within(sites.a.namespace(), || {
        site::block_on(async {
            let netlink = Netlink::open().unwrap();
            let tun = netlink.link_index("esp0").await.unwrap();
            netlink.set_mtu(tun, 9000).await.unwrap();
        });
    });
    for bytes in [100, 4000, 200] {
        sender.send_to(&vec![7; bytes], "10.2.0.1:7200").unwrap();
    }
    for bytes in [100, 200] {
        let mut buffer = [0; 8000];
        assert_eq!(receiver.recv_from(&mut buffer).unwrap().0, bytes);
    }
    let counters = sites.a.stop();
    assert_eq!(counters.drops[DropReason::InnerTooBig], 1, "{counters:?}");
    assert_eq!(counters.drops.unexpected(), 1, "{counters:?}");
}

/// Nobody reads, and the queue holds ten: of a hundred packets ninety go, and each is counted once.
fn a_full_tun_is_counted() {
    let alone = namespace();
    within(&alone, || {
        let options = TunOptions {
            queue_packets: 10,
            ..TunOptions::new("esp0", 1)
        };
        let mut queue = TunQueue::open(&options).unwrap().remove(0);
        site::block_on(async {
            let netlink = Netlink::open().unwrap();
            let tun = netlink.link_index("esp0").await.unwrap();
            netlink.set_quiet(tun).await.unwrap();
            netlink.set_up(tun).await.unwrap();
            let here = "10.1.0.1".parse().unwrap();
            netlink.add_address(tun, here, 24).await.unwrap();
        });
        let sender = UdpSocket::bind("10.1.0.1:0").unwrap();
        for _ in 0..100 {
            sender.send_to(b"x", "10.1.0.2:7300").unwrap();
        }
        let mut batch = Batch::new(128, 2048);
        let mut drops = DropCounters::default();
        queue.receive(&mut batch, &mut drops).unwrap();
        queue.count_lost(&mut drops);
        let lost = drops[DropReason::InnerOverrun];
        assert_eq!(
            (batch.len() as u64 + lost, drops.unexpected()),
            (100, lost),
            "{drops:?}"
        );
        assert!(lost > 0);
        queue.count_lost(&mut drops);
        assert_eq!(drops[DropReason::InnerOverrun], lost);
    });
}
