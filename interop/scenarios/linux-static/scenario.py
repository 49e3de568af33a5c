"""Linux kernel ESP keyed by `ip xfrm` and Esplane keyed by its file carry each other's packets.

Esplane is the gateway ga, the kernel is gb. Per cell of the table: pings of many sizes up to the tunnel's MTU both
ways, a TCP transfer each way; then both ends' counters agree packet by packet, tshark decrypts both directions with the keys
(AES-GCM only; it can verify ICVs where there is no ESN), and the whole capture sent once more is dropped by both as replays.
"""

import itertools
from collections import Counter

from lab.esplane import SUITES
from lab.keyed_by_hand import Settings, Tunnel
from lab.runner import Scenario
from lab.wire import TSHARK_SUITES, Capture, esp_of, replay, tshark
from lab.world import check, eventually_same, same

# How names say which addresses travel inside which.
ADDRESSES = {"v4": ("v4", "v4"), "v6": ("v6", "v6"), "v6in4": ("v6", "v4"), "v4in6": ("v4", "v6")}
WINDOWS = (32, 128, 4096)
QUICK = {"linux-static-gcm128-esn-v4-w32", "linux-static-gcm256-noesn-v6in4-udp-w128", "linux-static-chacha-esn-v6-udp-w128"}
BULK_BYTES = 500_000


def scenarios():
    """Suite, sequence numbers, addresses and encapsulation in every combination; each with one window, in turn."""
    table = itertools.product(SUITES, ("esn", "noesn"), ADDRESSES, ("", "-udp"))
    for number, (suite, esn, addresses, udp) in enumerate(table):
        # Moved on after each twelve, so that every window meets every suite, and both ESN and none.
        window = WINDOWS[(number + number // 12) % 3]
        name = f"linux-static-{suite}-{esn}-{addresses}{udp}-w{window}"
        inner, outer = ADDRESSES[addresses]
        settings = Settings(suite, esn == "esn", inner, outer, bool(udp), window)
        yield Scenario(name, lambda world, settings=settings: carry(world, settings))


def carry(world, settings):
    tunnel = Tunnel(world, settings)
    captures = [Capture(world.net, "gb", "to-b"), Capture(world.net, "ga", "to-a")]
    smallest = 48 if settings.inner == "v6" else 28
    # Every padding, round numbers, and all around the largest that fits.
    sizes = sorted({*range(smallest, smallest + 24), *range(100, tunnel.mtu, 173), *range(tunnel.mtu - 9, tunnel.mtu + 1)})
    for source in (world.a, world.b):
        tunnel.ping(source, sizes)
    speeds = [tunnel.bulk(source, BULK_BYTES) for source in (world.a, world.b)]
    to_b, to_a = (capture.frames() for capture in captures)
    tunnel.counters_agree(len(to_b), len(to_a))
    if settings.suite in TSHARK_SUITES:
        for capture, keys in zip(captures, (tunnel.keys_to_b, tunnel.keys_to_a)):
            tshark_agrees(world, settings, capture, keys)
    replays_are_dropped(tunnel, to_b, to_a)
    return f"pings of {smallest} to {tunnel.mtu} bytes, TCP {speeds[0]:.0f}/{speeds[1]:.0f} Mbit/s, {len(to_a) + len(to_b)} ESP packets replayed"


def tshark_agrees(world, settings, capture, keys):
    rows = tshark(world.root, world.directory, capture.bytes(), [keys], ["esp.sequence", "esp.protocol", "_ws.malformed", "esp.icv_good"], capture.name)
    protocol = "0x29" if settings.inner == "v6" else "0x04"
    # The kernel has verified every ICV; tshark can those without ESN.
    good = "0" if settings.esn else "1"
    wrong = [row for row in rows if row[1:] != [protocol, "", good]]
    check(not wrong, "tshark decrypts every packet and finds its ICV right", *wrong[:5])
    # Workers may overtake each other.
    same(sorted(int(row[0]) for row in rows), list(range(1, len(capture.frames()) + 1)), "no number is left out or used twice")


def replays_are_dropped(tunnel, to_b, to_a):
    before = tunnel.linux.sa(tunnel.SPI_TO_B)["packets"]
    replay(tunnel.world.net, "gb", to_b)
    replay(tunnel.world.net, "ga", to_a)
    expected = expected_drops(to_a, tunnel.settings, "replay_duplicate", "replay_too_old", "authentication_failed")
    eventually_same(tunnel.esplane.drops, expected, "Esplane drops the replays by name")
    expected = expected_drops(to_b, tunnel.settings, "XfrmInStateSeqError", "XfrmInStateSeqError", "XfrmInStateProtoError")
    eventually_same(tunnel.linux.statistics, expected, "the kernel drops the replays by name")
    same(tunnel.linux.sa(tunnel.SPI_TO_B)["packets"], before, "no replay counts as received")


def expected_drops(frames, settings, duplicate, too_old, wrong_icv):
    """Within the window a replay is a duplicate. Behind it, it is too old; with ESN it then seems to be of the next 2^32
    numbers, and its ICV is wrong for those (RFC 4303 Appendix A2)."""
    numbers = [esp_of(frame)[1] for frame in frames]
    recent = sum(number > max(numbers) - settings.window for number in numbers)
    counts = Counter({duplicate: recent})
    counts[wrong_icv if settings.esn else too_old] += len(numbers) - recent
    return {name: count for name, count in counts.items() if count}
