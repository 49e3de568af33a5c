"""Two sites joined by strongSwan on both gateways, Esplane carrying the traffic of ga; and numbered packets across.

```text
     a ────────── ga ═══════ [nat] ═══════ net ═════════════ gb ────────── b
                  charon                                     charon (or pluto)
                  Esplane in mode A                          the kernel's ESP
```
"""

import time
from dataclasses import dataclass, field

from .esplane import Esplane
from .strongswan import TAKEOVER, StrongSwan, certificates, connection, psk
from .world import INNER, OUTER, check, eventually, same

NAT_INSIDE = "192.168.7.1"


@dataclass
class Plan:
    suite: str = "aes128gcm16"
    esn: bool = True
    inner: str = "v4"
    outer: str = "v4"
    auth: str = "psk"
    # ESP in UDP although no NAT is there; and a NAT in front of ga.
    encap: bool = False
    nat: bool = False
    # Whether Esplane takes over on ga. Else its kernel carries, which shows that the lab itself is right.
    takeover: bool = True
    mobike: bool = False
    # More lines for both sides' connections and children, or one's.
    connection: str = ""
    child: str = ""
    child_a: str = ""
    # Children by name with their local and remote selectors as ga sees them; none: `net`, the two networks.
    children: dict = field(default_factory=dict)
    charon: str = ""
    esplane: str = ""


class Sites:
    def __init__(self, world, plan, vici_a=None):
        """`vici_a`: where ga's charon listens, if that matters."""
        self.world, self.plan = world.site_to_site(nat=plan.nat), plan
        self.ga, self.gb = OUTER[plan.outer]
        net_a, net_b, self.a, self.b = INNER[plan.inner]
        self.children = plan.children or {"net": (net_a, net_b)}
        self.charon_a, self.charon_b = StrongSwan(world.ga, plan.charon, vici=vici_a), StrongSwan(world.gb, plan.charon)
        self.write_files()
        self.esplane = None
        if plan.takeover:
            section = f"strongswan: {{ vici: {self.charon_a.vici} }}\n{plan.esplane}"
            self.esplane = Esplane(world.ga, section, addresses=[])

    def write_files(self):
        plan = self.plan
        secrets = psk() if plan.auth == "psk" else ""
        if plan.auth == "pubkey":
            ca, certs = certificates(self.world, ["ga.example", "gb.example"])
            for charon, name in ((self.charon_a, "ga.example"), (self.charon_b, "gb.example")):
                charon.host.write(f"{charon.etc}/swanctl/x509ca/ca.pem", ca)
                charon.host.write(f"{charon.etc}/swanctl/x509/{name}.pem", certs[name][0])
                charon.host.write(f"{charon.etc}/swanctl/private/{name}.key", certs[name][1], mode=0o600)
        proposal = f"{plan.suite}-x25519-{'esn' if plan.esn else 'noesn'}"
        more = f"encap = {'yes' if plan.encap else 'no'}\n    mobike = {'yes' if plan.mobike else 'no'}\n    {plan.connection}"
        cert = (lambda name: f"certs = {name}.pem") if plan.auth == "pubkey" else (lambda name: "")
        own_a = NAT_INSIDE if plan.nat else "%any" if plan.mobike else self.ga
        seen_a = "%any" if plan.nat or plan.mobike else self.ga
        takeover = TAKEOVER if plan.takeover else ""
        children_a = [(name, local, remote, proposal, "\n      ".join((plan.child, plan.child_a, takeover))) for name, (local, remote) in self.children.items()]
        children_b = [(name, remote, local, proposal, plan.child) for name, (local, remote) in self.children.items()]
        self.conf_a = connection(own_a, self.gb, "ga.example", "gb.example", children_a, auth=plan.auth, more=more, own_more=cert("ga.example")) + secrets
        self.conf_b = connection(self.gb, seen_a, "gb.example", "ga.example", children_b, auth=plan.auth, more=more, own_more=cert("gb.example")) + secrets

    def start(self, initiate=True):
        """Both charons, Esplane, and the tunnel."""
        self.charon_a.start().load(self.conf_a)
        self.charon_b.start().load(self.conf_b)
        if self.esplane:
            self.esplane.start()
        if initiate:
            for child in self.children:
                self.charon_a.swanctl("--initiate", "--child", child)
            self.await_carried()
        return self

    def await_carried(self):
        """Until Esplane has every child."""
        if self.esplane:
            eventually(lambda: self.carried() >= len(self.children), "Esplane carries every child")

    def carried(self):
        return sum(row["direction"] == "outbound" for row in self.esplane.status()["sas"])

    # --- traffic

    def ping(self, sizes=(100,), count=1, **more):
        for source, target in ((self.world.a, self.b), (self.world.b, self.a)):
            result = source.call("ping", to=target, sizes=list(sizes), count=count, **more)
            same(result["answered"], len(sizes) * count, f"pings from {source.name} are answered", result)

    def sizes(self):
        mtu = self.esplane.status()["mtu"] if self.esplane else 1400
        smallest = 48 if self.plan.inner == "v6" else 28
        return sorted({*range(smallest, smallest + 16), *range(100, mtu, 211), *range(mtu - 5, mtu + 1)})

    def flow(self, packets_per_second=50, size=300):
        return Flow(self, packets_per_second, size)

    # --- what must hold at the end

    def all_is_well(self, allowed=()):
        """Neither Esplane nor the far kernel has dropped anything."""
        if self.esplane:
            drops = {reason: count for reason, count in self.esplane.drops().items() if reason not in allowed}
            same(drops, {}, "Esplane drops nothing")
        same(self.trouble(self.world.gb), {}, "the far kernel sees no trouble")

    def trouble(self, host):
        lines = host.run("cat", "/proc/net/xfrm_stat").splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines) if value != "0"}


class Flow:
    """Numbered packets both ways while something happens."""

    def __init__(self, sites, packets_per_second, size):
        self.world, self.sites = sites.world, sites
        self.ends = ((self.world.a, self.world.b, sites.b, "to-b"), (self.world.b, self.world.a, sites.a, "to-a"))
        self.rate, self.size = packets_per_second, size

    def __enter__(self):
        self.stop_file = "/work/flow.stop"
        self.world.a.run("rm", "-f", self.stop_file)
        self.receivers = [sink.background("flow_receive", address=target, port=7001) for _, sink, target, _ in self.ends]
        self.senders = [source.background("flow_send", to=target, port=7001, packets_per_second=self.rate, size=self.size, stop_file=self.stop_file)
                        for source, _, target, _ in self.ends]  # fmt: skip
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.world.a.write(self.stop_file, "")
            self.sent = [sender.join() for sender in self.senders]
            self.received = [receiver.join() for receiver in self.receivers]

    def keep(self, seconds):
        """Lets packets flow for a while."""
        time.sleep(seconds)

    def nothing_lost(self):
        for (source, *_), sent, received in zip(self.ends, self.sent, self.received):
            same([received["lost"], received["duplicates"], received["damaged"]], [0, 0, 0], f"every packet from {source.name} arrives once and whole", sent, received)
            same(sent["failed"], {}, "no packet was refused by its sender's kernel")
            check(received["expected"], "the flow had packets", sent)
        return sum(sent["sent"] for sent in self.sent)

    def lost(self):
        return [received["lost"] for received in self.received]

    def longest_gap(self):
        return max(received["longest_gap_seconds"] for received in self.received)


