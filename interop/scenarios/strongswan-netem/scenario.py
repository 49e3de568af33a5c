"""Across an Internet with 100 ms delay, 2 % loss and 25 % reordering Esplane drops nothing of its own and finds no ICV wrong.

ga: charon and Esplane (mode A); gb: charon and the kernel's ESP. Packets are lost on the way, as netem is told, and nowhere else:
what Esplane receives and does not receive adds up to what gb's kernel sent.
"""

from lab.behind import Plan, Sites
from lab.runner import Scenario
from lab.world import check

ROWS = {
    "esn-v4": Plan(child="replay_window = 4096"),
    "noesn-udp-v6": Plan("aes256gcm16", esn=False, inner="v6", outer="v6", encap=True, child="replay_window = 4096"),
}


def scenarios():
    for name, plan in ROWS.items():
        yield Scenario(f"strongswan-netem-{name}", lambda world, plan=plan: weather(world, plan))


def weather(world, plan):
    sites = Sites(world, plan).start()
    world.netem("delay 100ms 10ms loss 2% reorder 25% 50% limit 10000")
    with sites.flow(packets_per_second=150) as flow:
        flow.keep(seconds=4)
        sites.charon_a.swanctl("--rekey", "--child", "net")
        flow.keep(seconds=6)
    sent = sum(end["sent"] for end in flow.sent)
    lost = sum(flow.lost())
    reordered = sum(end["reordered"] for end in flow.received)
    sites.all_is_well()
    check(reordered > sent / 50, "the weather was real: packets were reordered", reordered, sent)
    check(0 < lost < sent / 10, "packets were lost on the way, and not many more than netem takes", lost, sent)
    return f"{sent} packets, {lost} lost on the way, {reordered} reordered, none dropped by Esplane"
