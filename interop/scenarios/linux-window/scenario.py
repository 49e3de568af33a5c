"""Packets that come late are taken within the replay window, and not one place behind it, by Esplane and Linux alike.

The Internet swallows a burst of ESP packets, which are then delivered by hand: the last one first, then the one at the
edge of the window, the one behind it, all between in random order, and all once more.
"""

import random
from collections import Counter

from lab.keyed_by_hand import Settings, Tunnel
from lab.runner import Scenario
from lab.wire import Capture, esp_of, replay
from lab.world import check, eventually_same, same


def scenarios():
    for window in (32, 128, 4096):
        for esn in (True, False):
            name = f"linux-window-{window}-{'esn' if esn else 'noesn'}"
            settings = Settings(suite="gcm256" if esn else "chacha", esn=esn, udp=window == 128, window=window)
            yield Scenario(name, lambda world, settings=settings: late(world, settings), quick=name == "linux-window-128-esn")


def late(world, settings):
    tunnel = Tunnel(world, settings)
    for source in (world.a, world.b):
        tunnel.ping(source)
    # Behind the window, with ESN, a number seems to be of the next 2^32, and the ICV is wrong for that (RFC 4303 Appendix A2).
    linux = ("XfrmInStateSeqError", "XfrmInStateProtoError" if settings.esn else "XfrmInStateSeqError")
    esplane = ("replay_duplicate", "authentication_failed" if settings.esn else "replay_too_old")
    deliver_late(world, settings, (world.a, world.ga), (world.b, world.gb, tunnel.b), tunnel.linux.statistics, *linux)
    deliver_late(world, settings, (world.b, world.gb), (world.a, world.ga, tunnel.a), tunnel.esplane.drops, *esplane)
    return f"{settings.window} places, both ways"


def deliver_late(world, settings, near, far, drops, duplicate, too_old):
    sink, gateway, address = far
    frames = swallowed_burst(world, *near, address, settings.window + 20)
    receiver = sink.background("flow_receive", address=address, port=7000, stop_file=f"/work/{sink.name}.end")
    mac = bytes.fromhex(gateway.run("cat", "/sys/class/net/net/address").strip().replace(":", ""))
    frames = [mac + frame[6:] for frame in frames]
    last, edge, behind, between = frames[-1], frames[-settings.window], frames[-settings.window - 1], frames[-settings.window + 1 : -1]
    random.Random(7).shuffle(between)
    delivered = [last, edge, *between]
    replay(world.net, gateway.name, [last, edge, behind, *between])
    eventually_same(drops, {too_old: 1}, "only the one behind the window is dropped")
    replay(world.net, gateway.name, delivered)
    expected = Counter({too_old: 1}) + Counter({duplicate: len(delivered)})
    eventually_same(drops, dict(expected), "all of them once more are duplicates")
    sink.write(f"/work/{sink.name}.end", "")
    result = receiver.join()
    same([result["received"], result["duplicates"]], [settings.window, 0], "each packet within the window has arrived, once", result)


def swallowed_burst(world, source, gateway, target, count):
    """ESP packets that left a gateway and never arrived."""
    world.net.run("nft", "add table inet swallow; add chain inet swallow forwarded { type filter hook forward priority 0; policy drop; }")
    capture = Capture(gateway, "net", f"swallowed-from-{gateway.name}")
    source.call("burst", to=target, port=7000, count=count)
    frames = capture.frames()
    world.net.run("nft", "delete table inet swallow")
    numbers = [esp_of(frame)[1] for frame in frames]
    check(numbers == list(range(numbers[0], numbers[0] + count)), "each number is on the wire once, in order", numbers[:5], len(numbers))
    return frames
