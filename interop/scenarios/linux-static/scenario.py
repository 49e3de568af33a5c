"""Linux kernel ESP keyed by `ip xfrm` and Esplane keyed by its file carry each other's packets.

Esplane is the gateway ga, the kernel is gb. Per cell of the table: pings of many sizes up to the tunnel's MTU both
ways, a TCP transfer each way; then both ends' counters agree packet by packet, tshark decrypts both directions with the keys
(AES-GCM only; it can verify ICVs where there is no ESN), and the whole capture sent once more is dropped by both as replays.
"""

import itertools
import secrets
from collections import Counter

from lab.esplane import SUITES, Esplane, static_sa
from lab.linux import LinuxEsp
from lab.runner import Scenario
from lab.wire import TSHARK_SUITES, Capture, esp_of, replay, tshark
from lab.world import INNER, OUTER, check, eventually_same, same

# How names say which addresses travel inside which.
ADDRESSES = {"v4": ("v4", "v4"), "v6": ("v6", "v6"), "v6in4": ("v6", "v4"), "v4in6": ("v4", "v6")}
WINDOWS = (32, 128, 4096)
QUICK = {"linux-static-gcm128-esn-v4-w4096", "linux-static-chacha-noesn-v6in4-udp-w128", "linux-static-gcm256-esn-v6-udp-w32"}
BULK_BYTES = 500_000


