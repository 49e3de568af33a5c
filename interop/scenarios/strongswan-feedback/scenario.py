"""What Esplane tells charon: counters in `swanctl --list-sas`, limits that make charon rekey, packets that make it connect.

ga: charon and Esplane (mode A); gb: charon and the kernel's ESP.
"""

from lab.behind import Plan, Sites
from lab.runner import Scenario
from lab.world import check, eventually, eventually_same, same


def scenarios():
    yield Scenario("strongswan-counters", counters, about="`swanctl --list-sas` shows what Esplane has carried")
    yield Scenario("strongswan-packet-limit", packet_limit, about="rekey_packets is obeyed: charon rekeys under traffic, no packet lost")
    yield Scenario("strongswan-on-demand", on_demand, about="start_action = trap: the first packet makes charon connect, and arrives")


def counters(world):
    sites = Sites(world, Plan()).start()
    sites.ping(sizes=[100, 600], count=20)
    expected = {row["direction"]: row["traffic"] for row in sites.esplane.status()["sas"]}

    def shown():
        sa = sites.charon_a.installed()[0]
        return [sa["in"][1:], sa["out"][1:]]

    wanted = [(expected[way]["bytes"], expected[way]["packets"]) for way in ("inbound", "outbound")]
    same([packets for _, packets in wanted], [80, 80], "Esplane counts every ping and answer")
    eventually_same(shown, wanted, "swanctl shows Esplane's counters")
    far = sites.charon_b.installed()[0]
    same([far["out"][2], far["in"][2]], [80, 80], "the peer's kernel counts as many")
    return f"{wanted[0][0]} bytes in 80 packets, each way, on both sides"


def packet_limit(world):
    sites = Sites(world, Plan(child_a="rekey_packets = 300\n      life_packets = 3000\n      rand_packets = 0")).start()
    first = sites.charon_a.installed()[0]["number"]
    with sites.flow(packets_per_second=100) as flow:
        eventually(lambda: any(sa["number"] > first + 1 for sa in sites.charon_a.installed()), "charon has rekeyed twice")
    packets = flow.nothing_lost()
    sites.all_is_well()
    return f"2 rekeys in {packets} packets, none lost"


def on_demand(world):
    sites = Sites(world, Plan(child_a="start_action = trap")).start(initiate=False)
    eventually(lambda: "net" in sites.charon_a.swanctl("--list-conns"), "charon knows the child")
    check(not sites.charon_a.installed(), "nothing is connected")
    result = world.a.call("ping", to=sites.b, sizes=[100], timeout=20)
    same(result["answered"], 1, "the first packet is held, and answered", result)
    same(len(sites.charon_a.installed()), 1, "charon has connected")
    sites.ping(count=10)
    sites.all_is_well()
    return "the first ping was answered"
