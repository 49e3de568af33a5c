//! Datagrams between sockets on loopback: in order, in messages of many, to the worker they belong to.

use super::*;
use crate::io::poll::{Waker, wait};
use esplane_api::DropReason;
use esplane_dataplane::batch::{HEADROOM_BYTES, TAILROOM_BYTES, Verdict};
use std::{net::UdpSocket, time::Duration};

fn loopback(ip: &str) -> UdpOuter {
    let listen = SocketAddr::new(ip.parse().unwrap(), 0);
    UdpOuter::open_group(listen, 1).unwrap().remove(0)
}

fn to(socket: &UdpOuter, ip: &str) -> Outer {
    Outer {
        remote: SocketAddr::new(ip.parse().unwrap(), socket.port()),
        udp: true,
        ..Outer::NONE
    }
}

fn forward(payloads: &[(&[u8], Outer)]) -> Batch {
    let mut batch = Batch::new(256, 2048);
    for (payload, outer) in payloads {
        assert!(batch.push(payload, *outer));
    }
    for packet in batch.packets_mut() {
        packet.verdict = Verdict::Forward;
    }
    batch
}

/// Receives until `count` packets are there. Loopback loses nothing and is only ever a moment late.
fn receive(socket: &mut UdpOuter, batch: &mut Batch, drops: &mut DropCounters, count: usize) {
    let waker = Waker::new().unwrap();
    loop {
        socket.receive(batch, drops).unwrap();
        if batch.len() >= count {
            return;
        }
        assert!(!batch.is_full(), "{} of {count} fill it", batch.len());
        let patience = Some(Duration::from_secs(10));
        let woken = wait(&waker, &[socket.poll_descriptors()], patience).unwrap();
        assert!(woken.by_driver, "only {} of {count} arrived", batch.len());
    }
}

#[test]
fn what_the_receive_buffer_has_no_room_for_is_counted() {
    let mut socket = loopback("127.0.0.1");
    socket.socket.set_offloads(false); // each packet is a message, and counts
    sockopt::set_socket_recv_buffer_size(socket.as_fd(), 4096).unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..100 {
        // Loopback has delivered, or dropped, before the call returns.
        let sent = sender.send_to(&[7; 1000], ("127.0.0.1", socket.port()));
        assert_eq!(sent.unwrap(), 1000);
    }
    let (mut batch, mut drops) = (Batch::new(256, 2048), DropCounters::default());
    socket.receive(&mut batch, &mut drops).unwrap();
    socket.count_lost(&mut drops);
    let lost = drops[DropReason::OuterOverrun];
    assert!(lost > 0 && drops.unexpected() == lost, "{drops:?}");
    assert_eq!(batch.len() as u64 + lost, 100);
    socket.count_lost(&mut drops);
    assert_eq!(drops[DropReason::OuterOverrun], lost, "each counts once");
}

#[test]
fn tos_and_addresses_travel_in_both_families() {
    // From, to, and what a dual-stack listener says its own address is.
    for (listen, local) in [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "127.0.0.1"),
        ("::", "::1"),
    ] {
        let (mut a, mut b) = (loopback(local), loopback(listen));
        let mut drops = DropCounters::default();
        let there = Outer {
            tos: 0xb9,
            ..to(&b, local)
        };
        let sent = a.transmit(&mut forward(&[(b"there", there)]), &mut drops);
        assert_eq!((sent.packets, sent.bytes), (1, 5), "{listen}");
        let mut got = Batch::new(4, 2048);
        receive(&mut b, &mut got, &mut drops, 1);
        let outer = got.outer_of(&got.packets()[0]);
        assert_eq!(got.data(0), b"there");
        assert_eq!(outer.remote, to(&a, local).remote, "{listen}");
        assert_eq!(outer.local.to_string(), local, "{listen}");
        assert!(outer.udp && outer.tos == 0xb9, "{listen}: {outer:?}");
        // And back from the very address it came to, though the socket is bound to any.
        let back = Outer { tos: 0x03, ..outer };
        b.transmit(&mut forward(&[(b"back", back)]), &mut drops);
        got.clear();
        receive(&mut a, &mut got, &mut drops, 1);
        let outer = got.outer_of(&got.packets()[0]);
        assert_eq!((outer.remote, outer.tos), (to(&b, local).remote, 0x03));
        assert_eq!(drops, DropCounters::default());
    }
}

