"""What the real daemon does on the real kernel. Each story gets a fresh World."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from machines import Wiretap, eventually

STATIC = """\
static_sas:
  - name: {peer}
    local: {local}
    remote: {remote}
    {udp}
    suite: aes128gcm16
    inbound: {{ spi: {spi_in}, key_file: in.key }}
    outbound: {{ spi: {spi_out}, key_file: out.key }}
    routes: [10.{number}.0.0/16]
"""


def traffic_flows_and_is_shown(world):
    world.configure()
    a, b = world.start()
    berlin, oslo = world.machines
    assert berlin.ping(oslo.inner_v4, timeout=5), "the first packet brings the tunnel up and arrives"
    for size in (0, 1, 100, 1000, 1300, 1400):
        assert berlin.echo(oslo.inner_v4, 24 + size), f"UDP with {size} bytes"
        assert oslo.echo(berlin.inner_v6, 24 + size), f"UDP over IPv6 with {size} bytes"
    assert berlin.echo(oslo.inner_v4, 20_000), "fragments of a large datagram"
    assert a.get("/healthz") == (200, "ok\n") and a.get("/readyz") == (200, "ready\n")
    peer = a.status()["peers"][0]
    assert peer["up"] and peer["handshakes"] == 1 and peer["endpoint"] == f"{oslo.v4}:4500", peer
    for what, expected in (("peers", "oslo"), ("sas", "0x"), ("routes", "10.2.0.0/16"), ("drops", "")):
        assert expected in a.show(what), a.show(what)
        assert a.show(what, "--json").strip().startswith(("[", "{"))
    metrics = a.get("/metrics")[1]
    for line in ('esplane_peer_up{peer="oslo"} 1', "esplane_ready 1", "esplane_drops_total{", "esplane_sa_packets_total{"):
        assert line in metrics, f"{line} is not in\n{metrics}"
    assert world.tap.datagrams(4500) and not world.tap.clear_frames(), "only ESP and handshakes on the wire"
    assert "10.2.0.0/16 dev esp0" in berlin.routes(), berlin.routes()
    assert unexpected(a) == {} and unexpected(b) == {}


def the_readme_is_true(world):
    """The two files of README.md, word for word but for the keys and where sockets and state lie."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    files = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)  # whole files; pieces are indented
    assert len(files) == 2
    keys = dict(zip(("BERLIN", "OSLO"), [daemon.keygen() for daemon in world.daemons]))
    for daemon, file in zip(world.daemons, files):
        for name, key in keys.items():
            file = file.replace(f"PUBLIC KEY OF {name}", key)
        daemon.config_file.write_text(f"{file}state_dir: {daemon.directory}\napi: {{ socket: {daemon.socket_file} }}\n")
    a, _ = world.start()
    assert world.machines[0].ping("10.2.0.1", timeout=5)
    assert "oslo" in a.show()


def a_large_transfer_over_tcp_arrives_whole(world):
    world.configure()
    world.start()
    berlin, oslo = world.machines
    listener = oslo.socket()
    listener.bind((oslo.inner_v4, 5001))
    listener.listen()
    client = berlin.socket()
    client.settimeout(20)
    client.connect((oslo.inner_v4, 5001))
    server, _ = listener.accept()
    server.settimeout(20)
    data = os.urandom(1 << 20)
    received = bytearray()
    client.setblocking(False)
    sent = 0
    end = time.monotonic() + 60
    while len(received) < len(data):
        assert time.monotonic() < end, f"{len(received)} of {len(data)} bytes after a minute"
        if sent < len(data):
            try:
                sent += client.send(data[sent : sent + 65536])
            except BlockingIOError:
                pass
        received += server.recv(65536) if len(received) < sent else b""
    assert received == data
    for each in (client, server, listener):
        each.close()


def rekeys_under_traffic_lose_nothing(world):
    world.configure(berlin="rekey: { seconds: 3 }", oslo="rekey: { seconds: 3 }")
    a, b = world.start()
    berlin, oslo = world.machines
    eventually(lambda: berlin.echo(oslo.inner_v4), "the tunnel is up")
    trips = [berlin.echo(oslo.inner_v4, 200, timeout=2) for _ in range_for(seconds=14)]
    lost = trips.count(False)
    peer = a.status()["peers"][0]
    rekeys = peer["rekeys"]
    assert rekeys >= 3, f"{rekeys} rekeys"
    assert lost == 0, f"{lost} round trips lost over {rekeys} rekeys"
    for way in ("sent", "received"):
        assert peer[way]["packets"] > len(trips), f"{len(trips)} round trips over {rekeys} rekeys, counted {peer[way]}"
    assert unexpected(a) == {} and unexpected(b) == {}


