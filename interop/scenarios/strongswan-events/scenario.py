"""What happens to gateways in years: restarts of either daemon, dead peers, addresses that change. The tunnel comes back by itself.

ga: charon and Esplane (mode A); gb: charon and the kernel's ESP. All the while no pair of SPI and sequence number is seen twice on
the wire: with AES-GCM a pair used twice would give the key away.
"""

import signal
import time

from lab.behind import Plan, Sites
from lab.runner import Scenario
from lab.wire import Capture, esp_of
from lab.world import check, eventually, same

QUICK = {"strongswan-esplane-killed"}


def scenarios():
    for name, story, about in (
        ("esplane-killed", esplane_killed, "kill -9 of Esplane under traffic: it goes on behind all numbers it may have used"),
        ("esplane-restart", esplane_restart, "Esplane stops and starts: tunnels are there again without a negotiation"),
        ("charon-restart", charon_restart, "charon on Esplane's side stops and starts"),
        ("charon-killed", charon_killed, "kill -9 of charon on Esplane's side"),
        ("peer-restart", peer_restart, "kill -9 of the peer's charon; it negotiates anew"),
        ("dpd", dead_peer, "the peer is unreachable for a while: DPD finds out, and the tunnel comes back"),
        ("mobike", mobike, "Esplane's side changes its address; MOBIKE moves the SAs with their keys"),
        ("nat-rebinds", nat_rebinds, "a NAT in front of the peer gives it another port: Esplane follows its authentic packets"),
    ):  # fmt: skip
        yield Scenario(f"strongswan-{name}", lambda world, story=story: story(world), about=about)


def esplane_killed(world):
    sites = Sites(world, Plan()).start()
    capture = Capture(world.ga, "net", "from-ga")
    with sites.flow(packets_per_second=100) as flow:
        flow.keep(seconds=2)
        for _ in range(2):
            sites.esplane.stop(signal.SIGKILL)
            sites.esplane.start()
            flow_returns(sites)
            flow.keep(seconds=2)
    no_number_twice(capture)
    check(flow.received[0]["expected"] and flow.received[1]["received"], "packets flow after it", flow.received)
    same(sites.trouble(world.gb), {}, "the peer sees no replay and no wrong ICV")
    return f"2 kills; longest gap {flow.longest_gap():.1f} s on an emulated machine"


def esplane_restart(world):
    sites = Sites(world, Plan()).start()
    capture = Capture(world.ga, "net", "from-ga")
    sites.ping(count=10)
    for _ in range(2):
        same(sites.esplane.stop(), 0, "Esplane ends well")
        sites.esplane.start()
        flow_returns(sites)
        sites.ping(count=10)
    no_number_twice(capture)
    sites.all_is_well()
    return "2 restarts"


def charon_restart(world):
    sites = Sites(world, Plan()).start()
    capture = Capture(world.ga, "net", "from-ga")
    sites.ping(count=10)
    sites.charon_a.stop()
    eventually(lambda: sites.carried() == 0, "charon takes its SAs along")
    sites.charon_a.start().load(sites.conf_a)
    sites.charon_a.swanctl("--initiate", "--child", "net")
    sites.await_carried()
    flow_returns(sites)
    sites.ping(count=10)
    no_number_twice(capture)
    return "the tunnel is back"


def charon_killed(world):
    sites = Sites(world, Plan()).start()
    capture = Capture(world.ga, "net", "from-ga")
    sites.ping(count=10)
    sites.charon_a.stop(signal.SIGKILL)
    sites.charon_a.start().load(sites.conf_a)
    sites.charon_a.swanctl("--initiate", "--child", "net")
    sites.await_carried()
    flow_returns(sites)
    sites.ping(count=10)
    no_number_twice(capture)
    return "the tunnel is back"


def peer_restart(world):
    sites = Sites(world, Plan()).start()
    capture = Capture(world.ga, "net", "from-ga")
    sites.ping(count=10)
    sites.charon_b.stop(signal.SIGKILL)
    world.gb.sh("ip xfrm state flush; ip xfrm policy flush")
    sites.charon_b.start().load(sites.conf_b)
    sites.charon_b.swanctl("--initiate", "--child", "net")
    flow_returns(sites)
    sites.ping(count=10)
    eventually(lambda: sites.carried() == 1, "the old SA is gone, one is left")
    no_number_twice(capture)
    return "the tunnel is back"


