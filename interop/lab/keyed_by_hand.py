"""A tunnel between Esplane on ga and the kernel's ESP on gb, with keys set by hand on both."""

import hashlib
import secrets
from dataclasses import dataclass

from .esplane import SUITES, Esplane, static_sa
from .linux import LinuxEsp
from .world import INNER, OUTER, eventually_same, same


@dataclass
class Settings:
    suite: str = "gcm128"
    esn: bool = True
    inner: str = "v4"
    outer: str = "v4"
    udp: bool = False
    window: int = 4096
    # The number of each side's last packet, as if there had been so many.
    sent_before: int = 0


class Tunnel:
    SPI_TO_B, SPI_TO_A = 0xB0000001, 0xA0000001

    def __init__(self, world, settings):
        self.world, self.settings = world.site_to_site(), settings
        self.ga, self.gb = OUTER[settings.outer]
        net_a, net_b, self.a, self.b = INNER[settings.inner]
        key_to_b, key_to_a = (secrets.token_hex(SUITES[settings.suite][1]) for _ in range(2))
        # As `tshark` takes them.
        self.keys_to_b = (settings.suite, self.ga, self.gb, self.SPI_TO_B, key_to_b)
        self.keys_to_a = (settings.suite, self.gb, self.ga, self.SPI_TO_A, key_to_a)
        shared = {"suite": settings.suite, "esn": settings.esn, "window": settings.window, "udp": settings.udp}
        self.linux = LinuxEsp(world.gb, self.gb, self.ga, self.SPI_TO_B, self.SPI_TO_A, key_to_b, key_to_a,
                              local=net_b, remote=net_a, sequence_out=settings.sent_before, **shared)  # fmt: skip
        section = static_sa(self.ga, self.gb, self.SPI_TO_A, self.SPI_TO_B, key_to_a, key_to_b, routes=[net_b], **shared)
        self.esplane = Esplane(world.ga, section)
        if settings.sent_before:
            write_reservation(self.esplane, SUITES[settings.suite][0], key_to_b, self.SPI_TO_B, settings.sent_before)
        self.esplane.start()
        self.mtu = self.esplane.status()["mtu"]

    def ping(self, source, sizes=(100,), count=1, **more):
        """Every ping from one side to the other is answered."""
        target = self.b if source is self.world.a else self.a
        result = source.call("ping", to=target, sizes=list(sizes), count=count, **more)
        same(result["answered"], len(sizes) * count, f"pings from {source.name} are answered", result)

    def bulk(self, source, size):
        """A TCP transfer from one side to the other; Mbit/s of an emulated machine, for the record only."""
        ends = (self.world.b, self.a, self.b) if source is self.world.a else (self.world.a, self.b, self.a)
        sink, own, target = ends
        listener = sink.background("tcp_sink", address=target, port=5001)
        sent = source.call("tcp_send", to=target, port=5001, size=size, source=own)
        received = listener.join()
        same(received["sha256"], sent["sha256"], "TCP arrives whole", sent, received)
        return sent["bytes"] * 8 / sent["seconds"] / 1e6

    def counters_agree(self, to_b, to_a):
        """What Esplane says it sent and received, what the kernel says, and what was on the wire; and no drop anywhere."""
        same(self.esplane.drops(), {}, "Esplane drops nothing")
        eventually_same(self.packets, [to_b, to_a], "Esplane counts packets out and in as on the wire")
        linux = [self.linux.sa(spi) for spi in (self.SPI_TO_B, self.SPI_TO_A)]
        same([sa["packets"] for sa in linux], [to_b, to_a], "the kernel counts as many")
        same([sa["replays"] + sa["failed"] for sa in linux], [0, 0], "the kernel sees no replay and no wrong ICV")
        same(self.linux.statistics(), {}, "the kernel sees no trouble")

    def packets(self):
        """What Esplane has sent and received."""
        rows = {row["direction"]: row["traffic"]["packets"] for row in self.esplane.status()["sas"]}
        return [rows["outbound"], rows["inbound"]]


def write_reservation(esplane, suite, key, spi, used_until):
    """Tells Esplane that a key's numbers have been used up to one, in the words of gateway/src/reservation.rs."""
    fingerprint = hashlib.blake2s(b"esplane sequence reservation of a key" + suite.encode() + bytes.fromhex(key)).hexdigest()[:32]
    body = f"esplane sequence reservation 1\nspi {spi:#010x}\nreserved_until {used_until}\n"
    check = hashlib.blake2s(body.encode()).hexdigest()[:16]
    esplane.host.write(f"{esplane.directory}/state/sequence/{fingerprint}.reserved", f"{body}check {check}\n", mode=0o600)