#[test]
fn a_batch_larger_than_one_system_call_arrives_whole_and_in_order() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    let numbers: Vec<[u8; 2]> = (0..200u16).map(u16::to_be_bytes).collect();
    let there = to(&b, "127.0.0.1");
    // The Don't Fragment bit changes now and then, which splits the run.
    let packets: Vec<(&[u8], Outer)> = numbers
        .iter()
        .enumerate()
        .map(|(index, number)| {
            (
                &number[..],
                Outer {
                    df: index / 50 % 2 == 1,
                    ..there
                },
            )
        })
        .collect();
    let mut drops = DropCounters::default();
    assert_eq!(a.transmit(&mut forward(&packets), &mut drops).packets, 200);
    let mut got = Batch::new(256, 512);
    receive(&mut b, &mut got, &mut drops, 200);
    for (index, number) in numbers.iter().enumerate() {
        assert_eq!(got.data(index), number);
    }
    assert_eq!(drops, DropCounters::default());
}

#[test]
fn gathered_packets_arrive_as_they_would_alone() {
    for offloads in [true, false] {
        let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
        let on = UdpOffloads {
            gso: offloads,
            gro: offloads,
        };
        assert_eq!(
            (a.set_offloads(offloads), b.set_offloads(offloads)),
            (on, on)
        );
        let mut other = loopback("127.0.0.1");
        // Lengths rise and fall; now and then one goes elsewhere, or with another TOS.
        let packets: Vec<(Vec<u8>, Outer)> = (0..250usize)
            .map(|number| {
                let receiver = if number % 23 == 5 { &other } else { &b };
                let outer = Outer {
                    tos: if number % 31 < 28 { 0 } else { 2 },
                    ..to(receiver, "127.0.0.1")
                };
                let bytes = [1000, 1000, 1000, 1000, 1000, 300, 300, 1][number % 8];
                (vec![number as u8; bytes], outer)
            })
            .collect();
        let borrowed: Vec<_> = packets
            .iter()
            .map(|(data, outer)| (&data[..], *outer))
            .collect();
        let mut drops = DropCounters::default();
        let sent = a.transmit(&mut forward(&borrowed), &mut drops);
        let bytes: usize = packets.iter().map(|(data, _)| data.len()).sum();
        assert_eq!((sent.packets, sent.bytes), (250, bytes as u64));
        for receiver in [&mut b, &mut other] {
            let here = to(receiver, "127.0.0.1").remote;
            let expected: Vec<_> = packets.iter().filter(|(_, at)| at.remote == here).collect();
            let mut got = Batch::new(256, 2048);
            receive(receiver, &mut got, &mut drops, expected.len());
            for (index, (data, outer)) in expected.into_iter().enumerate() {
                assert_eq!(
                    (got.data(index), got.outer_of(&got.packets()[index]).tos),
                    (&data[..], outer.tos)
                );
            }
        }
        assert_eq!(drops, DropCounters::default());
    }
}

/// Of 200 datagrams that arrive as few messages: a small batch leaves the rest to the next ones.
#[test]
fn what_a_batch_has_no_room_for_comes_with_the_next_in_order() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    assert!(b.offloads().gro);
    let numbers: Vec<[u8; 64]> = (0..200u8).map(|number| [number; 64]).collect();
    let there = to(&b, "127.0.0.1");
    let packets: Vec<_> = numbers.iter().map(|number| (&number[..], there)).collect();
    let mut drops = DropCounters::default();
    assert_eq!(a.transmit(&mut forward(&packets), &mut drops).packets, 200);
    let mut got = Batch::new(7, 512);
    for expected in numbers.chunks(7) {
        got.clear();
        receive(&mut b, &mut got, &mut drops, expected.len());
        for (index, number) in expected.iter().enumerate() {
            assert_eq!(got.data(index), number);
        }
    }
    got.clear();
    b.receive(&mut got, &mut drops).unwrap();
    assert_eq!((got.len(), drops), (0, DropCounters::default()));
}

#[test]
fn a_batch_takes_no_more_than_it_holds_and_the_rest_waits() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    let mut drops = DropCounters::default();
    let packets = [(&b"x"[..], to(&b, "127.0.0.1")); 10];
    a.transmit(&mut forward(&packets), &mut drops);
    let mut got = Batch::new(4, 512);
    for expected in [4, 4, 2] {
        got.clear();
        receive(&mut b, &mut got, &mut drops, expected);
        assert_eq!(got.len(), expected);
    }
    assert_eq!(drops, DropCounters::default());
}

#[test]
fn a_packet_too_large_for_its_frame_is_counted_and_its_neighbours_live() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    let mut drops = DropCounters::default();
    let there = to(&b, "127.0.0.1");
    let room = 512 - HEADROOM_BYTES - TAILROOM_BYTES;
    let (fits, large) = (vec![1; room], vec![2; room + 1]);
    a.transmit(
        &mut forward(&[
            (&fits, there),
            (&large, there),
            (b"3", there),
            (&large, there),
            (b"5", there),
        ]),
        &mut drops,
    );
    let mut got = Batch::new(8, 512);
    receive(&mut b, &mut got, &mut drops, 3);
    assert_eq!(
        (got.data(0), got.data(1), got.data(2)),
        (&fits[..], &b"3"[..], &b"5"[..])
    );
    assert_eq!(drops[DropReason::ReceiveTruncated], 2);
}