def workers_send_with_sas_of_their_own(world):
    """RFC 9611: berlin has two workers, and offers oslo as many SAs; over rekeys both send, each with its own."""
    own = "parallel_sas: 2\n    rekey: { seconds: 4 }"
    world.configure(berlin=own, oslo=own)
    a, b = world.start()
    berlin, oslo = world.machines
    eventually(lambda: berlin.echo(oslo.inner_v4), "the tunnel is up")
    # Each from a port of its own, so that flows reach both workers.
    trips = [berlin.echo(oslo.inner_v4, 200, timeout=2) for _ in range_for(seconds=10)]
    assert trips.count(False) == 0, f"{trips.count(False)} of {len(trips)} round trips lost"
    assert a.status()["peers"][0]["rekeys"] >= 2
    for _ in range(64):
        assert berlin.echo(oslo.inner_v4, 200, timeout=2)
    for daemon in (a, b):
        sending = [sa for sa in daemon.status()["sas"] if sa["direction"] == "outbound"]
        assert sorted(sa.get("worker", 0) for sa in sending) == [0, 1], sending
        assert all(sa["traffic"]["packets"] for sa in sending), sending
        assert "sends for worker 1" in daemon.show("sas"), daemon.show("sas")
    assert unexpected(a) == {} and unexpected(b) == {}


def workers_send_from_ports_of_their_own(world):
    """So that the other end's network card tells their flows apart; the peer is where the fallback SA comes from, and may move."""
    own = "parallel_sas: 2\n    rekey: { seconds: 6 }"
    world.configure(berlin=own, oslo=own)
    for daemon in world.daemons:
        with daemon.config_file.open("a") as file:
            file.write("worker_ports: 20001\n")
    a, b = world.start()
    berlin, oslo = world.machines
    eventually(lambda: berlin.echo(oslo.inner_v4), "the tunnel is up")
    assert all("workers send from ports 20001 too" in daemon.log() for daemon in (a, b)), a.log()
    for _ in range_for(seconds=7):
        assert berlin.echo(oslo.inner_v4, 200, timeout=2)
    for daemon, peer in ((a, oslo), (b, berlin)):
        ports = {(sa.get("worker", 0), int(sa["local"].rpartition(":")[2])) for sa in daemon.status()["sas"] if sa["direction"] == "outbound"}
        assert ports == {(0, 4500), (1, 20001)}, ports
        assert "workers send from ports 20001 too" in daemon.show("tunnels"), daemon.show("tunnels")
        assert daemon.status()["peers"][0]["endpoint"] == f"{peer.v4}:4500"
    both = {(machine.v4, port) for machine in (berlin, oslo) for port in (4500, 20001)}
    assert esp_sources(world.tap) == both, esp_sources(world.tap)
    # Nothing moved, however the ports alternate; then oslo moves.
    assert not [line for line in (a.log() + b.log()).splitlines() if "is at" in line and "20001" in line]
    oslo.ip("address", "delete", f"{oslo.v4}/24", "dev", "eth0")
    oslo.ip("address", "add", "192.0.2.22/24", "dev", "eth0")
    for _ in range(20):
        oslo.echo(berlin.inner_v4, 200)
    assert berlin.echo(oslo.inner_v4, 200, timeout=2)
    eventually(lambda: a.status()["peers"][0]["endpoint"] == "192.0.2.22:4500", "berlin knows where oslo is, by its fallback SA", 30)
    assert unexpected(a) == {} and unexpected(b) == {}


def nothing_leaves_in_clear_when_the_peer_is_down(world):
    world.configure()
    a, _ = world.daemons
    a.start()
    berlin, oslo = world.machines
    for _ in range(5):
        assert not berlin.echo(oslo.inner_v4, timeout=0.3)
        assert not berlin.echo(oslo.inner_v6, timeout=0.3)
    assert not world.tap.clear_frames(), "clear text on the wire"
    assert world.tap.datagrams(4500), "it has tried a handshake"
    eventually(lambda: unexpected(a).keys() & {"hold_timeout", "hold_queue_full"}, "what waited is dropped by name")


def a_reload_adds_a_network(world):
    world.configure()
    a, b = world.start()
    berlin, oslo = world.machines
    assert berlin.ping(oslo.inner_v4, timeout=5)
    oslo.ip("address", "add", "10.9.0.1/32", "dev", "lo")
    assert not berlin.echo("10.9.0.1", timeout=0.3)
    a.write_config(world.peer(0, 1, routes=["10.9.0.0/16"]))
    a.send(signal.SIGHUP)
    eventually(lambda: berlin.echo("10.9.0.1", timeout=0.3), "the new network is reachable")
    assert "10.9.0.0/16 dev esp0" in berlin.routes()
    a.write_config(world.peer(0, 1))
    a.send(signal.SIGHUP)
    eventually(lambda: "10.9.0.0/16" not in berlin.routes(), "the network is gone again")
    assert berlin.ping(oslo.inner_v4) and a.status()["reloads"]["succeeded"] == 2


