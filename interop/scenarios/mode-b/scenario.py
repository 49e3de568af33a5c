"""Mode B: two stock strongSwans on a kernel without ESP, each with Esplane in the kernel's place.

No virtual machine: charon runs as Debian ships it, with the preload library, in namespaces of this very machine. Its NETLINK_XFRM
sockets lead to Esplane, which plays the kernel's part and carries the packets.
"""

import re
import signal

from lab.esplane import Esplane
from lab.runner import Scenario
from lab.wire import Capture, esp_of
from lab.world import INNER, OUTER, check, eventually, same

LIBRARY = "/opt/esplane/libesplane_preload.so"
PLUGINS = "nonce openssl pem pkcs1 pubkey x509 kdf drbg kernel-netlink socket-default vici updown counters error-notify"


def scenarios():
    yield Scenario("mode-b", everyday, place="machine", quick=True)
    yield Scenario("mode-b-nat-t", lambda world: everyday(world, encap=True), place="machine")
    yield Scenario("mode-b-v6-chacha", lambda world: everyday(world, family="v6", suite="chacha20poly1305"), place="machine")
    yield Scenario("mode-b-esplane-killed", esplane_killed, place="machine", about="Mode B: Esplane is killed while packets flow; the same SAs go on, no number is used twice")
    yield Scenario("mode-b-esplane-away", esplane_away, place="machine", about="Mode B: Esplane is away for long; charon neither spins nor hangs, and all is well when it is back")
    yield Scenario("mode-b-charon-killed", charon_killed, place="machine", about="Mode B: charon is killed and starts anew; its old SAs go, new ones come")
    yield Scenario("mode-b-feedback", feedback, place="machine", about="Mode B: packets that wait bring a tunnel up, a byte limit rekeys it, a dead peer ends it")
    yield Scenario("mode-b-inactivity", inactivity, place="machine", about="Mode B: charon's `inactivity` ends what carries nothing, and nothing else")
    yield Scenario("mode-b-nat-rebinds", nat_rebinds, place="machine", about="Mode B: a NAT gives the peer another port; charon is told of it")


class Site:
    """A gateway: charon with the library, and Esplane."""

    def __init__(self, host, own, peer, inside, beyond, ike="", child="", suite="aes256gcm16"):
        self.host, self.own, self.peer = host, own, peer
        self.vici = f"/work/{host.name}.vici"
        self.socket = f"/work/esplane-{host.name}/xfrm.sock"
        self.esplane = Esplane(host, f"strongswan: {{ mode: preload, socket: {self.socket}, vici: {self.vici} }}\n")
        host.write(f"/work/{host.name}.conf", f"""\
charon-systemd {{
    load = {PLUGINS}
    install_routes = no
    retransmit_tries = 2
    retransmit_timeout = 1
    retransmit_base = 1
    plugins {{ vici {{ socket = unix://{self.vici} }} }}
    filelog {{ log {{ path = /work/charon-{host.name}.log
        time_format = %T
        default = 1
        knl = 2
        flush_line = yes }} }}
}}
""")  # fmt: skip
        host.write(f"/work/{host.name}.swanctl", f"""\
connections {{ site {{
    local_addrs = {own}
    remote_addrs = {peer}
    version = 2
    proposals = aes128gcm16-prfsha256-x25519
    local {{ auth = psk
        id = {host.name}.example }}
    remote {{ auth = psk
        id = {"gb" if host.name == "ga" else "ga"}.example }}
    {ike}
    children {{ net {{
        local_ts = {inside}
        remote_ts = {beyond}
        esp_proposals = {suite}-esn-x25519
        {child}
    }} }}
}} }}
secrets {{ ike-1 {{ secret = "a secret of both" }} }}
""")  # fmt: skip

    def start(self):
        self.esplane.start(ready=False)
        self.start_charon()
        eventually(self.esplane.is_ready, f"esplane on {self.host.name} is ready")
        return self

    def start_charon(self):
        environment = {"STRONGSWAN_CONF": f"/work/{self.host.name}.conf", "LD_PRELOAD": LIBRARY, "ESPLANE_XFRM_SOCKET": self.socket}
        self.charon = self.host.start("charon-systemd", log=f"charon-{self.host.name}.out", env=environment)
        eventually(lambda: self.swanctl("--stats", ok=False), f"charon on {self.host.name} answers")
        self.swanctl("--load-all", "--file", f"/work/{self.host.name}.swanctl", "--noprompt")

    def swanctl(self, command, *arguments, ok=True, timeout=60):
        environment = {"STRONGSWAN_CONF": f"/work/{self.host.name}.conf"}
        return self.host.run("swanctl", command, "--uri", f"unix://{self.vici}", *arguments, ok=ok, env=environment, timeout=timeout)

    def spis(self):
        """Of the CHILD_SAs that charon calls installed."""
        return sorted(re.findall(r"\b(?:in|out) +([0-9a-f]{8})", self.swanctl("--list-sas")))

    def carried(self):
        """Packets in and out, as charon shows them."""
        return [int(count) for count in re.findall(r"(\d+) packets", self.swanctl("--list-sas"))]

    def log(self):
        return self.host.read(f"/work/charon-{self.host.name}.log").decode(errors="replace")

    def cpu_seconds(self):
        fields = self.host.read(f"/proc/{self.charon.pid}/stat").split()
        return (int(fields[13]) + int(fields[14])) / 100


