"""Two machines in network namespaces of their own, and the daemons on them.

      berlin                                            oslo
    ┌───────────────────────┐                         ┌───────────────────────┐
    │ esp0  10.1.0.1/16     │                         │ esp0  10.2.0.1/16     │
    │       fd00:1::1/64    │                         │       fd00:2::1/64    │
    │   esplane run         │                         │   esplane run         │
    │ eth0  192.0.2.1/24    │ ══════ veth pair ══════ │ eth0  192.0.2.2/24    │
    │       2001:db8::1/64  │   ▲ Wiretap             │       2001:db8::2/64  │
    └───────────────────────┘                         └───────────────────────┘

Only namespaces that carry this process's number are made, and all of them are removed again.
"""

import contextlib
import ctypes
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
MARKER = b"CLEAR-TEXT-HERE!"
LIBC = ctypes.CDLL(None, use_errno=True)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, stdin=subprocess.DEVNULL)


def eventually(condition, what, seconds=20):
    """Waits until the condition holds, as short as possible."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return result


class Machine:
    """A network namespace with one link to the other machine."""

    def __init__(self, name, number):
        self.name, self.number = name, number
        self.namespace = f"esplane-test-{os.getpid()}-{name}"
        self.v4, self.v6 = f"192.0.2.{number}", f"2001:db8::{number}"
        self.inner_v4, self.inner_v6 = f"10.{number}.0.1", f"fd00:{number}::1"

    @contextlib.contextmanager
    def inside(self):
        """What this thread does within the block, it does on this machine."""
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.namespace}") as there:
            assert LIBC.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert LIBC.setns(home.fileno(), CLONE_NEWNET) == 0

    def socket(self, *arguments):
        """A socket stays on the machine where it was made."""
        with self.inside():
            return socket.socket(*arguments)

    def ip(self, *arguments):
        ip("-netns", self.namespace, *arguments)

    def link(self, name):
        """What the kernel says of one of its interfaces."""
        command = ["ip", "-netns", self.namespace, "link", "show", name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def links(self):
        with self.inside():
            return [name for _, name in socket.if_nameindex()]

    def routes(self):
        return self.shown("route")

    def rules(self):
        return self.shown("rule")

    def shown(self, what):
        command = ["ip", "-netns", self.namespace, what, "show"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def echo(self, address, size=100, timeout=1.0):
        """One UDP round trip to the echo service on `address`; whether the answer came."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(timeout)
            question = (MARKER + os.urandom(8)).ljust(size, b".")
            try:
                client.sendto(question, (address, 7))
                return client.recv(65535) == question
            except OSError:
                return False

    def ping(self, address, timeout=1.0):
        """One ICMP echo; the kernel at `address` answers."""
        with self.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as client:
            client.settimeout(timeout)
            body = MARKER + os.urandom(8)
            client.sendto(icmp_echo(body), (address, 0))
            try:
                while True:
                    answer = client.recv(2048)[20:]
                    if answer[0] == 0 and answer[8:] == body:
                        return True
            except OSError:
                return False


def icmp_echo(body):
    packet = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + body
    total = sum(struct.unpack(f"!{len(packet) // 2}H", packet))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return packet[:2] + struct.pack("!H", total ^ 0xFFFF) + packet[4:]


class EchoService(threading.Thread):
    """Answers UDP port 7 on all addresses of a machine."""

    def __init__(self, machine):
        super().__init__(daemon=True)
        self.socket = machine.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.socket.bind(("::", 7))
        self.stopping = False

    def run(self):
        while True:
            data, sender = self.socket.recvfrom(65535)
            if self.stopping:
                return
            with contextlib.suppress(OSError):
                self.socket.sendto(data, sender)

    def stop(self):
        """Ends the thread first: one that still waits here when the descriptor's number is used again may take what comes there."""
        self.stopping = True
        with contextlib.suppress(OSError):  # it is not connected, and is woken all the same
            self.socket.shutdown(socket.SHUT_RDWR)
        self.join()
        self.socket.close()


