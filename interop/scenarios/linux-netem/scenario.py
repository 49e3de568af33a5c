"""Across an Internet with 100 ms delay, 2 % loss and 25 % reordering, keyed by hand: neither end drops a packet of its own."""

from lab.keyed_by_hand import Settings, Tunnel
from lab.runner import Scenario
from lab.wire import Capture
from lab.world import check, eventually_same, same


def scenarios():
    for suite, udp in (("gcm128", False), ("chacha", True)):
        settings = Settings(suite=suite, esn=True, udp=udp, window=4096)
        yield Scenario(f"linux-netem-{suite}{'-udp' if udp else ''}", lambda world, settings=settings: weather(world, settings))


def weather(world, settings):
    tunnel = Tunnel(world, settings)
    tunnel.ping(world.a)
    world.netem("delay 100ms 10ms loss 2% reorder 25% 50% limit 10000")
    # Behind the weather: what really arrives.
    captures = [Capture(world.net, "gb", "to-b"), Capture(world.net, "ga", "to-a")]
    receivers = [host.background("flow_receive", address=address, port=7001) for host, address in ((world.b, tunnel.b), (world.a, tunnel.a))]
    senders = [host.background("flow_send", to=address, port=7001, packets_per_second=200, seconds=6) for host, address in ((world.a, tunnel.b), (world.b, tunnel.a))]
    sent, received = [sender.join() for sender in senders], [receiver.join() for receiver in receivers]
    arrived = [len(capture.frames()) for capture in captures]
    same(tunnel.esplane.drops(), {}, "Esplane drops nothing")
    same(tunnel.linux.statistics(), {}, "the kernel drops nothing")
    # One packet more each way: the ping.
    eventually_same(lambda: tunnel.packets()[1], arrived[1] + 1, "Esplane takes every packet that arrives")
    same(tunnel.linux.sa(tunnel.SPI_TO_B)["packets"], arrived[0] + 1, "the kernel takes every packet that arrives")
    lost, reordered = sum(end["lost"] for end in received), sum(end["reordered"] for end in received)
    total = sum(end["sent"] for end in sent)
    check(reordered > total / 50 and 0 < lost < total / 10, "the weather was real", received)
    return f"{total} packets, {lost} lost on the way, {reordered} reordered, none dropped"