def sites(world, ike="", child="", encap=False, family="v4", suite="aes256gcm16"):
    world.site_to_site()
    ike += "\n    encap = yes" if encap else ""
    (a, b), (inside_a, inside_b, *_) = OUTER[family], INNER[family]
    ga = Site(world.ga, a, b, inside_a, inside_b, ike, child, suite)
    gb = Site(world.gb, b, a, inside_b, inside_a, ike, child, suite)
    return ga.start(), gb.start()


def up(site):
    site.swanctl("--initiate", "--child", "net")


def flow(world, port, family="v4", rate=200):
    """Numbered packets from b to a, until `finish`."""
    to = INNER[family][2]
    receiver = world.a.background("flow_receive", address=to, port=port)
    sender = world.b.background("flow_send", to=to, port=port, packets_per_second=rate, stop_file="/work/flow.stop")
    return receiver, sender


def everyday(world, encap=False, family="v4", suite="aes256gcm16"):
    """A tunnel comes up, carries, is rekeyed from both ends while packets flow, and goes."""
    ga, gb = sites(world, encap=encap, family=family, suite=suite)
    up(ga)
    carries(world, family)
    check(all(count > 0 for site in (ga, gb) for count in carried_soon(site)), "swanctl --list-sas shows what was carried")
    receiver, sender = flow(world, 7001, family)
    for site in (ga, gb, ga, gb):
        before = ga.spis()
        site.swanctl("--rekey", "--child", "net")
        eventually(lambda: len(ga.spis()) == len(gb.spis()) == 2 and not set(before) & set(ga.spis()), "both ends have new SAs, and only those", 30)
    ga.swanctl("--rekey", "--ike", "site")
    result = finish(world, receiver, sender)
    same((result["lost"], result["duplicates"], result["damaged"]), (0, 0, 0), "nothing is lost through four rekeys", result)
    check(result["received"] > 1000, "packets have flowed all the time", result)
    for site in (ga, gb):
        same(site.esplane.drops(), {}, f"Esplane on {site.host.name} drops nothing")
    ga.swanctl("--terminate", "--ike", "site")
    eventually(lambda: sas(ga) == sas(gb) == 0, "the tunnel is gone at both ends")
    return f"{result['received']} packets through 4 rekeys, none lost"


def esplane_killed(world):
    ga, gb = sites(world)
    up(ga)
    carries(world)
    before = gb.spis()
    capture = Capture(world.net, "ga", "to-a")
    receiver, sender = flow(world, 7002)
    for _ in range(3):
        sends_more(gb, 200)
        gb.esplane.stop(signal.SIGKILL)
        gb.esplane.start()
    sends_more(gb, 200)
    result = finish(world, receiver, sender)
    same(gb.spis(), before, "charon has the SAs that it had")
    numbers = [esp_of(frame) for frame in capture.frames()]
    same(len(numbers), len(set(numbers)), "no number was sent twice under one key")
    check(len(numbers) > 800, "packets were sent by all four", len(numbers))
    same((result["duplicates"], result["damaged"]), (0, 0), "nothing arrives twice", result)
    carries(world)
    return f"killed three times; longest gap {result['longest_gap_seconds']:.1f} s; {len(numbers)} numbers, none twice"


def sends_more(site, packets):
    """Waits until this Esplane has sent so many."""
    def sent():
        return sum(sa["traffic"]["packets"] for sa in site.esplane.status()["sas"] if sa["direction"] == "outbound")
    before = sent()
    eventually(lambda: sent() >= before + packets, f"esplane on {site.host.name} sends")


def esplane_away(world):
    ga, gb = sites(world)
    up(ga)
    carries(world)
    before = gb.spis()
    gb.esplane.stop(signal.SIGKILL)
    busy = gb.cpu_seconds()
    # While it is away charon answers, at once after a first patience, and does not spin.
    world.sh("sleep 7")
    gb.swanctl("--list-sas", timeout=20)
    check(gb.charon.running(), "charon on gb runs")
    check(gb.cpu_seconds() - busy < 1, "charon waits without spinning", gb.cpu_seconds() - busy)
    # What is to go meanwhile, goes; Esplane hears of it when it is back.
    gb.swanctl("--terminate", "--ike", "site", timeout=30)
    gb.esplane.start()
    eventually(lambda: sas(gb) == 0, "Esplane on gb has no tunnel any more")
    up(ga)
    carries(world)
    check(not set(before) & set(gb.spis()), "with new SAs")
    return "7 s away; terminated meanwhile"


def charon_killed(world):
    ga, gb = sites(world)
    up(ga)
    carries(world)
    gb.charon.send(signal.SIGKILL)
    gb.charon.wait()
    carries(world)
    gb.start_charon()
    eventually(lambda: sas(gb) == 0, "the SAs of the charon that is gone, are gone")
    gb.swanctl("--initiate", "--child", "net")
    # Esplane may not have heard yet from the new charon what the new SAs are for.
    eventually(lambda: sas(gb) == 2, "the new SAs are carried")
    carries(world)
    return "carried on without charon; new SAs with the next"