class Wiretap(threading.Thread):
    """Keeps every frame on a machine's eth0."""

    def __init__(self, machine):
        super().__init__(daemon=True)
        self.frames = []
        with machine.inside():
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            self.socket.bind(("eth0", 0))
        self.socket.settimeout(0.1)
        self.stopping = False

    def run(self):
        while not self.stopping:
            try:
                self.frames.append(self.socket.recv(65535))
            except TimeoutError:
                continue
            except OSError:  # the interface is gone
                return

    def stop(self):
        self.stopping = True
        self.join()
        self.socket.close()

    def clear_frames(self):
        return [frame for frame in self.frames if MARKER in frame]

    def datagrams(self, port):
        """IPv4 UDP frames to a port."""
        return [f for f in self.frames if f[12:14] == b"\x08\x00" and f[23] == 17 and f[36:38] == port.to_bytes(2, "big")]

    def plain_esp(self):
        """IPv4 frames of protocol 50."""
        return [f for f in self.frames if f[12:14] == b"\x08\x00" and f[23] == 50]


class Daemon:
    """`esplane run` on a machine."""

    def __init__(self, program, machine, directory):
        self.program, self.machine = program, machine
        self.directory = Path(directory) / machine.name
        self.directory.mkdir()
        self.config_file = self.directory / "esplane.yaml"
        self.socket_file = self.directory / "esplane.sock"
        self.log_file = self.directory / "log"
        self.process = None

    def run(self, *arguments, text=None):
        """Another esplane command, on this machine."""
        with self.machine.inside():
            return subprocess.run([self.program, *arguments], capture_output=True, text=True, input=text or "", timeout=30)

    def keygen(self):
        """Makes the private key; returns the public one."""
        result = self.run("keygen", "-o", self.directory / "private.key")
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[-1]

    def write_config(self, body="", private_key="private.key"):
        number = self.machine.number
        self.config_file.write_text(f"""\
name: {self.machine.name}
{f"private_key_file: {private_key}" if private_key else ""}
state_dir: {self.directory}/state
interface:
  name: esp0
  addresses: [10.{number}.0.1/16, "fd00:{number}::1/64"]
api:
  listen: 127.0.0.1:9470
  socket: {self.socket_file}
{body}
""")

    def start(self, ready=True, hosts=None, under=()):
        """`hosts` is a file that stands in for /etc/hosts, for this process alone; `under` are words before the command."""
        with self.machine.inside(), open(self.log_file, "ab") as log:
            command = [self.program, "run", "-c", self.config_file]
            if hosts:
                swap = 'mount --bind "$0" /etc/hosts && exec "$@"'
                command = ["unshare", "--mount", "sh", "-c", swap, hosts, *command]
            self.process = subprocess.Popen([*under, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if ready:
            eventually(self.is_ready, f"{self.machine.name} is ready\n{self.log()}")
        return self

    def is_ready(self):
        assert self.process.poll() is None, f"{self.machine.name} has ended:\n{self.log()}"
        return self.get("/readyz")[0] == 200

    def get(self, path):
        """One HTTP request to the API; (status, body), or (0, why) if nobody answers."""
        try:
            with self.machine.inside():
                connection = http.client.HTTPConnection("127.0.0.1", 9470, timeout=5)
                connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError as error:
            return 0, str(error)

    def change(self, method, path, body=""):
        """One request over the unix socket, where changes are allowed; (status, body)."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.socket_file))
            connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            answer = http.client.HTTPResponse(connection, method=method)
            answer.begin()
            return answer.status, answer.read().decode()

    def status(self):
        code, body = self.get("/v1/status")
        assert code == 200, body
        return json.loads(body)

    def show(self, *arguments):
        result = self.run("show", *arguments, "--api", self.socket_file)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def send(self, number):
        self.process.send_signal(number)

    def stop(self, number=signal.SIGTERM):
        """Ends it; returns its exit status."""
        if self.process and self.process.poll() is None:
            self.send(number)
        return self.process.wait(timeout=15)

    def log(self):
        return self.log_file.read_text() if self.log_file.exists() else ""


class World:
    """Two machines, a link between them, a daemon's place on each, and a wiretap."""

    def __init__(self, program):
        self.program = program
        self.machines = [Machine("berlin", 1), Machine("oslo", 2)]

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        try:
            self.build()
        except BaseException:
            self.stack.close()
            raise
        return self

    def build(self):
        for machine in self.machines:
            ip("netns", "add", machine.namespace)
            self.stack.callback(ip, "netns", "del", machine.namespace)
        self.connect()
        berlin, _ = self.machines
        for machine in self.machines:
            machine.ip("link", "set", "lo", "up")
            service = EchoService(machine)
            service.start()
            self.stack.callback(service.stop)
        directory = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="esplane-test-"))
        self.daemons = [Daemon(self.program, machine, directory) for machine in self.machines]
        self.stack.callback(self.kill)
        self.tap = Wiretap(berlin)
        self.tap.start()
        self.stack.callback(self.tap.stop)

    def connect(self, queues=1):
        """The cable between both machines. Each end has so many queues each way."""
        berlin, oslo = self.machines
        end = ["name", "eth0", "numtxqueues", str(queues), "numrxqueues", str(queues)]
        berlin.ip("link", "add", *end, "type", "veth", "peer", *end, "netns", oslo.namespace)
        for machine in self.machines:
            machine.ip("address", "add", f"{machine.v4}/24", "dev", "eth0")
            machine.ip("address", "add", f"{machine.v6}/64", "dev", "eth0", "nodad")
            machine.ip("link", "set", "eth0", "up")

    def host_behind(self, gateway):
        """A host in the gateway's private network, over the gateway's interface `lan`."""
        host = Machine("host", 7)
        host.v4 = f"10.{gateway.number}.7.2"
        ip("netns", "add", host.namespace)
        self.stack.callback(ip, "netns", "del", host.namespace)
        gateway.ip("link", "add", "lan", "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        gateway.ip("address", "add", f"10.{gateway.number}.7.1/24", "dev", "lan")
        gateway.ip("link", "set", "lan", "up")
        host.ip("address", "add", f"{host.v4}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        host.ip("link", "set", "lo", "up")
        host.ip("route", "add", "default", "via", f"10.{gateway.number}.7.1")
        ip("netns", "exec", gateway.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        service = EchoService(host)
        service.start()
        self.stack.callback(service.stop)
        return host

    def kill(self):
        for daemon in self.daemons:
            if daemon.process and daemon.process.poll() is None:
                daemon.process.kill()
                daemon.process.wait()

    def __exit__(self, kind, *_):
        if kind:
            for daemon in self.daemons:
                print(f"--- {daemon.machine.name} says:\n{daemon.log()}", flush=True)
        self.stack.close()

    def configure(self, outer="v4", berlin="", oslo=""):
        """Both daemons keyed by Noise, peers of each other; more lines for either's peer entry."""
        keys = [daemon.keygen() for daemon in self.daemons]
        for own, other, more in ((0, 1, berlin), (1, 0, oslo)):
            self.daemons[own].peer_key = keys[other]
            self.daemons[own].write_config(self.peer(own, other, outer, more))

    def peer(self, own, other, outer="v4", more="", routes=()):
        peer = self.machines[other]
        address = {"v4": peer.v4, "v6": f"[{peer.v6}]"}.get(outer, outer)
        networks = ", ".join([f"10.{peer.number}.0.0/16", f'"fd00:{peer.number}::/64"', *routes])
        return f"""\
peers:
  - name: {peer.name}
    public_key: {self.daemons[own].peer_key}
    endpoint: "{address}:4500"
    routes: [{networks}]
    dead_after_seconds: 3
    {more}
"""

    def start(self):
        for daemon in self.daemons:
            daemon.start()
        return self.daemons
