//! Against the real kernel, in a network namespace made for the test, which ends with its thread.

use super::*;
use futures_util::StreamExt;
use nix::sched::{CloneFlags, unshare};

/// Runs `story` in a thread with a network namespace of its own.
fn in_own_namespace<F: Future<Output = ()>>(story: impl FnOnce() -> F + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root may make network namespaces");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(story());
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn prefix(text: &str) -> IpPrefix {
    text.parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A connection and an interface that is up.
async fn a_link() -> (Netlink, u32) {
    let netlink = Netlink::open().unwrap();
    netlink.add_veth_pair("one", "two").await.unwrap();
    for name in ["one", "two", "lo"] {
        let link = netlink.link(name).await.unwrap();
        netlink.set_quiet(link.index).await.unwrap();
        netlink.set_up(link.index).await.unwrap();
    }
    let index = netlink.link_index("one").await.unwrap();
    (netlink, index)
}

#[test]
fn a_link_takes_mtu_and_state_and_one_that_is_not_there_is_named() {
    in_own_namespace(async || {
        let (netlink, link) = a_link().await;
        netlink.set_mtu(link, 1420).await.unwrap();
        netlink.set_queue_packets(link, 10_000).await.unwrap();
        let seen = netlink.link("one").await.unwrap();
        assert_eq!(
            (seen.index, seen.name.as_str(), seen.mtu, seen.up),
            (link, "one", 1420, true)
        );
        let error = netlink.link("three").await.unwrap_err();
        assert!(error.is_gone());
        assert_eq!(error.to_string(), "there is no network interface `three`");
        netlink.remove_link(link).await.unwrap();
        assert!(netlink.link("two").await.unwrap_err().is_gone());
    });
}

#[test]
fn a_quiet_interface_gives_itself_no_address() {
    in_own_namespace(async || {
        let (netlink, link) = a_link().await;
        let own = address("fd00::1");
        netlink.add_address(link, own, 64).await.unwrap();
        let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap();
        let addresses: Vec<_> = addresses
            .lines()
            .filter(|line| line.ends_with("one"))
            .collect();
        assert_eq!(addresses.len(), 1, "{addresses:?}");
        assert!(addresses[0].starts_with("fd00"), "{addresses:?}");
    });
}

#[test]
fn what_was_installed_goes_and_what_was_there_stays() {
    in_own_namespace(async || {
        let (netlink, link) = a_link().await;
        let theirs = address("192.0.2.9");
        netlink.add_address(link, theirs, 24).await.unwrap();

        let mut installed = Installed::new(netlink.clone());
        installed.add_address(link, theirs, 24).await.unwrap();
        installed
            .add_address(link, address("10.1.0.1"), 24)
            .await
            .unwrap();
        installed
            .add_address(link, address("fd00::1"), 64)
            .await
            .unwrap();
        for text in ["10.2.0.0/16", "fd02::/16", "0.0.0.0/0", "::/0"] {
            installed.add_route(prefix(text), link, 77).await.unwrap();
        }
        assert_eq!(installed.len(), 6);
        assert_eq!(netlink.own_routes().await.unwrap().len(), 4);

        // One has gone meanwhile.
        netlink
            .remove_route(prefix("10.2.0.0/16"), link, 77)
            .await
            .unwrap();
        let failures = installed.remove_all().await;
        assert!(failures.is_empty(), "{failures:?}");
        assert!(installed.is_empty());
        assert_eq!(netlink.own_routes().await.unwrap(), []);
        let error = netlink.remove_address(link, address("fd00::1"), 64).await;
        assert!(error.unwrap_err().is_gone());
        netlink.remove_address(link, theirs, 24).await.unwrap();
    });
}

/// Where a packet with this source would go: what `ip route get … from …` says.
async fn way_from(netlink: &Netlink, source: &str, to: &str) -> Option<u32> {
    let mut question = lookup(address(to));
    question.header.source_prefix_length = IpPrefix::host(address(source)).length();
    let source = RouteAttribute::Source(address(source).into());
    question.attributes.push(source);
    let answer = netlink.handle.route().get(question).execute();
    let route = answer.into_future().await.0?.ok()?;
    out_link(&route)
}

#[test]
fn packets_of_some_sources_take_a_route_of_their_own_and_all_others_do_not() {
    in_own_namespace(async || {
        let (netlink, link) = a_link().await;
        let two = netlink.link_index("two").await.unwrap();
        for (own, length, on) in [
            ("192.0.2.1", 24, two),
            ("10.1.0.1", 24, two),
            ("2001:db8::1", 64, two),
            ("fd01::1", 64, two),
        ] {
            netlink.add_address(on, address(own), length).await.unwrap();
        }
        netlink.add_route(IpPrefix::ALL_V4, two, 0).await.unwrap();
        netlink.add_route(IpPrefix::ALL_V6, two, 0).await.unwrap();
        let everything = [("10.1.0.0/24", "0.0.0.0/0"), ("fd01::/64", "::/0")];
        let a_site = ("10.1.0.0/24", "203.0.113.0/24");
        let routes = everything.into_iter().chain([a_site]);
        let routes = routes.map(|(local, remote)| SourceRoute {
            local: prefix(local),
            remote: prefix(remote),
            link,
        });
        let routes: Vec<SourceRoute> = routes.collect();
        for (source, to) in [("10.1.0.1", "203.0.113.1"), ("fd01::1", "2001:db8:b::1")] {
            assert_eq!(way_from(&netlink, source, to).await, Some(two));
        }
        for route in &routes {
            netlink.add_source_route(route).await.unwrap();
            netlink.add_source_route(route).await.unwrap(); // as after a crash
        }
        for (source, to, way) in [
            ("10.1.0.1", "203.0.113.1", link),
            ("10.1.0.1", "198.51.100.1", link),
            ("fd01::1", "2001:db8:b::1", link),
            // Narrower routes of the main table come first.
            ("10.1.0.1", "192.0.2.9", two),
            ("fd01::1", "2001:db8::9", two),
            // Other sources have nothing to do with it.
            ("192.0.2.1", "203.0.113.1", two),
            ("2001:db8::1", "2001:db8:b::1", two),
        ] {
            assert_eq!(
                way_from(&netlink, source, to).await,
                Some(way),
                "{source} to {to}"
            );
        }
        // What a killed daemon left is found, by the interface that it led into.
        netlink.remove_leftover_source_routes(two).await.unwrap();
        assert_eq!(
            way_from(&netlink, "10.1.0.1", "203.0.113.1").await,
            Some(link)
        );
        netlink.remove_leftover_source_routes(link).await.unwrap();
        for (source, to) in [("10.1.0.1", "203.0.113.1"), ("fd01::1", "2001:db8:b::1")] {
            assert_eq!(way_from(&netlink, source, to).await, Some(two));
        }
        for route in &routes {
            let rules = netlink.remove_source_route(route).await;
            assert!(rules.is_ok(), "what is gone is no trouble");
        }
    });
}

#[test]
fn removal_is_the_same_after_the_interface_has_vanished() {
    in_own_namespace(async || {
        let (netlink, link) = a_link().await;
        let mut installed = Installed::new(netlink.clone());
        installed
            .add_address(link, address("10.1.0.1"), 24)
            .await
            .unwrap();
        installed
            .add_route(prefix("10.2.0.0/16"), link, 0)
            .await
            .unwrap();
        installed
            .add_route(prefix("fd02::/16"), link, 0)
            .await
            .unwrap();
        netlink.remove_link(link).await.unwrap();
        let failures = installed.remove_all().await;
        assert!(failures.is_empty(), "{failures:?}");
    });
}

#[test]
fn a_route_in_the_way_is_named_with_who_put_it_there() {
    in_own_namespace(async || {
        let (netlink, link) = a_link().await;
        let two = netlink.link_index("two").await.unwrap();
        for text in ["10.2.0.0/16", "fd02::/16", "0.0.0.0/0"] {
            netlink.add_route(prefix(text), link, 0).await.unwrap();
            let error = netlink.add_route(prefix(text), two, 0).await.unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("by interface one of another Esplane"),
                "{text}"
            );
        }
        netlink
            .add_address(two, address("10.3.0.1"), 16)
            .await
            .unwrap();
        let error = netlink.add_route(prefix("10.3.0.0/16"), link, 0).await;
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("by interface two, which the kernel made"),
            "{text}"
        );

        // Another metric finds its place beside it; replacing takes it.
        netlink
            .add_route(prefix("10.2.0.0/16"), two, 9)
            .await
            .unwrap();
        netlink
            .replace_route(prefix("10.2.0.0/16"), two, 0)
            .await
            .unwrap();
        let gone = netlink.remove_route(prefix("10.2.0.0/16"), link, 0).await;
        assert!(gone.unwrap_err().is_gone());
    });
}