def scenarios():
    """Suite, sequence numbers, addresses and encapsulation in every combination; each with one window, in turn."""
    table = itertools.product(SUITES, ("esn", "noesn"), ADDRESSES, ("", "-udp"))
    for number, (suite, esn, addresses, udp) in enumerate(table):
        # Moved on after each twelve, so that every window meets every suite, and both ESN and none.
        window = WINDOWS[(number + number // 12) % 3]
        name = f"linux-static-{suite}-{esn}-{addresses}{udp}-w{window}"
        inner, outer = ADDRESSES[addresses]
        yield Scenario(name, Cell(suite, esn == "esn", inner, outer, bool(udp), window), quick=name in QUICK)


class Cell:
    def __init__(self, suite, esn, inner, outer, udp, window):
        self.suite, self.esn, self.inner, self.outer, self.udp, self.window = suite, esn, inner, outer, udp, window

    def __call__(self, world):
        tunnel = Tunnel(world, self)
        to_b, to_a = Capture(world.net, "gb", "to-b"), Capture(world.net, "ga", "to-a")
        pings = tunnel.ping_both_ways()
        speeds = [tunnel.bulk(*ends) for ends in ((world.a, world.b, tunnel.a, tunnel.b), (world.b, world.a, tunnel.b, tunnel.a))]
        frames = {"b": to_b.frames(), "a": to_a.frames()}
        tunnel.counters_agree(len(frames["b"]), len(frames["a"]))
        tunnel.tshark_agrees(to_b.bytes(), tunnel.to_b_keys, len(frames["b"]), "to-b")
        tunnel.tshark_agrees(to_a.bytes(), tunnel.to_a_keys, len(frames["a"]), "to-a")
        tunnel.replays_are_dropped(frames)
        return f"{pings} pings, TCP {speeds[0]:.0f}/{speeds[1]:.0f} Mbit/s, {len(frames['a']) + len(frames['b'])} ESP packets replayed"


class Tunnel:
    """Both ends with the same keys."""

    def __init__(self, world, cell, sequence_from_linux=0):
        self.world, self.cell = world.site_to_site(), cell
        self.ga, self.gb = OUTER[cell.outer]
        net_a, net_b, self.a, self.b = INNER[cell.inner]
        key_to_b, key_to_a = (secrets.token_hex(SUITES[cell.suite][1]) for _ in range(2))
        spi_to_b, spi_to_a = 0xB0000001, 0xA0000001
        self.spi_to_b, self.spi_to_a = spi_to_b, spi_to_a
        shared = {"suite": cell.suite, "esn": cell.esn, "window": cell.window, "udp": cell.udp}
        self.linux = LinuxEsp(world.gb, self.gb, self.ga, spi_to_b, spi_to_a, key_to_b, key_to_a,
                              local=net_b, remote=net_a, sequence_out=sequence_from_linux, **shared)  # fmt: skip
        section = static_sa(cell.outer, self.ga, self.gb, spi_to_a, spi_to_b, key_to_a, key_to_b, routes=[net_b], **shared)
        self.esplane = Esplane(world.ga, section)
        self.esplane.start()
        self.mtu = self.esplane.status()["mtu"]
        self.to_b_keys = (cell.suite, self.ga, self.gb, spi_to_b, key_to_b)
        self.to_a_keys = (cell.suite, self.gb, self.ga, spi_to_a, key_to_a)

    def ping_both_ways(self):
        smallest = 48 if self.cell.inner == "v6" else 28
        # Every padding, round numbers, and all around the largest that fits.
        sizes = sorted({*range(smallest, smallest + 24), *range(100, self.mtu, 173), *range(self.mtu - 9, self.mtu + 1)})
        for source, target in ((self.world.a, self.b), (self.world.b, self.a)):
            result = source.call("ping", to=target, sizes=sizes)
            same(result["answered"], len(sizes), f"pings of {smallest} to {self.mtu} bytes from {source.name} are answered", result)
        return 2 * len(sizes)

    def bulk(self, source, sink, own, target):
        """A TCP transfer; Mbit/s of an emulated machine, for the record only."""
        listener = sink.background("tcp_sink", address=target, port=5001)
        sent = source.call("tcp_send", to=target, port=5001, size=BULK_BYTES, source=own)
        received = listener.join()
        same(received["sha256"], sent["sha256"], "TCP arrives whole", sent, received)
        return sent["bytes"] * 8 / sent["seconds"] / 1e6

    def counters_agree(self, to_b, to_a):
        """What Esplane says it sent and received, what the kernel says, and what was on the wire."""

        def esplane():
            rows = {row["direction"]: row["traffic"]["packets"] for row in self.esplane.status()["sas"]}
            return rows["outbound"], rows["inbound"]

        same(self.esplane.drops(), {}, "Esplane drops nothing")
        eventually_same(esplane, (to_b, to_a), "Esplane counts packets out and in as on the wire")
        linux = [self.linux.sa(spi) for spi in (self.spi_to_b, self.spi_to_a)]
        same([sa["packets"] for sa in linux], [to_b, to_a], "the kernel counts as many")
        same([sa["replays"] + sa["failed"] for sa in linux], [0, 0], "the kernel sees no replay and no wrong ICV")
        same(self.linux.statistics(), {}, "the kernel sees no trouble")

    def tshark_agrees(self, data, keys, count, name):
        if self.cell.suite not in TSHARK_SUITES:
            return
        rows = tshark(self.world.root, self.world.directory, data, [keys], ["esp.sequence", "esp.protocol", "_ws.malformed", "esp.icv_good"], name)
        protocol = "0x29" if self.cell.inner == "v6" else "0x04"
        # The kernel has verified every ICV; tshark can those without ESN.
        good = "0" if self.cell.esn else "1"
        wrong = [row for row in rows if row[1:] != [protocol, "", good]]
        check(not wrong, "tshark decrypts every packet and finds its ICV right", *wrong[:5])
        # Workers may overtake each other.
        same(sorted(int(row[0]) for row in rows), list(range(1, count + 1)), "no number is left out or used twice")

    def replays_are_dropped(self, frames):
        before = self.linux.sa(self.spi_to_b)["packets"]
        replay(self.world.net, "gb", frames["b"])
        replay(self.world.net, "ga", frames["a"])
        expected = self.expected_drops(frames["a"], ("replay_duplicate", "authentication_failed", "replay_too_old"))
        eventually_same(self.esplane.drops, expected, "Esplane drops the replays by name")
        expected = self.expected_drops(frames["b"], ("XfrmInStateSeqError", "XfrmInStateProtoError", "XfrmInStateSeqError"))
        eventually_same(self.linux.statistics, expected, "the kernel drops the replays by name")
        same(self.linux.sa(self.spi_to_b)["packets"], before, "no replay counts as received")

    def expected_drops(self, frames, names):
        """Within the window a replay is a duplicate. Behind it, it is too old; with ESN it then seems to be of the next 2^32
        numbers, and its ICV is wrong for those (RFC 4303 Appendix A2)."""
        numbers = [esp_of(frame)[1] for frame in frames]
        recent = sum(number > max(numbers) - self.cell.window for number in numbers)
        duplicate, wrong_icv, old = names
        counts = Counter({duplicate: recent})
        counts[wrong_icv if self.cell.esn else old] += len(numbers) - recent
        return {name: count for name, count in counts.items() if count}