def everything_goes_through_the_hub(world):
    """A branch whose peer has 0.0.0.0/0 and ::/0 behind it: what comes from its network takes the tunnel, wherever it goes; ESP does not."""
    world.configure()
    a, b = world.daemons
    berlin, oslo = world.machines
    host = world.host_behind(oslo)
    berlin.ip("address", "add", "198.51.100.1/32", "dev", "lo")  # stands for the Internet
    branch = world.peer(1, 0).replace("10.1.0.0/16", "0.0.0.0/0").replace("fd00:1::/64", "::/0")
    b.write_config(branch)
    world.start()
    for address in ("198.51.100.1", berlin.inner_v4):
        eventually(lambda: host.echo(address, timeout=0.3), f"the host reaches {address}")
    assert oslo.echo(berlin.inner_v6, timeout=5), "and so does IPv6, from an address of the network"
    assert not world.tap.clear_frames(), "all of it as ESP"
    assert not oslo.echo("198.51.100.1", timeout=0.3), "what has another source goes as it went"
    routes = {route["destination"]: route["installed"] for route in b.status()["routes"]}
    assert routes == {"0.0.0.0/0": True, "::/0": True}, routes
    # Its own address on the way to the peer must not be one of those.
    oslo.ip("address", "add", "10.2.9.9/32", "dev", "eth0")
    oslo.ip("route", "add", f"{berlin.v4}/32", "dev", "eth0", "src", "10.2.9.9")
    b.write_config(branch.replace("dead_after_seconds: 3", "dead_after_seconds: 4"))
    b.send(signal.SIGHUP)
    eventually(lambda: b.status()["reloads"]["failed"] == 1, "the reload is refused")
    assert "ESP would run in circles" in b.log(), b.log()
    oslo.ip("route", "del", f"{berlin.v4}/32")
    b.send(signal.SIGHUP)
    eventually(lambda: b.status()["reloads"]["succeeded"] == 1, "now it is taken")
    eventually(lambda: host.echo("198.51.100.1", timeout=0.3), "the host is served on")
    assert b.stop() == 0
    assert "4303" not in oslo.rules(), oslo.rules()


def a_failed_reload_changes_nothing(world):
    world.configure()
    a, _ = world.start()
    berlin, oslo = world.machines
    assert berlin.ping(oslo.inner_v4, timeout=5)
    before = a.status()["routes"], berlin.routes(), a.status()["peers"][0]["handshakes"]
    a.write_config(world.peer(0, 1, routes=["10.9.0.0/16"]) + "    colour: blue\n")
    a.send(signal.SIGHUP)
    eventually(lambda: a.status()["reloads"]["failed"] == 1, "the reload is refused")
    assert "colour" in a.log(), "the log says why"
    assert (a.status()["routes"], berlin.routes(), a.status()["peers"][0]["handshakes"]) == before
    assert berlin.ping(oslo.inner_v4)


def sigterm_leaves_nothing_behind(world):
    for stop in (signal.SIGTERM, signal.SIGINT):
        if stop == signal.SIGTERM:
            world.configure()
        berlin, _ = world.machines
        links, routes = berlin.links(), berlin.routes()
        a = world.daemons[0].start()
        assert "esp0" in berlin.links() and a.socket_file.exists()
        assert a.stop(stop) == 0, a.log()
        assert berlin.links() == links and berlin.routes() == routes
        assert not a.socket_file.exists()


def a_killed_daemon_comes_back(world):
    world.configure()
    a, b = world.start()
    berlin, oslo = world.machines
    assert berlin.ping(oslo.inner_v4, timeout=5)
    b.stop(signal.SIGKILL)
    assert not berlin.echo(oslo.inner_v4, timeout=0.3)
    b.start()
    eventually(lambda: berlin.echo(oslo.inner_v4, timeout=0.3), "the neighbour that kept its keys recovers", seconds=40)
    assert oslo.echo(berlin.inner_v4)
    assert not world.tap.clear_frames()


def static_sas_in_udp(world):
    static_sas(world, udp="udp: {}")
    assert world.tap.datagrams(4500) and not world.tap.plain_esp()


def static_sas_in_plain_esp(world):
    static_sas(world, udp="")
    assert world.tap.plain_esp() and not world.tap.datagrams(4500)


