"""Several children with their own traffic selectors: each packet takes the SA it fits, and what fits none is refused by name.

ga: charon and Esplane (mode A); gb: charon and the kernel's ESP. `icmp` takes pings, `ports` two UDP ports to a range of
addresses, `six` all of IPv6.
"""

from lab.behind import Plan, Sites
from lab.runner import Scenario
from lab.world import same

CHILDREN = {
    "icmp": ("10.1.0.0/24[icmp]", "10.2.0.0/24[icmp]"),
    "ports": ("10.1.0.0/24", "10.2.0.2-10.2.0.5[udp/7001],10.2.0.0/24[udp/7003]"),
    "six": ("fd00:1::/64", "fd00:2::/64"),
}


def scenarios():
    yield Scenario("strongswan-children-selectors", selectors)


def selectors(world):
    sites = Sites(world, Plan(children=CHILDREN)).start()
    same(carried(sites), {"icmp": 0, "ports": 0, "six": 0}, "three children are three tunnels")
    ping(world, "10.2.0.2", 7)
    same(carried(sites), {"icmp": 7, "ports": 0, "six": 0}, "pings take their child")
    ping(world, "fd00:2::2", 5)
    same(carried(sites), {"icmp": 7, "ports": 0, "six": 5}, "IPv6 takes its child")
    for port, address in ((7001, "10.2.0.2"), (7003, "10.2.0.2")):
        world.a.call("burst", to=address, port=port, count=11)
    same(carried(sites), {"icmp": 7, "ports": 22, "six": 5}, "both ports take theirs")
    same(sites.esplane.drops(), {}, "nothing is dropped so far")
    # Another port, and an address outside of the range for this one.
    world.a.call("burst", to="10.2.0.2", port=7002, count=3)
    world.a.call("burst", to="10.2.0.9", port=7001, count=4)
    same(carried(sites), {"icmp": 7, "ports": 22, "six": 5}, "what fits no child is not carried")
    same(sites.esplane.drops(), {"no_policy": 7}, "it is refused by name")
    return "3 children, 4 selectors"


def ping(world, target, count):
    result = world.a.call("ping", to=target, sizes=[100], count=count)
    same(result["answered"], count, f"pings to {target} are answered", result)


def carried(sites):
    """Packets sent, by child."""
    rows = [row for row in sites.esplane.status()["sas"] if row["direction"] == "outbound"]
    return {row["peer"].split("/")[-1]: row["traffic"]["packets"] for row in rows}
