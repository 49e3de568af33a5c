"""Sequence numbers at their ends: with ESN both sides pass 2^32 and go on; without, both stop rather than begin again.

The kernel is told where to begin by `replay-oseq`, Esplane by a reservation of numbers as its own last run would have left it.
"""

from lab.keyed_by_hand import Settings, Tunnel
from lab.runner import Scenario
from lab.wire import Capture, esp_of, replay
from lab.world import check, eventually_same, same

BEFORE = 300


def scenarios():
    for suite in ("gcm128", "chacha"):
        settings = Settings(suite=suite, esn=True, window=128, udp=suite == "chacha", sent_before=2**32 - BEFORE)
        yield Scenario(f"linux-esn-crossing-{suite}", lambda world, settings=settings: cross(world, settings), quick=suite == "gcm128",
                       about="with ESN both sides pass 2^32 packets and go on; replays from before are dropped")  # fmt: skip
    settings = Settings(esn=False, window=128, sent_before=2**32 - BEFORE)
    yield Scenario("linux-sequence-end", lambda world: stop(world, settings), about="without ESN both sides stop at the last number rather than begin again")


def cross(world, settings):
    tunnel = Tunnel(world, settings)
    captures = [Capture(world.net, "gb", "to-b"), Capture(world.net, "ga", "to-a")]
    for source in (world.a, world.b):
        tunnel.ping(source, sizes=[100, 900], count=2 * BEFORE // 4)
    expected = [(2**32 - BEFORE + 1 + number) % 2**32 for number in range(2 * BEFORE)]
    for capture in captures:
        same([esp_of(frame)[1] for frame in capture.frames()], expected, "low halves on the wire pass 2^32")
    tunnel.counters_agree(2 * BEFORE, 2 * BEFORE)
    last = 2**32 + BEFORE
    same([row["sequence"] for row in tunnel.esplane.status()["sas"]], [last, last], "Esplane's numbers have 33 bits")
    text = tunnel.linux.sa(tunnel.SPI_TO_A)["text"]
    check(f"oseq-hi 0x1, oseq {BEFORE:#x}" in " ".join(text.split()), "the kernel's numbers have 33 bits", text)
    # From before and after the crossing: all behind the window or within it.
    for capture, device in zip(captures, ("gb", "ga")):
        replay(world.net, device, capture.frames())
    recent, old = settings.window, 2 * BEFORE - settings.window
    eventually_same(tunnel.esplane.drops, {"replay_duplicate": recent, "authentication_failed": old}, "Esplane drops replays from both sides of 2^32")
    eventually_same(tunnel.linux.statistics, {"XfrmInStateSeqError": recent, "XfrmInStateProtoError": old}, "and so does the kernel")
    return f"{BEFORE} packets to 2^32 and {BEFORE} beyond, each way"


def stop(world, settings):
    tunnel = Tunnel(world, settings)
    captures = [Capture(world.net, "gb", "to-b"), Capture(world.net, "ga", "to-a")]
    tunnel.ping(world.a, count=BEFORE - 100)
    # More than there are numbers for, each way.
    world.a.call("burst", to=tunnel.b, port=7000, count=BEFORE)
    world.b.call("burst", to=tunnel.a, port=7000, count=BEFORE)
    for capture in captures:
        numbers = [esp_of(frame)[1] for frame in capture.frames()]
        same(numbers, list(range(2**32 - BEFORE + 1, 2**32)), "every number up to 2^32 - 1 is used once, and none again")
    drops = tunnel.esplane.drops()
    same(set(drops), {"sequence_exhausted"}, "Esplane says why it sends no more", drops)
    same(set(tunnel.linux.statistics()), {"XfrmOutStateSeqError"}, "the kernel says why it sends no more")
    return f"{BEFORE - 1} packets each way, then none"