def static_sas(world, udp):
    """Keys by hand. A killed daemon must never send a number again: the neighbour would drop it as a
    replay, and an eavesdropper would have two packets under one IV."""
    keys = ["0x" + os.urandom(20).hex() for _ in range(2)]
    for daemon, other, order in zip(world.daemons, reversed(world.machines), ((0, 1), (1, 0))):
        for name, index in zip(("in", "out"), order):
            file = daemon.directory / f"{name}.key"
            file.touch(mode=0o600)
            file.write_text(keys[index] + "\n")
        spis = ["0x00001001", "0x00001002"]
        body = STATIC.format(
            peer=other.name, local=daemon.machine.v4, remote=other.v4, udp=udp, number=other.number,
            spi_in=spis[order[0]], spi_out=spis[order[1]],
        )
        daemon.write_config(body, private_key=None)
    a, _ = world.start()
    berlin, oslo = world.machines
    for _ in range(20):
        assert berlin.echo(oslo.inner_v4)
    before = sent_number(a)
    assert before >= 20
    a.stop(signal.SIGKILL)
    a.start()
    for _ in range(20):
        assert berlin.echo(oslo.inner_v4), f"{world.daemons[1].status()['drops']}"
    after = sent_number(a)
    assert after >= before + 20, f"number {after} after the restart, {before} before it"
    assert not world.tap.clear_frames()


def nic_mode_outside(world):
    """AF_XDP on the public interface: the kernel's stack sees handshakes, and of the rest only what was inside."""
    world.configure(berlin="rekey: { seconds: 5 }")
    for daemon in world.daemons:
        with open(daemon.config_file, "a") as file:
            file.write("outer: { xdp: { interface: eth0 } }\n")
    a, b = world.start()
    berlin, oslo = world.machines
    eventually(lambda: berlin.echo(oslo.inner_v4) and oslo.echo(berlin.inner_v6), "the tunnel is up")
    for size in (0, 1, 100, 1000, 1300, 1400):
        assert berlin.echo(oslo.inner_v4, 24 + size), f"UDP with {size} bytes"
        assert oslo.echo(berlin.inner_v6, 24 + size), f"UDP over IPv6 with {size} bytes"
    assert berlin.echo(oslo.inner_v4, 20_000), "fragments of a large datagram"
    before, trips = received_by_ip(berlin), 200
    assert all(berlin.echo(oslo.inner_v4, 200) for _ in range(trips))
    seen = received_by_ip(berlin) - before
    assert trips <= seen < trips * 3 // 2, f"{seen} packets met the kernel in {trips} round trips; twice as many without AF_XDP"
    eventually(lambda: a.status()["peers"][0]["rekeys"] >= 1 and berlin.echo(oslo.inner_v4), "a rekey changes nothing")
    assert unexpected(a) == {} and unexpected(b) == {}
    assert "xdp" in berlin.link("eth0")
    a.stop(signal.SIGKILL)
    eventually(lambda: "xdp" not in berlin.link("eth0"), "the program goes with the process, however it ends")
    a.start()
    eventually(lambda: berlin.echo(oslo.inner_v4), "and it comes back")


def nic_mode_with_worker_ports(world):
    """Past the kernel, too, workers send from ports of their own, and what comes from such ports is taken."""
    berlin, oslo = world.machines
    berlin.ip("link", "delete", "eth0")
    world.connect(queues=2)  # one for each worker
    own = "parallel_sas: 2\n    rekey: { seconds: 6 }"
    world.configure(berlin=own, oslo=own)
    for daemon, more in zip(world.daemons, ("outer: { xdp: { interface: eth0 } }\n", "")):
        with daemon.config_file.open("a") as file:
            file.write(f"worker_ports: 20001\n{more}")
    a, b = world.start()
    eventually(lambda: berlin.echo(oslo.inner_v4), "the tunnel is up")
    near, far = Wiretap(berlin), Wiretap(oslo)
    for tap in (near, far):
        tap.start()

    def past_the_kernel():
        """Berlin's kernel sees no ESP, of which oslo's sees all."""
        for tap in (near, far):
            tap.frames.clear()
        assert all(berlin.echo(oslo.inner_v4, 200, timeout=2) for _ in range(64))
        return not esp_sources(near)

    both = {(machine.v4, port) for machine in (berlin, oslo) for port in (4500, 20001)}
    eventually(past_the_kernel, "next hops are known")
    assert esp_sources(far) == both, esp_sources(far)
    rekeys = a.status()["peers"][0]["rekeys"]
    for _ in range_for(seconds=7):
        assert berlin.echo(oslo.inner_v4, 200, timeout=2)
    assert a.status()["peers"][0]["rekeys"] > rekeys
    eventually(past_the_kernel, "and a rekey changes nothing")
    assert esp_sources(far) == both, esp_sources(far)
    for tap in (near, far):
        tap.stop()
    assert unexpected(a) == {} and unexpected(b) == {}


def esp_sources(tap):
    """From which addresses and ports ESP in UDP came by there."""
    esp = (frame for frame in tap.datagrams(4500) if frame[42:46] != bytes(4))
    return {(socket.inet_ntoa(frame[26:30]), int.from_bytes(frame[34:36], "big")) for frame in esp}