#[test]
fn the_mtu_towards_an_address_is_its_interfaces_unless_the_route_knows_better() {
    in_own_namespace(async || {
        let (netlink, link) = a_link().await;
        netlink.set_mtu(link, 1400).await.unwrap();
        let (v4, v6) = (address("203.0.113.7"), address("2001:db8::7"));
        for unknown in [v4, v6] {
            let error = netlink.route_mtu_to(unknown).await.unwrap_err();
            assert_eq!(error.to_string(), format!("there is no route to {unknown}"));
        }
        netlink.add_route(IpPrefix::ALL_V4, link, 0).await.unwrap();
        netlink.add_route(IpPrefix::ALL_V6, link, 0).await.unwrap();
        assert_eq!(netlink.route_mtu_to(v4).await.unwrap(), 1400);
        assert_eq!(netlink.route_mtu_to(v6).await.unwrap(), 1400);

        let mut message = route(IpPrefix::host(v4), link, 0);
        let narrow = RouteMetric::Mtu(1300);
        message
            .attributes
            .push(RouteAttribute::Metrics(vec![narrow]));
        netlink.handle.route().add(message).execute().await.unwrap();
        assert_eq!(netlink.route_mtu_to(v4).await.unwrap(), 1300);
    });
}

#[test]
fn without_the_capability_the_error_names_it() {
    let refusal = |code: i32| {
        let mut message = rtnetlink::packet_core::ErrorMessage::default();
        message.code = std::num::NonZeroI32::new(-code);
        Action::SetUp { link: 3 }.failed(rtnetlink::Error::NetlinkError(message))
    };
    assert_eq!(
        refusal(libc::EPERM).to_string(),
        "cannot bring interface 3 up: that needs CAP_NET_ADMIN; run as root, or grant the capability"
    );
    assert!(refusal(libc::ENODEV).is_gone());
    assert!(matches!(refusal(libc::EBUSY), NetlinkError::Refused { .. }));
}
