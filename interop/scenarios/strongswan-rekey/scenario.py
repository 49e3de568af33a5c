"""CHILD_SAs and IKE_SAs are rekeyed from either side while numbered packets flow both ways: not one is lost.

ga: charon and Esplane (mode A); gb: charon and the kernel's ESP.
"""

from lab.behind import Plan, Sites
from lab.runner import Scenario
from lab.world import check, eventually

QUICK = {"strongswan-rekey-child-both"}
PLANS = {"": Plan(), "-udp": Plan("aes256gcm16", encap=True), "-delay": Plan("chacha20poly1305", inner="v6", encap=True)}
ROUNDS = 3


def scenarios():
    for what in ("child", "ike"):
        for side in ("a", "b"):
            yield scenario(f"{what}-from-{side}", what, [side], "")
    yield scenario("child-both", "child", ["a", "b"], "")
    yield scenario("child-both-udp", "child", ["a", "b"], "-udp")
    yield scenario("child-both-delay", "child", ["a", "b"], "-delay")


def scenario(name, what, sides, variant):
    name = f"strongswan-rekey-{name}"
    return Scenario(name, lambda world: rekey(world, what, sides, variant),
                    about=f"{'CHILD' if what == 'child' else 'IKE'}_SA rekeyed from {' and '.join(sides)}{variant.replace('-', ' ')}, no packet lost")  # fmt: skip


def rekey(world, what, sides, variant):
    sites = Sites(world, PLANS[variant]).start()
    if variant == "-delay":
        world.netem("delay 50ms limit 10000")
    charons = {"a": sites.charon_a, "b": sites.charon_b}
    rekeys = 0
    with sites.flow() as flow:
        flow.keep(seconds=1)
        for _ in range(ROUNDS):
            for side in sides:
                before = identity(charons[side], what)
                charons[side].swanctl("--rekey", *(["--child", "net"] if what == "child" else ["--ike", "site"]))
                eventually(lambda: identity(charons[side], what) not in (before, None), f"the {what} is rekeyed from {side}")
                rekeys += 1
                flow.keep(seconds=1)
    packets = flow.nothing_lost()
    sites.all_is_well()
    check(len(sites.charon_a.installed()) == 1, "one child is left", sites.charon_a.sas())
    return f"{rekeys} rekeys, {packets} packets, none lost; longest gap {flow.longest_gap():.2f} s"


def identity(charon, what):
    """What a rekey changes, once it is over."""
    if what == "child":
        installed = charon.installed()
        return installed[0]["number"] if len(installed) == 1 else None
    lines = [line for line in charon.swanctl("--list-sas").splitlines() if line.startswith("site: #")]
    return lines[0].split(",")[0] if len(lines) == 1 and "ESTABLISHED" in lines[0] else None