def nic_mode_over_ipv6(world):
    world.configure(outer="v6")
    for daemon in world.daemons:
        with open(daemon.config_file, "a") as file:
            file.write("outer: { xdp: { interface: eth0, queues: 1 } }\n")
    a, b = world.start()
    berlin, oslo = world.machines
    eventually(lambda: berlin.echo(oslo.inner_v4), "the tunnel is up")
    for size in (24, 500, 1300):
        assert berlin.echo(oslo.inner_v4, size) and oslo.echo(berlin.inner_v6, size)
    assert unexpected(a) == {} and unexpected(b) == {}


def nic_mode_on_both_sides(world):
    """A host behind berlin, whose packets go from one network card to the other without the kernel."""
    world.configure()
    berlin, oslo = world.machines
    host = world.host_behind(berlin)
    a, b = world.daemons
    with open(a.config_file, "a") as file:
        file.write("outer: { xdp: { interface: eth0 } }\ninner: { xdp: { interface: lan } }\n")
    world.start()
    eventually(lambda: host.echo(oslo.inner_v4), "the host reaches the far network")
    eventually(lambda: oslo.echo(host.v4), "and is reached")
    for size in (24, 25, 1000, 1300, 1400):
        assert host.echo(oslo.inner_v4, size, timeout=5), f"{size} bytes"
    eventually(lambda: host.echo(oslo.inner_v4, 3000), "more than the tunnel takes: the kernel tells the host, or cuts")
    seen, trips = [], 200

    def pass_by_the_kernel():
        before = received_by_ip(berlin)
        assert all(host.echo(oslo.inner_v4, 200, timeout=2) for _ in range(trips))
        seen.append(received_by_ip(berlin) - before)
        return seen[-1] < trips // 2

    # What next hops are not yet known for meets the kernel, four packets a trip.
    eventually(pass_by_the_kernel, f"packets pass by the kernel; of {trips} round trips it saw {seen}")
    assert host.ping(berlin.inner_v4) and berlin.echo(oslo.inner_v4), "the gateway itself is still there"
    assert unexpected(a) == {} and unexpected(b) == {}


def nic_mode_as_a_service(world):
    """What README's unit leaves to the daemon of root's rights suffices."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    left = re.search(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)[1].lower().split()
    bounds = ",".join(["-all", *(f"+{name.removeprefix('cap_')}" for name in left)])
    world.configure()
    for daemon in world.daemons:
        with open(daemon.config_file, "a") as file:
            file.write("outer: { xdp: { interface: eth0 } }\n")
        daemon.start(under=["setpriv", f"--bounding-set={bounds}", "--no-new-privs"])
    berlin, oslo = world.machines
    eventually(lambda: berlin.echo(oslo.inner_v4), "the tunnel is up")
    for daemon in world.daemons:
        assert "not permitted" not in daemon.log(), daemon.log()


def nic_mode_while_the_interface_changes(world):
    """Down and up, another MTU, another MAC address; at last it is deleted and made anew, and packets go by the kernel."""
    world.configure()
    a, b = world.daemons
    with open(a.config_file, "a") as file:
        file.write("outer: { xdp: { interface: eth0 } }\n")
    world.start()
    berlin, oslo = world.machines
    eventually(lambda: berlin.echo(oslo.inner_v4), "the tunnel is up")
    mac = "02:00:00:00:77:01"
    oslo_mac = oslo.link("eth0").split("link/ether ")[1].split()[0]
    for change in ("down", "up", "mtu 1400", "mtu 1500", f"address {mac}"):
        berlin.ip("link", "set", "eth0", *change.split())
        if change != "down":
            for size in (24, 1000, 1300):
                eventually(lambda size=size: berlin.echo(oslo.inner_v4, size), f"{size} bytes after `{change}`")
    tap = Wiretap(oslo)
    tap.start()

    def senders():
        tap.frames.clear()
        assert all(berlin.echo(oslo.inner_v4) for _ in range(500))
        return {frame[6:12].hex(":") for frame in tap.datagrams(4500)} - {oslo_mac}

    eventually(lambda: senders() == {mac}, "all frames come from the new address, whoever sends them")
    assert "xdp" in berlin.link("eth0")
    berlin.ip("link", "delete", "eth0")
    tap.stop()
    eventually(lambda: "eth0 is gone" in a.log(), "which is said")
    world.connect()
    eventually(lambda: berlin.echo(oslo.inner_v4, 1000) and oslo.echo(berlin.inner_v4, 1000), "the same daemons carry on")
    assert "xdp" not in berlin.link("eth0")


def nic_mode_is_refused_clearly(world):
    world.configure()
    a, _ = world.daemons
    good = a.config_file.read_text()
    for more, expected in (
        ("outer: { xdp: { interface: eth9 } }", "no network interface `eth9`"),
        ("outer: { xdp: { interface: eth0, queues: 200 } }", "queues, not 200"),
        ("outer: { xdp: { interface: lo } }", "`lo`"),
    ):
        a.config_file.write_text(f"{good}\n{more}\n")
        result = a.run("run", "-c", a.config_file)
        assert result.returncode != 0 and expected in result.stderr, f"{more}: {result.stderr}"
    assert "xdp" not in world.machines[0].link("eth0")


def every_size_around_the_mtu(world):
    """IPv4 and IPv6 inside IPv4 and IPv6, through sockets and past the kernel: the largest that fits, and one byte more."""
    for outer, more in (("v4", ""), ("v6", ""), ("v4", "outer: { xdp: { interface: eth0 } }"), ("v6", "outer: { xdp: { interface: eth0 } }")):
        world.configure(outer=outer) if outer + more == "v4" else rewrite(world, outer, more)
        world.start()
        berlin, oslo = world.machines
        eventually(lambda: berlin.echo(oslo.inner_v4) and oslo.echo(berlin.inner_v6), "the tunnel is up")
        mtu = int(re.search(r"mtu (\d+)", berlin.link("esp0"))[1])
        assert 1380 < mtu < 1460, mtu
        for over in range(-5, 3):
            assert berlin.echo(oslo.inner_v4, mtu - 28 + over), f"{outer} {more}: {over} over the MTU of {mtu}"
            assert oslo.echo(berlin.inner_v6, mtu - 48 + over), f"{outer} {more}: {over} over the MTU of {mtu}, IPv6"
        for daemon in world.daemons:
            assert unexpected(daemon) == {}, f"{outer} {more}"
            daemon.stop()


def rewrite(world, outer, more):
    for own, other in ((0, 1), (1, 0)):
        world.daemons[own].write_config(world.peer(own, other, outer) + more)


def received_by_ip(machine):
    """Packets that the machine's IP stack has seen."""
    with machine.inside(), open("/proc/thread-self/net/snmp") as file:
        names, values = [line.split() for line in file if line.startswith("Ip:")]
    return int(values[names.index("InReceives")])


