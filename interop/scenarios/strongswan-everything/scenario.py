"""A site sends everything through its peer: `remote_ts = 0.0.0.0/0`, and the peer's own address lies in it.

ga: charon and Esplane (mode A); gb: charon and the kernel's ESP. What comes from behind ga takes the tunnel; ESP, IKE, and what
ga itself says by its public address do not.
"""

import signal

from lab.behind import Plan, Sites
from lab.runner import Scenario
from lab.world import check, eventually, same

EVERYTHING = {"v4": ("10.1.0.0/24", "0.0.0.0/0"), "v6": ("fd00:1::/64", "::/0")}
PEER = {"v4": "203.0.113.1", "v6": "2001:db8:b::1"}
INTERNET = {"v4": "203.0.113.254", "v6": "2001:db8:b::fe"}


def scenarios():
    for family in ("v4", "v6"):
        yield Scenario(f"strongswan-everything-{family}", lambda world, family=family: everything(world, family),
                       about=f"all of {'IPv4' if family == 'v4' else 'IPv6'} through the peer, except ESP and IKE themselves")  # fmt: skip


def everything(world, family):
    plan = Plan(children={"net": EVERYTHING[family]}, inner=family, outer=family)
    sites = Sites(world, plan).start()
    pings = 0
    for target in (sites.b, PEER[family]):
        pings += 5
        answered(world.a, target, 5)
        eventually(lambda: sent(sites) == pings, f"pings to {target} take the tunnel")
    # The gateway itself, by its own address: as before.
    answered(world.ga, INTERNET[family], 5)
    same(sent(sites), pings, "what has another source passes by the tunnel")
    for what in (["--child", "net"], ["--ike", "site"]):
        before = sites.charon_a.swanctl("--list-sas")
        sites.charon_a.swanctl("--rekey", *what)
        eventually(lambda: sites.charon_a.swanctl("--list-sas") != before and len(sites.charon_a.installed()) == 1, f"rekeyed: {what}")
    answered(world.a, sites.b, 5)
    row = [row for row in sites.esplane.status()["routes"] if row["destination"] == EVERYTHING[family][1]]
    check(row and row[0]["installed"], "the route is shown as installed", row)

    same(rules(world.ga, family), 2, "one network, two rules")
    sites.esplane.stop(signal.SIGKILL)
    sites.esplane.start()
    sites.await_carried()
    answered(world.a, sites.b, 5)
    same(rules(world.ga, family), 2, "what a killed daemon left behind is not doubled")
    sites.all_is_well(allowed={"unknown_spi"})
    sites.charon_a.swanctl("--terminate", "--ike", "site")
    eventually(lambda: rules(world.ga, family) == 0, "the rules leave with the child")
    return "everything but ESP and IKE"


def answered(host, target, count):
    result = host.call("ping", to=target, sizes=[100], count=count)
    same(result["answered"], count, f"pings from {host.name} to {target} are answered", result)


def sent(sites):
    rows = [row for row in sites.esplane.status()["sas"] if row["direction"] == "outbound"]
    return sum(row["traffic"]["packets"] for row in rows)


def rules(host, family):
    lines = host.run("ip", f"-{family[1]}", "rule", "show").splitlines()
    return sum("10.1.0.0/24" in line or "fd00:1::/64" in line for line in lines)
