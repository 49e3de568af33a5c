"""What is measured, and how.

    tcp1, tcp8   iperf3 h1 to h2, one and eight streams: what the receiver got, Gbit/s
    udp1400      iperf3, unlimited, IP packets of 1400 bytes from a plain sender: delivered, Gbit/s
    pps64        packet-rate, a sender with UDP_SEGMENT, IP packets of 64 bytes: delivered, Mpps
    ppsimix      the same with packets of 64, 576 and 1400 bytes as 7 : 4 : 1
    latency      round trips of ping every 2 ms: p50 and p99, idle and beside a TCP stream at full speed, ms

    soak         for those who ask: soak.py

On the side: CPU time of both gateways' processes for each packet of udp1400; of an idle tunnel; their resident memory
at its highest. A kernel charges its own work to whoever runs at the time, so CPU a packet is a comparison, no bill.
"""

import json
import os
import re
import subprocess
import time

from soak import soak
from topology import SERVER, Failed, listening, stop

PORT = "5300"
TICKS = os.sysconf("SC_CLK_TCK")
#: IP and UDP headers before a payload.
HEADERS = 28


def measure(system, topology, tools, chosen, results):
    """All chosen cases, once."""
    context = Context(system, topology, tools, chosen.seconds, results)
    if system.processes:
        before = context.cpu_seconds()
        time.sleep(max(2.0, chosen.seconds))
        idle = (context.cpu_seconds() - before) / max(2.0, chosen.seconds) / len(system.processes)
        results.add(system.name, "idle", 100 * idle, "% of a core a gateway")
    for case in chosen.cases:
        try:
            CASES[case](context)
        except (Failed, subprocess.TimeoutExpired, KeyError, ValueError) as error:
            results.failed(system.name, case, str(error))
    if system.processes:
        results.add(system.name, "memory", max(map(peak_mib, system.process_ids())), "MiB")


class Context:
    def __init__(self, system, topology, tools, seconds, results):
        self.system, self.topology, self.tools = system, topology, tools
        self.seconds, self.results = seconds, results

    def add(self, case, value, unit, what=None):
        self.results.add(self.system.name, case, value, unit, what)

    def cpu_seconds(self):
        return sum(map(cpu_seconds, self.system.process_ids()))

    def iperf(self, *arguments, server=SERVER, seconds=None):
        """One run; iperf3's own account of it."""
        seconds = seconds or self.seconds
        listener = self.iperf_server()
        try:
            client = ["iperf3", "-c", server, "-p", PORT, "-t", str(seconds), "-J", *arguments]
            return json.loads(self.topology.run("h1", *client, seconds=seconds + 20))["end"]
        finally:
            stop(listener)

    def iperf_server(self, port=PORT):
        return listening(self.topology.start("h2", "iperf3", "-s", "-1", "-p", port), port)


def tcp(streams):
    def case(context):
        end = context.iperf("-P", str(streams))
        context.add(f"tcp{streams}", end["sum_received"]["bits_per_second"] / 1e9, "Gbit/s")

    return case


def udp1400(context):
    before = context.cpu_seconds()
    end = context.iperf("-u", "-b", "0", "-l", str(1400 - HEADERS))["sum"]
    delivered = end["packets"] - end["lost_packets"]
    context.add("udp1400", delivered * 1400 * 8 / end["seconds"] / 1e9, "Gbit/s")
    if context.system.processes and delivered:
        context.add("cpu", (context.cpu_seconds() - before) / delivered * 1e6, "µs a packet")


def packets(mix):
    def case(context):
        rate = context.tools.packet_rate
        receiver = context.topology.start("h2", rate, "receive", SERVER, mix, context.seconds, stdout=subprocess.PIPE)
        time.sleep(0.2)
        context.topology.run("h1", rate, "send", SERVER, mix, context.seconds + 1)
        answer, _ = receiver.communicate(timeout=10)
        if receiver.returncode != 0:
            raise Failed(f"packet-rate receive: {answer.decode().strip() or 'nothing arrived'}")
        context.add(f"pps{mix}", float(answer) / 1e6, "Mpps")

    return case


def latency(context):
    time.sleep(1)  # what the case before has left in the queues is not idle
    round_trips(context, "idle")
    server = context.iperf_server()
    load = context.topology.start("h1", "iperf3", "-c", SERVER, "-p", PORT, "-t", str(context.seconds + 2))
    time.sleep(1)
    try:
        round_trips(context, "loaded")
    finally:
        stop(load)
        stop(server)


def round_trips(context, load):
    count = int(context.seconds / 0.002)
    ping = [context.tools.ping, "-i", "0.002", "-c", str(count), "-W", "1", SERVER]
    output = context.topology.run("h1", *ping, seconds=context.seconds * 5 + 10)
    times = sorted(map(float, re.findall(r"time=([\d.]+) ms", output)))
    if len(times) < count // 2:
        raise Failed(f"only {len(times)} of {count} pings were answered")
    for percent in (50, 99):
        context.add("latency", times[len(times) * percent // 100], "ms", f"p{percent} {load}")


def cpu_seconds(process):
    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_mib(process):
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) / 1024


CASES = {
    "tcp1": tcp(1),
    "tcp8": tcp(8),
    "udp1400": udp1400,
    "pps64": packets("64"),
    "ppsimix": packets("imix"),
    "latency": latency,
    "soak": soak,
}
#: Measured unless others are asked for.
USUAL = [name for name in CASES if name != "soak"]