def preshared_keys(world):
    world.configure(berlin="psk_file: psk", oslo="psk_file: psk")
    text = world.daemons[0].run("genpsk").stdout
    for daemon in world.daemons:
        file = daemon.directory / "psk"
        file.touch(mode=0o600)
        file.write_text(text)
    a, b = world.start()
    berlin, oslo = world.machines
    assert berlin.ping(oslo.inner_v4, timeout=5)
    b.stop()
    (b.directory / "psk").write_text(b.run("genpsk").stdout)
    b.start()

    def refused():
        assert not berlin.echo(oslo.inner_v4, timeout=0.3), "another key must not connect"
        return "handshake_decrypt_failed" in unexpected(a).keys() | unexpected(b).keys()

    eventually(refused, "the new handshake is refused by name")
    assert not world.tap.clear_frames()


def outer_ipv6(world):
    world.configure(outer="v6")
    world.start()
    berlin, oslo = world.machines
    assert berlin.ping(oslo.inner_v4, timeout=5)
    assert berlin.echo(oslo.inner_v6, 1200) and oslo.echo(berlin.inner_v4, 1200)
    assert not world.tap.clear_frames()


def a_peer_is_found_by_its_name(world):
    """The name is not known at first, and the peer does not call by itself."""
    world.configure()
    a, b = world.daemons
    a.write_config(world.peer(0, 1, outer="oslo.example", more="initiate: start"))
    hosts = a.directory / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    a.start(hosts=hosts)
    b.start()
    eventually(lambda: "cannot look up `oslo.example`" in a.log(), "the log says that the name is unknown")
    with hosts.open("a") as file:
        file.write(f"{world.machines[1].v4} oslo.example\n")
    eventually(lambda: a.status()["peers"][0]["up"], "the tunnel is up once the name is known")
    assert world.machines[0].ping(world.machines[1].inner_v4, timeout=5)