#[test]
fn one_packet_that_cannot_leave_does_not_hold_up_the_others() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    let mut drops = DropCounters::default();
    let there = to(&b, "127.0.0.1");
    // Nobody listens there: the kernel answers with ICMP, which must break nothing.
    let closed = Outer {
        remote: UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap(),
        ..there
    };
    // A socket bound to loopback cannot reach the world.
    let world = Outer {
        remote: "192.0.2.1:4500".parse().unwrap(),
        ..there
    };
    let mut batch = forward(&[(b"1", there), (b"-", world), (b"?", closed), (b"2", there)]);
    let sent = a.transmit(&mut batch, &mut drops);
    assert_eq!(sent.packets, 3);
    assert_eq!(drops[DropReason::TransmitFailed], 1);
    assert_eq!(
        a.transmit(&mut forward(&[(b"3", there)]), &mut drops)
            .packets,
        1
    );
    let mut got = Batch::new(8, 512);
    receive(&mut b, &mut got, &mut drops, 3);
    assert_eq!(
        (got.data(0), got.data(1), got.data(2)),
        (&b"1"[..], &b"2"[..], &b"3"[..])
    );
    // The ICMP error is on its way to `a`; receiving there goes on all the same.
    b.transmit(&mut forward(&[(b"4", to(&a, "127.0.0.1"))]), &mut drops);
    got.clear();
    receive(&mut a, &mut got, &mut drops, 1);
    assert_eq!(got.data(0), b"4");
    assert_eq!(drops.unexpected(), 1);
}

#[test]
fn packets_that_are_not_forwarded_stay_here() {
    let (mut a, mut b) = (loopback("127.0.0.1"), loopback("127.0.0.1"));
    let mut drops = DropCounters::default();
    let mut batch = forward(&[(&b"no"[..], to(&b, "127.0.0.1")); 3]);
    batch.packets_mut()[0].verdict = Verdict::Drop(DropReason::NoPolicy);
    batch.packets_mut()[1].verdict = Verdict::Pending;
    assert_eq!(a.transmit(&mut batch, &mut drops).packets, 1);
    let mut got = Batch::new(8, 512);
    receive(&mut b, &mut got, &mut drops, 1);
    assert_eq!((got.len(), drops.unexpected()), (1, 0));
}

#[test]
fn an_sa_stays_with_its_worker_from_wherever_it_comes() {
    let listen = "127.0.0.1:0".parse().unwrap();
    let mut group = UdpOuter::open_group(listen, 3).unwrap();
    let mut drops = DropCounters::default();
    for spi in 0x1000..0x1009u32 {
        let worker = &mut group[spi as usize % 3];
        for _ in 0..2 {
            let mut peer = loopback("127.0.0.1");
            let packet = spi.to_be_bytes();
            peer.transmit(
                &mut forward(&[(&packet, to(worker, "127.0.0.1"))]),
                &mut drops,
            );
            let mut got = Batch::new(4, 512);
            receive(worker, &mut got, &mut drops, 1);
            assert_eq!(got.data(0), packet);
        }
    }
    let mut peer = loopback("127.0.0.1");
    peer.transmit(
        &mut forward(&[(b"\xff", to(&group[0], "127.0.0.1"))]),
        &mut drops,
    );
    let mut got = Batch::new(4, 512);
    receive(&mut group[0], &mut got, &mut drops, 1);
    assert_eq!(
        (got.data(0), drops),
        (&b"\xff"[..], DropCounters::default())
    );
}

#[test]
fn a_port_that_is_taken_is_refused_even_if_it_would_be_shared() {
    let listen: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let group = UdpOuter::open_group(listen, 2).unwrap();
    assert_eq!(group[0].port(), group[1].port());
    let taken = SocketAddr::new(listen.ip(), group[0].port());
    let error = UdpOuter::open_group(taken, 1).err().unwrap().to_string();
    assert!(error.contains(&taken.to_string()), "{error}");
    assert!(error.contains("another program has this port"), "{error}");
    drop(group);
    assert!(UdpOuter::open_group(taken, 2).is_ok());
}

#[test]
fn an_address_of_another_machine_is_refused_with_what_would_be_right() {
    let error = UdpOuter::open_group("192.0.2.77:0".parse().unwrap(), 1)
        .err()
        .unwrap();
    assert!(error.to_string().contains("[::]"), "{error}");
}