def dead_peer(world):
    plan = Plan(connection="dpd_delay = 2s\n    keyingtries = 0", child_a="dpd_action = restart\n      start_action = start")
    sites = Sites(world, plan).start(initiate=False)
    sites.await_carried()
    flow_returns(sites)
    capture = Capture(world.ga, "net", "from-ga")
    world.net.ip("link set dev gb down\n")
    eventually(lambda: not sites.charon_a.installed(), "DPD finds the peer dead")
    eventually(lambda: sites.carried() == 0, "Esplane lets its SAs go")
    world.net.ip("link set dev gb up\naddress replace 2001:db8:b::fe/64 dev gb nodad\n")
    eventually(sites.charon_a.installed, "the tunnel is negotiated again")
    flow_returns(sites)
    sites.ping(count=10)
    no_number_twice(capture)
    return "found dead, and back"


def mobike(world):
    sites = Sites(world, Plan(mobike=True)).start()
    capture = Capture(world.ga, "net", "from-ga")
    with sites.flow() as flow:
        flow.keep(seconds=2)
        # Else the second address of a network goes with the first.
        world.ga.sh("echo 1 >/proc/sys/net/ipv4/conf/net/promote_secondaries")
        world.ga.ip("address add 198.51.100.2/24 dev net\naddress del 198.51.100.1/24 dev net\nroute replace default via 198.51.100.254 dev net\n")
        eventually(lambda: "198.51.100.2" in sites.esplane.show("sas"), "Esplane's SAs move to the new address")
        flow.keep(seconds=2)
    flow_returns(sites)
    sites.ping(count=10)
    no_number_twice(capture)
    return f"moved; longest gap {flow.longest_gap():.1f} s on an emulated machine"


def flow_returns(sites):
    """Both ways, within a while."""
    for source, target in ((sites.world.a, sites.b), (sites.world.b, sites.a)):
        eventually(lambda: source.call("ping", to=target, sizes=[100], timeout=1.0)["answered"] == 1, f"pings from {source.name} are answered")


def no_number_twice(capture):
    pairs = [esp_of(frame) for frame in capture.frames()]
    check(len(pairs) > 10, "packets were captured", len(pairs))
    twice = len(pairs) - len(set(pairs))
    same(twice, 0, "no pair of SPI and sequence number was sent twice", f"{len(pairs)} packets")


def nat_rebinds(world):
    sites = Sites(world, Plan())
    sites.conf_a = sites.conf_a.replace(f"remote_addrs = {sites.gb}", "remote_addrs = %any")
    hide_peer(world, sites.gb, 20000)
    sites.start(initiate=False)
    sites.charon_b.swanctl("--initiate", "--child", "net")
    sites.await_carried()
    sites.ping()
    check(20000 <= sends_to_port(sites) < 20100, "Esplane sends to the NAT's port", sites.esplane.status()["sas"])
    before = sites.charon_a.installed()
    hide_peer(world, sites.gb, 30000)
    time.sleep(4)  # until the NAT has forgotten the old port
    eventually(lambda: world.b.call("ping", to=sites.a, sizes=[100], timeout=1.0)["answered"] == 1, "the peer's packets are answered")
    check(30000 <= sends_to_port(sites) < 30100, "Esplane sends to the new port", sites.esplane.status()["sas"])
    sites.ping(count=5)
    same([sa["number"] for sa in sites.charon_a.installed()], [sa["number"] for sa in before], "the SAs are the same")
    return "followed to another port without a negotiation"


def hide_peer(world, address, port):
    """The Internet hides the peer's port 4500 behind one of its own, and forgets it after two quiet seconds."""
    world.net.run("nft", "-f", "-", input=f"""
        flush ruleset
        table ip nat {{
            chain post {{
                type nat hook postrouting priority srcnat
                ip saddr {address} udp sport 4500 masquerade to :{port}-{port + 99}
                ip saddr {address} masquerade
            }}
        }}
    """)  # fmt: skip
    world.net.sh("cd /proc/sys/net/netfilter; echo 2 >nf_conntrack_udp_timeout; echo 2 >nf_conntrack_udp_timeout_stream")


def sends_to_port(sites):
    (remote,) = (row["remote"] for row in sites.esplane.status()["sas"] if row["direction"] == "outbound" and row["active"])
    return int(remote.rsplit(":", 1)[1])
