"""Two hosts behind two gateways, each a network namespace.

       core 0                                                        core 1
    ┌──────────┐      ┌────────────────┐            ┌────────────────┐      ┌──────────┐
    │ h1       │      │ g1             │            │ g2             │      │ h2       │
    │ 10.1.0.2 ├─veth─┤ 10.1.0.1       │            │       10.2.0.1 ├─veth─┤ 10.2.0.2 │
    │ client   │      │ 192.0.2.1      ╞════veth════╡      192.0.2.2 │      │ server   │
    └──────────┘      └────────────────┘            └────────────────┘      └──────────┘
      inner links: MTU 1420, like every tunnel           outer link: MTU 1500

The same in IPv6: fd00:1::2 and fd00:1::1, 2001:db8::1 and 2001:db8::2, fd00:2::1 and fd00:2::2.
Only namespaces that carry this process's number are made, and all of them are removed again.
"""

import contextlib
import os
import re
import subprocess
import time
from pathlib import Path

INNER_MTU = 1420
#: What the server answers to, in either family.
SERVER = "10.2.0.2"
SERVER6 = "fd00:2::2"
CORES = sorted(os.sched_getaffinity(0))[:2]
#: Everything measured runs at this niceness: a build in the background takes next to nothing then.
NICENESS = "-20"


class Topology:
    def __init__(self):
        self.prefix = f"esplane-compare-{os.getpid()}"
        self.processes = []

    def __enter__(self):
        try:
            self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            stop(process)
        for machine in ("h1", "g1", "g2", "h2"):
            subprocess.run(["ip", "netns", "delete", self.name(machine)], stderr=subprocess.DEVNULL, check=False)

    def name(self, machine):
        return f"{self.prefix}-{machine}"

    def make(self):
        for machine in ("h1", "g1", "g2", "h2"):
            run("ip", "netns", "add", self.name(machine))
            self.ip(machine, "link", "set", "lo", "up")
        for host, gateway, number in (("h1", "g1", 1), ("h2", "g2", 2)):
            self.veth(host, "eth0", gateway, "inner")
            for machine, link in ((host, "eth0"), (gateway, "inner")):
                self.ip(machine, "link", "set", link, "mtu", str(INNER_MTU), "up")
            self.address(host, "eth0", f"10.{number}.0.2/24", f"fd00:{number}::2/64")
            self.address(gateway, "inner", f"10.{number}.0.1/24", f"fd00:{number}::1/64")
            for router in (f"10.{number}.0.1", f"fd00:{number}::1"):
                self.ip(host, "route", "add", "default", "via", router)
            self.sysctl(gateway, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
            self.sysctl(gateway, "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
        self.veth("g1", "outer", "g2", "outer")
        for gateway, number in (("g1", 1), ("g2", 2)):
            self.ip(gateway, "link", "set", "outer", "up")
            self.address(gateway, "outer", f"192.0.2.{number}/24", f"2001:db8::{number}/64")

    def veth(self, left, left_link, right, right_link):
        peer = ["peer", "name", right_link, "netns", self.name(right)]
        run("ip", "link", "add", left_link, "netns", self.name(left), "type", "veth", *peer)

    def ip(self, machine, *arguments):
        run("ip", "-netns", self.name(machine), *arguments)

    def address(self, machine, link, *networks):
        """Addresses that can be used at once: nobody else is there to have them."""
        for network in networks:
            self.ip(machine, "address", "add", network, "dev", link, *(["nodad"] if ":" in network else []))

    def sysctl(self, machine, *settings):
        run("ip", "netns", "exec", self.name(machine), "sysctl", "-qw", *settings)

    def command(self, machine, *arguments):
        """The words that run a program on a machine, on its core."""
        core = str(CORES[machine in ("g2", "h2")])
        inside = ["ip", "netns", "exec", self.name(machine)]
        return [*inside, "nice", "-n", NICENESS, "taskset", "-c", core, *map(str, arguments)]

    def run(self, machine, *arguments, seconds=30):
        """Runs a program to its end; what it printed."""
        done = subprocess.run(
            self.command(machine, *arguments),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False,
        )
        if done.returncode != 0:
            raise Failed(f"{' '.join(map(str, arguments))}: {done.stderr.strip() or done.stdout.strip()[-300:]}")
        return done.stdout

    def start(self, machine, *arguments, log=None, **options):
        """Starts a program that ends with the topology, at the latest."""
        output = open(log, "wb") if log else subprocess.DEVNULL
        with output if log else contextlib.nullcontext():
            settings = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, **options}
            process = subprocess.Popen(self.command(machine, *arguments), **settings)
        self.processes.append(process)
        return process


class Failed(Exception):
    """A program on one of the machines."""


def run(*arguments):
    subprocess.run(arguments, check=True, stdin=subprocess.DEVNULL)


def stop(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listening(server, port):
    """The process, once it takes TCP connections there, however slow the machine is."""
    waiting = re.compile(rf":{int(port):04X} \S+ 0A ")  # local address, remote address, state LISTEN

    def listens():
        if server.poll() is not None:
            raise Failed(f"what should listen on port {port} has ended with {server.returncode}")
        for table in ("tcp", "tcp6"):  # of the process's namespace; a kernel without IPv6 has no second
            with contextlib.suppress(OSError):
                if waiting.search(Path(f"/proc/{server.pid}/net/{table}").read_text()):
                    return True
        return False

    eventually(listens, f"something listens on port {port}")
    return server


def eventually(condition, what, seconds=15):
    """Waits until the condition holds, as short as possible."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > end:
            raise Failed(f"not within {seconds} s: {what}")
        time.sleep(0.05)
    return result