def static_sas_come_and_go_by_the_api(world):
    """Over the unix socket alone, both ends, and a second one under the same name is refused."""
    berlin, oslo = world.machines
    a, b = world.daemons
    keys = ["11" * 20, "22" * 20]
    for daemon, own, other, spis in ((a, berlin, oslo, (0x1001, 0x1002)), (b, oslo, berlin, (0x1002, 0x1001))):
        daemon.write_config(private_key=None)
        daemon.start()
        inbound, outbound = (keys[spi - 0x1001] for spi in spis)
        daemon.document = json.dumps({
            "name": "manual", "local": own.v4, "remote": other.v4, "suite": "aes128gcm16",
            "udp": {"local_port": 4500, "remote_port": 4500}, "routes": [f"10.{other.number}.0.0/16"],
            "inbound": {"spi": f"{spis[0]:#x}", "key": inbound}, "outbound": {"spi": f"{spis[1]:#x}", "key": outbound},
        })
        code, answer = daemon.change("POST", "/v1/static-sas", daemon.document)
        assert code in (200, 201, 204), (code, answer)
    assert berlin.ping(oslo.inner_v4, timeout=5) and berlin.echo(oslo.inner_v4, 1000)
    assert "10.2.0.0/16 dev esp0" in berlin.routes(), berlin.routes()
    code, answer = a.change("POST", "/v1/static-sas", a.document)
    assert code == 409 and "manual" in answer, (code, answer)
    plain = json.dumps({key: value for key, value in json.loads(a.document).items() if key != "udp"} | {"name": "plain"})
    code, answer = a.change("POST", "/v1/static-sas", plain)
    assert code == 409 and "raw sockets" in answer, (code, answer)
    a.send(signal.SIGHUP)
    eventually(lambda: "in force now" in a.log(), "the file has been read again")
    assert berlin.echo(oslo.inner_v4), "a reload leaves alone what came by the API"
    assert a.change("DELETE", "/v1/static-sas/manual")[0] in (200, 204)
    assert not a.status()["peers"] and "10.2.0.0/16" not in berlin.routes()
    assert a.change("DELETE", "/v1/static-sas/manual")[0] == 404


def wrong_configurations_are_refused(world):
    """Exit status 2, FILE:LINE:COLUMN, what is wrong; and nothing has been set up."""
    world.configure()
    a = world.daemons[0]
    berlin = world.machines[0]
    good = a.config_file.read_text()
    links = berlin.links()
    for change, expected in [
        (("name: esp0", "name: an-interface-name-too-long"), "15"),
        (("10.2.0.0/16", "10.2.0.1/16"), "10.2.0.0/16"),
        (("endpoint:", "endpiont:"), "endpiont"),
        ((a.peer_key, "bm90IGEga2V5"), "public_key"),
        (("private.key", "missing.key"), "keygen"),
        (("dead_after_seconds: 3", "dead_after_seconds: soon"), "dead_after_seconds"),
        (("interface:", "interface: ["), ""),
    ]:
        assert change[0] in good
        a.config_file.write_text(good.replace(*change))
        for command in ("check", "run"):
            result = a.run(command, "-c", a.config_file)
            assert result.returncode == 2, f"{command} with {change}: {result}"
            assert f"{a.config_file}:" in result.stderr and expected in result.stderr, f"{change}: {result.stderr}"
        assert berlin.links() == links and not a.socket_file.exists()
    a.config_file.write_text(good)
    (a.directory / "private.key").chmod(0o640)
    result = a.run("run", "-c", a.config_file)
    assert result.returncode == 2 and "chmod 600" in result.stderr, result
    (a.directory / "private.key").chmod(0o600)
    assert a.run("check", "-c", a.config_file).returncode == 0


def a_busy_port_is_no_half_start(world):
    world.configure()
    a = world.daemons[0]
    berlin = world.machines[0]
    links, routes = berlin.links(), berlin.routes()
    with berlin.socket(socket.AF_INET6, socket.SOCK_DGRAM) as squatter:
        squatter.bind(("::", 4500))
        result = a.run("run", "-c", a.config_file)
        assert result.returncode == 1 and "4500" in result.stderr, result
    assert berlin.links() == links and berlin.routes() == routes


def strongswan_may_come_later_and_keeps_its_port(world):
    """Beside strongSwan nothing is taken from charon, whoever comes first; without it the daemon waits, and says so."""
    a, berlin = world.daemons[0], world.machines[0]
    vici = a.directory / "charon.vici"
    a.write_config(f"strongswan: {{ vici: {vici} }}", private_key=None)
    links, routes = berlin.links(), berlin.routes()
    waits = f"not ready: charon has not answered at {vici} yet\n"
    with berlin.socket(socket.AF_INET6, socket.SOCK_DGRAM) as charon:
        charon.bind(("::", 4500))
        a.start(ready=False)
        eventually(lambda: a.get("/readyz") == (503, waits), "it waits for charon")
    a.stop(signal.SIGKILL)
    assert berlin.links() == links and berlin.routes() == routes
    a.start(ready=False)
    eventually(lambda: a.get("/readyz") == (503, waits), "it waits for charon")
    assert "charon does not answer" in a.show("tunnels")
    with berlin.socket(socket.AF_INET6, socket.SOCK_DGRAM) as charon, charon_without_tunnels(vici):
        charon.bind(("::", 4500))
        eventually(a.is_ready, "charon has come")
        assert "esplane_strongswan_up 1\n" in a.get("/metrics")[1]
        assert "there is no tunnel" in a.show("tunnels")
    eventually(lambda: "esplane_strongswan_up 0\n" in a.get("/metrics")[1], "charon has gone")
    assert a.is_ready(), "what a charon has negotiated is carried on without it"
    assert a.stop() == 0 and berlin.links() == links


