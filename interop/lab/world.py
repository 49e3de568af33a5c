"""The hosts of one scenario, the links between them, and what a scenario checks with.

The usual layout, `World.site_to_site`:

```text
     a ────────── ga ═════════════ net ═════════════ gb ────────── b
 10.1.0.2     10.1.0.1 198.51.100.1 │ 203.0.113.1 10.2.0.1     10.2.0.2
 fd00:1::2  fd00:1::1 2001:db8:a::1 │ 2001:db8:b::1 fd00:2::1 fd00:2::2
                                    └ the Internet: netem, NAT, captures
```
"""

import base64
import shlex
import time

# How long what must come may take: an emulated processor on a busy machine is slow, and nothing here is about speed.
PATIENCE = 120


class Failed(AssertionError):
    """Something that must hold does not."""


class Host:
    """A network namespace with a name."""

    def __init__(self, world, name):
        self.world, self.name, self.place = world, name, world.place

    def run(self, *argv, ok=True, input=None, timeout=120, env=None):
        """A command on this host, to its end; what it printed. It must succeed unless `ok` is false."""
        result = self.try_run(*argv, input=input, timeout=timeout, env=env)
        if ok and result["status"] != 0:
            raise Failed(f"on {self.name}: {shlex.join(map(str, argv))}\nstatus {result['status']}\n{result['out']}{result['err']}")
        return result["out"]

    def try_run(self, *argv, input=None, timeout=120, env=None):
        argv = [str(word) for word in argv]
        return self.place.ask("run", argv=argv, netns=self.name, input=input, timeout=timeout, env=env, patience=timeout + 30)

    def sh(self, script, **options):
        return self.run("sh", "-ec", script, **options)

    def ip(self, batch):
        """Lines for `ip -batch`."""
        return self.run("ip", "-batch", "-", input=batch)

    def start(self, *argv, log=None, env=None):
        """A process that stays, until the scenario ends or `kill`."""
        argv = [str(word) for word in argv]
        return Process(self, self.place.ask("start", argv=argv, netns=self.name, log=log, env=env), log)

    def call(self, function, patience=180, **args):
        """A function of guest/traffic.py on this host; what it returns."""
        return self.place.ask("call", function=function, netns=self.name, args=args, patience=patience)

    def background(self, function, **args):
        """The same in the background; `.join()` gives its result."""
        return Background(self.place, self.place.ask("call", function=function, netns=self.name, args=args, background=True))

    def write(self, path, text, mode=0o644):
        data = text if isinstance(text, bytes) else text.encode()
        self.place.ask("write", path=path, data=base64.b64encode(data).decode(), mode=mode)

    def read(self, path):
        return base64.b64decode(self.place.ask("read", path=path))


class Process:
    def __init__(self, host, pid, log):
        self.host, self.pid, self.log = host, pid, log

    def send(self, number):
        self.host.place.ask("signal", pid=self.pid, number=number)

    def wait(self, seconds=30):
        """Its exit status; it must have ended by then."""
        status = self.host.place.ask("wait", pid=self.pid, timeout=seconds, patience=seconds + 30)
        check(status is not None, f"process {self.log} on {self.host.name} ends within {seconds} s")
        return status

    def running(self):
        return self.host.place.ask("wait", pid=self.pid, timeout=0) is None

    def said(self):
        return self.host.read(f"/work/{self.log}").decode(errors="replace")


class Background:
    def __init__(self, place, handle):
        self.place, self.handle = place, handle

    def join(self, seconds=120):
        return self.place.ask("join", handle=self.handle, timeout=seconds, patience=seconds + 30)


