"""A minute at full speed, for those who ask for it, with both families inside the tunnel.

Eight TCP streams, half of them IPv6, load it for as long as is asked for. Beside them pass, over either family: 1 GiB
whose SHA-256 must be the same at both ends; datagrams of all sizes at the edges, with Don't Fragment; numbered UDP of one flow, of
which none may overtake another. The figure is what the gateways' anonymous memory grows by from half-time on: a leak goes on growing,
buffers that were needed for the first time do not.
"""

import re
import subprocess
import sys
from pathlib import Path

from topology import SERVER, SERVER6, Failed, listening, stop

ENDS = Path(__file__).with_name("ends.py")
TRANSFER_MIB = 1024
HEADERS = {SERVER: 20 + 8, SERVER6: 40 + 8}


def soak(context):
    loads = [Load(context, server, port) for server, port in ((SERVER, 5310), (SERVER6, 5311))]
    pass_over(context, SERVER)
    half_time = anonymous_mib(context)
    pass_over(context, SERVER6)
    for load in loads:
        load.finish()
    context.add("soak", anonymous_mib(context) - half_time, "MiB", "memory grown")


def pass_over(context, server):
    transfer(context, server)
    edges(context, server)
    order(context, server)


class Load:
    """Four TCP streams of one family."""

    def __init__(self, context, server, port):
        self.seconds = context.seconds
        self.server = context.iperf_server(port)
        words = ["iperf3", "-c", server, "-p", port, "-P", 4, "-t", self.seconds]
        self.client = context.topology.start("h1", *words)

    def finish(self):
        """The whole time must have passed, and without an error."""
        status = self.client.wait(timeout=self.seconds + 60)
        stop(self.server)
        if status != 0:
            raise Failed(f"the load has ended with {status}")


def transfer(context, server):
    receiver = ends(context, "h2", "receive", server, 5301, TRANSFER_MIB, stdout=subprocess.PIPE)
    listening(receiver, 5301)
    sent = asked(context, "send", server, 5301, TRANSFER_MIB)
    received = receiver.communicate(timeout=60)[0].decode().split()
    if sent != received:
        raise Failed(f"of {TRANSFER_MIB} MiB sent to {server} as {sent} arrived {received}")


def edges(context, server):
    echo = ends(context, "h2", "echo", server, 5303)
    try:
        asked(context, "ask", server, 5303, context.system.mtu)
    finally:
        stop(echo)


def order(context, server):
    data = context.system.mtu - HEADERS[server]
    seconds = max(1, context.seconds // 3)  # both families within the load's time
    flow = context.iperf("-u", "-b", "400M", "-l", str(data), "--get-server-output", server=server, seconds=seconds)
    if overtaken := flow["streams"][0]["udp"]["out_of_order"]:
        raise Failed(f"{overtaken} packets of one UDP flow to {server} were overtaken")


def ends(context, machine, *words, **options):
    return context.topology.start(machine, sys.executable, ENDS, *words, **options)


def asked(context, *words):
    return context.topology.run("h1", sys.executable, ENDS, *words, seconds=context.seconds + 120).split()


def anonymous_mib(context):
    def of(process):
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024

    return sum(map(of, context.system.process_ids()))
