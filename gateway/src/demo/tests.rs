//! The topology and the generators without a tunnel: the Internet is given routes to the private
//! networks, and what the kernel forwards must be counted exactly.

use super::{
    topology::{A, B, Topology, configure},
    traffic::{Ends, Stop, ping::Pinger, tcp::TcpBulk, udp::UdpStream},
    wiretap::Wiretap,
};
use std::{sync::Arc, thread::sleep, time::Duration};

const A_TO_B: fn() -> Ends = || Ends {
    from: A.host(false),
    to: B.host(false),
};
const B_TO_A: fn() -> Ends = || Ends {
    from: B.host(false),
    to: A.host(false),
};

/// The machines, or nothing without root.
fn topology() -> Option<Topology> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return None;
    }
    Some(Topology::build().unwrap())
}

/// Routes for the private networks through the Internet.
fn forward_in_clear(topology: &Topology) {
    for site in [A, B] {
        configure(&topology.internet, async |netlink| {
            let network = site.network(false);
            netlink.add_route_via(network, site.endpoint()).await
        })
        .unwrap();
    }
}

#[test]
fn plain_forwarding_loses_nothing_and_the_wiretap_reads_all_of_it() {
    let Some(topology) = topology() else { return };
    forward_in_clear(&topology);
    let wiretap = Wiretap::start(&topology).unwrap();
    let stop = Arc::new(Stop::default());
    let (h1, h2) = (&topology.h1, &topology.h2);
    let ping = Pinger::start(h1, A_TO_B(), 50, u64::MAX, stop.clone()).unwrap();
    let udp = UdpStream::start(h1, h2, A_TO_B(), stop.clone()).unwrap();
    let back = UdpStream::start(h2, h1, B_TO_A(), stop.clone()).unwrap();
    let tcp = TcpBulk::start(h1, h2, A_TO_B(), stop.clone()).unwrap();
    sleep(Duration::from_secs(2));
    stop.stop();

    let (ping, udp, back) = (
        ping.finish().unwrap(),
        udp.finish().unwrap(),
        back.finish().unwrap(),
    );
    let tcp = tcp.finish().unwrap();
    println!("{ping:?}\n{udp:?}\n{back:?}\n{tcp:?}");
    assert!(ping.is_perfect() && udp.is_perfect() && back.is_perfect() && tcp.is_perfect());
    let wire = wiretap.finish().unwrap();
    println!("{wire:?}");
    assert!(wire.clear_packets > 0 && !wire.is_perfect());
}

#[test]
fn what_the_network_loses_is_reported() {
    let Some(topology) = topology() else { return };
    forward_in_clear(&topology);
    let stop = Arc::new(Stop::default());
    let (h1, h2) = (&topology.h1, &topology.h2);
    let ping = Pinger::start(h1, A_TO_B(), 50, u64::MAX, stop.clone()).unwrap();
    let udp = UdpStream::start(h1, h2, A_TO_B(), stop.clone()).unwrap();
    while udp.progress().1 < 100 || ping.progress().1 < 5 {
        sleep(Duration::from_millis(5));
    }
    // The way is gone until more has been sent than received.
    let route = (B.network(false), B.endpoint());
    configure(&topology.internet, async |netlink| {
        netlink.remove_route_via(route.0, route.1).await
    })
    .unwrap();
    let (lost_from, pings) = (udp.progress().1, ping.progress().0);
    while udp.progress().0 < lost_from + 50 || ping.progress().0 < pings + 3 {
        sleep(Duration::from_millis(5));
    }
    forward_again(&topology);
    stop.stop();
    let (ping, udp) = (ping.finish().unwrap(), udp.finish().unwrap());
    println!("{ping:?}\n{udp:?}");
    assert!(!udp.is_perfect() && udp.received >= 100 && udp.received < udp.sent);
    assert!(!ping.is_perfect() && ping.received < ping.sent);
}

fn forward_again(topology: &Topology) {
    configure(&topology.internet, async |netlink| {
        netlink.add_route_via(B.network(false), B.endpoint()).await
    })
    .unwrap();
}