class World:
    """One scenario's hosts."""

    def __init__(self, place, directory, root):
        self.place, self.directory, self.root = place, directory, root
        self.hosts = {}
        place.steps = directory / "steps"

    def host(self, name):
        """A new host; it forwards packets, and its addresses can be used at once."""
        self.sh(f"""
            ip netns add {name}
            ip netns exec {name} sh -ec '
                ip link set lo up
                cd /proc/sys/net
                echo 1 >ipv4/ip_forward; echo 1 >ipv6/conf/all/forwarding
                for which in all default; do
                    echo 0 >ipv4/conf/$which/rp_filter; echo 0 >ipv6/conf/$which/accept_dad; echo 0 >ipv4/conf/$which/send_redirects
                done'""")  # fmt: skip
        self.hosts[name] = Host(self, name)
        return self.hosts[name]

    def sh(self, script):
        """Shell lines in the place itself, outside of all hosts."""
        result = self.place.ask("run", argv=["sh", "-ec", script])
        check(result["status"] == 0, f"{script.strip()}", result["out"] + result["err"])

    def link(self, one, other, one_addresses=(), other_addresses=()):
        """A cable between two hosts; on each its end is named after the other."""
        self.sh(f"ip link add {other.name} netns {one.name} type veth peer name {one.name} netns {other.name}")
        for host, device, addresses in ((one, other.name, one_addresses), (other, one.name, other_addresses)):
            batch = [f"link set dev {device} up"]
            batch += [f"address add {address} dev {device}{' nodad' if ':' in address else ''}" for address in addresses]
            host.ip("\n".join(batch) + "\n")

    def site_to_site(self, nat=False):
        """The usual five hosts, with routes; `world.a` and so on. With a NAT in front of ga, ga is 192.168.7.1."""
        self.a, self.ga, self.net, self.gb, self.b = (self.host(name) for name in ("a", "ga", "net", "gb", "b"))
        self.link(self.a, self.ga, ["10.1.0.2/24", "fd00:1::2/64"], ["10.1.0.1/24", "fd00:1::1/64"])
        self.link(self.b, self.gb, ["10.2.0.2/24", "fd00:2::2/64"], ["10.2.0.1/24", "fd00:2::1/64"])
        edge = self.host("nat") if nat else self.ga
        self.link(edge, self.net, ["198.51.100.1/24", "2001:db8:a::1/64"], ["198.51.100.254/24", "2001:db8:a::fe/64"])
        self.link(self.gb, self.net, ["203.0.113.1/24", "2001:db8:b::1/64"], ["203.0.113.254/24", "2001:db8:b::fe/64"])
        defaults = [(self.a, "ga", "10.1.0.1", "fd00:1::1"), (self.b, "gb", "10.2.0.1", "fd00:2::1"),
                    (edge, "net", "198.51.100.254", "2001:db8:a::fe"), (self.gb, "net", "203.0.113.254", "2001:db8:b::fe")]  # fmt: skip
        outer = [(edge, "net"), (self.net, edge.name), (self.gb, "net"), (self.net, "gb")]
        if nat:
            self.link(self.ga, edge, ["192.168.7.1/24"], ["192.168.7.254/24"])
            self.ga.ip("route add default via 192.168.7.254 dev nat\n")
            edge.run("nft", "add table ip n; add chain ip n post { type nat hook postrouting priority 100; }; add rule ip n post oifname net masquerade")
            outer += [(self.ga, "nat"), (edge, "ga")]
        for host, device, *addresses in defaults:
            host.ip("".join(f"route add default via {address} dev {device}\n" for address in addresses))
        # What crosses the Internet is seen packet by packet.
        for host, device in outer:
            host.call("offloads_off", devices=[device])
        self.outer = [(self.net, edge.name), (self.net, "gb")]
        return self

    def netem(self, settings):
        """Both directions of the Internet delay, lose or reorder; without settings they do so no more."""
        for host, device in self.outer:
            what = ["replace", "dev", device, "root", "netem", *settings.split()] if settings else ["del", "dev", device, "root"]
            host.run("tc", "qdisc", *what, ok=bool(settings))


OUTER = {
    "v4": ("198.51.100.1", "203.0.113.1"),
    "v6": ("2001:db8:a::1", "2001:db8:b::1"),
}
INNER = {
    "v4": ("10.1.0.0/24", "10.2.0.0/24", "10.1.0.2", "10.2.0.2"),
    "v6": ("fd00:1::/64", "fd00:2::/64", "fd00:1::2", "fd00:2::2"),
}


def check(holds, what, *details):
    """`what` says what an operator would expect to be true."""
    if not holds:
        raise Failed("\n".join([f"does not hold: {what}", *map(str, details)]))


def same(found, expected, what, *details):
    check(found == expected, f"{what}: expected {expected}, found {found}", *details)


def eventually(condition, what, seconds=PATIENCE, pause=0.1):
    """Waits until the condition gives something true, and gives it."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        check(time.monotonic() < end, f"within {seconds} s: {what}")
        time.sleep(pause)
    return result





def eventually_same(measure, expected, what, seconds=PATIENCE):
    """Waits until a measure gives the value expected; else says what it gave last."""
    end = time.monotonic() + seconds
    while (found := measure()) != expected:
        check(time.monotonic() < end, f"within {seconds} s: {what}: expected {expected}, found {found}")
        time.sleep(0.1)
