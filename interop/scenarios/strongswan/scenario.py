"""strongSwan negotiates on both gateways; on ga Esplane carries the traffic (mode A), on gb the kernel does.

Per row: pings of many sizes up to the tunnel's MTU both ways, numbered packets both ways, and no drop at either end.
"""

from lab.behind import Plan, Sites
from lab.runner import Scenario

QUICK = {"strongswan-psk-gcm128-esn-v4"}
# What is negotiated, as rows: name, plan.
ROWS = {
    "kernel-both-ends": Plan(takeover=False),
    "psk-gcm128-esn-v4": Plan(),
    "psk-gcm256-noesn-v6": Plan("aes256gcm16", esn=False, inner="v6", outer="v6"),
    "psk-chacha-esn-v6in4": Plan("chacha20poly1305", inner="v6"),
    "psk-gcm128-noesn-v4in6": Plan(esn=False, outer="v6"),
    "cert-gcm256-esn-v4": Plan("aes256gcm16", auth="pubkey"),
    "cert-gcm128-noesn-v6": Plan(esn=False, inner="v6", outer="v6", auth="pubkey"),
    "forced-udp-gcm128-esn-v4": Plan(encap=True),
    "forced-udp-gcm256-esn-v6": Plan("aes256gcm16", inner="v6", outer="v6", encap=True),
    "nat-gcm128-esn-v4": Plan(nat=True),
    "nat-chacha-noesn-v6in4": Plan("chacha20poly1305", esn=False, inner="v6", nat=True),
}


def scenarios():
    for name, plan in ROWS.items():
        name = f"strongswan-{name}"
        yield Scenario(name, lambda world, plan=plan: carry(world, plan))


def carry(world, plan):
    sites = Sites(world, plan).start()
    sizes = sites.sizes()
    sites.ping(sizes)
    with sites.flow() as flow:
        flow.keep(seconds=3)
    packets = flow.nothing_lost()
    sites.all_is_well()
    return f"pings of {sizes[0]} to {sizes[-1]} bytes, {packets} numbered packets"
