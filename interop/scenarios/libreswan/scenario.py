"""Libreswan is the peer: it negotiates with the strongSwan that Esplane stands behind, and its kernel carries its side.

ga: charon and Esplane (mode A); gb: pluto and the kernel's ESP.
"""

from lab.behind import Plan, Sites
from lab.libreswan import Libreswan
from lab.runner import Scenario
from lab.strongswan import SECRET
from lab.world import INNER, OUTER, check, eventually, same

ROWS = {
    "gcm128-esn-v4": (Plan(), "aes_gcm128"),
    "gcm256-noesn-v6in4-udp": (Plan("aes256gcm16", esn=False, inner="v6", encap=True), "aes_gcm256"),
}


def scenarios():
    for name, (plan, esp) in ROWS.items():
        yield Scenario(f"libreswan-{name}", lambda world, plan=plan, esp=esp: carry(world, plan, esp))


def carry(world, plan, esp):
    sites = Sites(world, plan)
    own, peer = OUTER[plan.outer][1], OUTER[plan.outer][0]
    remote, local = INNER[plan.inner][:2]
    more = "encapsulation=yes" if plan.encap else ""
    pluto = Libreswan(world.gb, own, peer, "gb.example", "ga.example", local, remote, esp, plan.esn, SECRET, more).start()
    sites.charon_a.start().load(sites.conf_a)
    sites.esplane.start()
    sites.charon_a.swanctl("--initiate", "--child", "net")
    sites.await_carried()
    sizes = sites.sizes()
    sites.ping(sizes)
    with sites.flow() as flow:
        for rekey in (lambda: sites.charon_a.swanctl("--rekey", "--child", "net"), pluto.rekey):
            before = spi(sites)
            flow.keep(seconds=1)
            rekey()
            eventually(lambda: spi(sites) != before, "Esplane sends with the new SA")
            flow.keep(seconds=1)
    # As responder Libreswan sends with the new SA before charon has told anyone of it: such packets have no SA yet.
    early = sites.esplane.drops().get("unknown_spi", 0)
    same(flow.lost(), [0, early], "what Esplane has no SA for is all that is lost", flow.sent, flow.received)
    check(early <= 5, "these are few", early)
    sites.all_is_well(allowed=["unknown_spi"])
    packets = sum(end["sent"] for end in flow.sent)
    return f"pings of {sizes[0]} to {sizes[-1]} bytes, {packets} numbered packets over a rekey from each side, {early} sent too early by Libreswan"


def spi(sites):
    return [row["spi"] for row in sites.esplane.status()["sas"] if row["direction"] == "outbound" and row["active"]]