@contextmanager
def charon_without_tunnels(path):
    """Speaks just enough VICI: confirms events, and has nothing to list."""

    def serve(connection):
        with connection:
            while head := connection.recv(4, socket.MSG_WAITALL):
                kind = connection.recv(struct.unpack(">I", head)[0], socket.MSG_WAITALL)[0]
                connection.sendall(struct.pack(">IB", 1, {0: 1, 3: 5, 4: 5}[kind]))

    def accept():
        with suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                threading.Thread(target=serve, args=(connections[-1],), daemon=True).start()

    connections = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            for ended in (listener, *connections):
                ended.shutdown(socket.SHUT_RDWR)
            path.unlink()


def garbage_on_the_port_changes_nothing(world):
    world.configure()
    a, b = world.start()
    berlin, oslo = world.machines
    assert berlin.ping(oslo.inner_v4, timeout=5)
    handshakes = a.status()["peers"][0]["handshakes"]
    with oslo.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        recorded = [frame[42:] for frame in world.tap.datagrams(4500)]
        for number in range(3000):
            data = recorded[number % len(recorded)] if number % 2 else os.urandom(number % 1400)
            stranger.sendto(data, (berlin.v4, 4500))
            if number % 50 == 0:
                assert berlin.echo(oslo.inner_v4, timeout=5), "traffic flows on"  # however busy the machine
    status = a.status()["peers"][0]
    assert (status["handshakes"], status["endpoint"]) == (handshakes, f"{oslo.v4}:4500"), status
    assert unexpected(a).keys() & {"unknown_spi", "replay_duplicate", "esp_truncated"}, unexpected(a)


def a_hub_with_a_thousand_sites(world):
    """All come at once, as after a power cut at the hub; `crowd` is what stands for them."""
    sites = 1000
    daemon, machine = world.daemons[0], world.machines[0]
    crowd = world.program.with_name("crowd")
    hub_key = daemon.keygen()
    daemon.write_config(subprocess.run([crowd, "peers", str(sites)], capture_output=True, text=True, check=True).stdout)
    hub = daemon.start()
    alone = resident_mib(hub)
    words = [crowd, "run", str(sites), "127.0.0.1:4500", hub_key, machine.inner_v4]
    with machine.inside(), subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        told = process.stdout.readline()
        assert told.startswith(f"answered {sites} "), (told, unexpected(hub))
        status = hub.status()
        assert all(peer["up"] for peer in status["peers"]) and len(status["sas"]) >= 2 * sites
        print(f"  {told.strip()}; the hub had {alone:.0f} MiB with its peers known, and has {resident_mib(hub):.0f} MiB")
        assert len(hub.show("peers").splitlines()) > sites
        process.stdin.close()
        assert process.wait(timeout=10) == 0
    assert hub.stop() == 0


def resident_mib(daemon):
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def range_for(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.01)


def unexpected(daemon):
    """Drops by reason, without those that every healthy tunnel has."""
    drops = daemon.status()["drops"]
    return {reason: count for reason, count in drops.items() if reason not in ("keepalive", "dummy_packet")}


def sent_number(daemon):
    return max(sa["sequence"] for sa in daemon.status()["sas"] if sa["direction"] == "outbound")


STORIES = [
    the_readme_is_true,
    traffic_flows_and_is_shown,
    a_large_transfer_over_tcp_arrives_whole,
    rekeys_under_traffic_lose_nothing,
    workers_send_with_sas_of_their_own,
    workers_send_from_ports_of_their_own,
    nothing_leaves_in_clear_when_the_peer_is_down,
    a_reload_adds_a_network,
    everything_goes_through_the_hub,
    a_failed_reload_changes_nothing,
    sigterm_leaves_nothing_behind,
    a_killed_daemon_comes_back,
    static_sas_in_udp,
    static_sas_in_plain_esp,
    every_size_around_the_mtu,
    nic_mode_outside,
    nic_mode_with_worker_ports,
    nic_mode_over_ipv6,
    nic_mode_on_both_sides,
    nic_mode_as_a_service,
    nic_mode_while_the_interface_changes,
    nic_mode_is_refused_clearly,
    static_sas_come_and_go_by_the_api,
    preshared_keys,
    a_peer_is_found_by_its_name,
    outer_ipv6,
    wrong_configurations_are_refused,
    a_busy_port_is_no_half_start,
    strongswan_may_come_later_and_keeps_its_port,
    garbage_on_the_port_changes_nothing,
    a_hub_with_a_thousand_sites,
]
