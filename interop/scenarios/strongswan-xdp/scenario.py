"""strongSwan negotiates, and the packets never meet ga's kernel: Esplane takes them from the interface (AF_XDP, mode A).

Without AF_XDP the kernel sees its own copy of ESP in UDP at charon's port, drops it and counts it; here its counter must
stay at zero, while IKE still reaches charon through the same interface, and the tunnel is rekeyed under traffic.
"""

from lab.behind import Plan, Sites
from lab.runner import Scenario
from lab.world import check, eventually, same

QUICK = {"strongswan-xdp-udp"}
OUTSIDE = "outer: { xdp: { interface: net } }\n"
BOTH = OUTSIDE + "inner: { xdp: { interface: a } }\n"
# name, plan
ROWS = {
    "udp": Plan(encap=True, esplane=OUTSIDE),
    "esp-v6-both-sides": Plan("aes256gcm16", inner="v6", outer="v6", esplane=BOTH),
}


def scenarios():
    for name, plan in ROWS.items():
        name = f"strongswan-xdp-{name}"
        yield Scenario(name, lambda world, plan=plan: carry(world, plan))


def carry(world, plan):
    sites = Sites(world, plan).start()
    check("xdp" in world.ga.run("ip", "link", "show", "dev", "net"), "the program is on the interface")
    sites.ping(count=3)  # meanwhile the next hops are learnt
    before = delivered(world.ga)
    with sites.flow() as flow:
        flow.keep(seconds=2)
        sites.charon_a.swanctl("--rekey", "--child", "net")
        flow.keep(seconds=2)
    packets = flow.nothing_lost()
    eventually(lambda: len(sites.charon_a.installed()) == 1, "the old SAs are gone")
    sites.all_is_well()
    same(sites.trouble(world.ga), {}, "ga's kernel has seen no ESP")
    seen = delivered(world.ga) - before
    check(seen < packets // 4, f"{seen} datagrams for ga met its kernel while {packets} went through the tunnel; half of them came from outside")
    return f"{packets} numbered packets through a rekey, {seen} datagrams at ga's kernel"


def delivered(host):
    """IP packets for the host itself that its kernel has seen."""
    names, values = (line.split() for line in host.run("cat", "/proc/net/snmp").splitlines() if line.startswith("Ip:"))
    v6 = dict(line.split() for line in host.run("cat", "/proc/net/snmp6").splitlines())
    return int(values[names.index("InDelivers")]) + int(v6["Ip6InDelivers"])