def feedback(world):
    """Traps, limits and dead peers, as charon sees them."""
    ga, gb = sites(world, ike="dpd_delay = 1\n    dpd_timeout = 4", child="start_action = trap\n        dpd_action = clear\n        rekey_bytes = 300000\n        life_bytes = 600000")
    same(ga.spis(), [], "nothing is up before a packet wants it")
    # A packet that waits makes charon negotiate.
    eventually(lambda: world.a.call("ping", to="10.2.0.2", sizes=[100], timeout=1.0)["answered"] == 1, "packets bring the tunnel up", 30)
    first = ga.spis()
    # A byte limit.
    bulk(world, 500_000)
    eventually(lambda: len(ga.spis()) == 2 and not set(first) & set(ga.spis()), "charon has rekeyed at the byte limit", 30)
    carries(world)
    # A dead peer: the SAs go, and packets bring new ones once it lives.
    before = ga.spis()
    world.net.ip("link set dev ga down\n")
    eventually(lambda: sas(ga) == sas(gb) == 0, "both ends have noticed that the other is dead", 40)
    world.net.ip("link set dev ga up\n")
    eventually(lambda: world.a.call("ping", to="10.2.0.2", sizes=[100], timeout=1.0)["answered"] == 1, "packets bring the tunnel up again", 30)
    check(not set(before) & set(ga.spis()), "with new SAs")
    carries(world)
    return "up by a packet, rekeyed by a byte limit, down by DPD, up again"


def inactivity(world):
    """charon ends what has carried nothing for 4 seconds, and nothing else."""
    ga, gb = sites(world, child="inactivity = 4")
    up(ga)
    first = ga.spis()
    receiver, sender = flow(world, 7003, rate=5)
    world.sh("sleep 8")
    result = finish(world, receiver, sender)
    same((result["lost"], ga.spis()), (0, first), "it stays while packets flow", result)
    eventually(lambda: ga.spis() == [] and sas(ga) == 0, "it goes when none have for 4 s", 20)
    check("inactivity" in ga.log() + gb.log(), "charon says why")
    return "8 s of packets, then silence"


def nat_rebinds(world):
    """A NAT forgets the peer and gives it another port; charon is told, and sends there itself."""
    world.site_to_site()
    masquerade(world, 20000)
    world.net.sh("cd /proc/sys/net/netfilter; echo 2 >nf_conntrack_udp_timeout; echo 2 >nf_conntrack_udp_timeout_stream")
    ga = Site(world.ga, "198.51.100.1", "203.0.113.1", "10.1.0.0/24", "10.2.0.0/24", "mobike = no", "").start()
    gb = Site(world.gb, "203.0.113.1", "%any", "10.2.0.0/24", "10.1.0.0/24", "mobike = no", "").start()
    up(ga)
    carries(world)
    first = gb.spis()
    masquerade(world, 30000)
    world.sh("sleep 4")  # until it has forgotten the old one
    eventually(lambda: world.a.call("ping", to="10.2.0.2", sizes=[100], timeout=1.0)["answered"] == 1, "packets of a bring b's back", 20)
    eventually(lambda: re.search(r"remote .*\[30\d\d\d\]", gb.swanctl("--list-sas")), "charon on gb knows the new port", 20)
    same(gb.spis(), first, "the SAs are the same")
    carries(world)
    return "followed to another port, and charon told"


def masquerade(world, port):
    """Hides ga behind the Internet's address, and its port 4500 behind another; what was known before is forgotten."""
    world.net.run("nft", "-f", "-", input=f"""
        flush ruleset
        table ip nat {{
            chain post {{
                type nat hook postrouting priority srcnat
                ip saddr 198.51.100.1 udp sport 4500 masquerade to :{port}-{port + 99}
                ip saddr 198.51.100.1 masquerade
            }}
        }}
    """)  # fmt: skip


def carries(world, family="v4"):
    sizes = [48, 100, 1000, 1300]
    a, b = INNER[family][2:]
    for source, target in ((world.a, b), (world.b, a)):
        result = source.call("ping", to=target, sizes=sizes, count=3)
        same(result["answered"], len(sizes) * 3, f"pings from {source.name} are answered", result)
    bulk(world, 100_000, family)


def bulk(world, size, family="v4"):
    a, b = INNER[family][2:]
    listener = world.b.background("tcp_sink", address=b, port=5001)
    sent = world.a.call("tcp_send", to=b, port=5001, size=size, source=a)
    same(listener.join()["sha256"], sent["sha256"], "TCP arrives whole", sent)


def carried_soon(site):
    """Once counters have been told to charon; about a second."""
    return eventually(lambda: all(counts := site.carried()) and counts, f"charon on {site.host.name} knows what was carried")


def finish(world, receiver, sender):
    world.b.write("/work/flow.stop", "")
    sender.join()
    return receiver.join()


def sas(site):
    return len(site.esplane.status()["sas"])
