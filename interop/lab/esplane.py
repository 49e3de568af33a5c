"""The daemon under test on a host."""

import json
import signal

from .world import check, eventually

SUITES = {"gcm128": ("aes128gcm16", 20), "gcm256": ("aes256gcm16", 36), "chacha": ("chacha20poly1305", 36)}
# Drops that are no fault: IPv6 hosts talk to their own link only.
BY_DESIGN = {"link_local", "dummy_packet", "keepalive"}


class Esplane:
    """`esplane run` with a configuration; its files and its log lie in /work/esplane-HOST of the place."""

    def __init__(self, host, body, mtu="auto", addresses=()):
        self.host = host
        self.directory = f"/work/esplane-{host.name}"
        self.config_file = f"{self.directory}/esplane.yaml"
        self.log = f"esplane-{host.name}.log"
        self.process = None
        self.configure(body, mtu, addresses)

    def configure(self, body, mtu="auto", addresses=()):
        self.host.write(self.config_file, mode=0o600, text=f"""\
name: {self.host.name}
state_dir: {self.directory}/state
interface: {{ name: esp0, mtu: {mtu}, addresses: [{", ".join(f'"{address}"' for address in addresses)}] }}
api: {{ listen: "127.0.0.1:9470", socket: {self.directory}/sock }}
log: {{ level: debug }}
{body}""")  # fmt: skip

    def start(self, ready=True):
        self.process = self.host.start("esplane", "run", "-c", self.config_file, log=self.log)
        if ready:
            eventually(self.is_ready, f"esplane on {self.host.name} is ready")
        return self

    def is_ready(self):
        check(self.process.running(), f"esplane on {self.host.name} runs", self.process.said()[-3000:])
        return self.get("/readyz")["status"] == 200

    def get(self, path):
        return self.host.call("http_get", path=path)

    def status(self):
        answer = self.get("/v1/status")
        check(answer["status"] == 200, "esplane answers /v1/status", answer["body"])
        return json.loads(answer["body"])

    def metrics(self):
        """Samples of /metrics by their name with labels."""
        lines = self.get("/metrics")["body"].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")}

    def drops(self):
        """What it has dropped by reason, without what is so by design."""
        prefix = "esplane_drops_total{"
        found = {}
        for sample, value in self.metrics().items():
            if sample.startswith(prefix) and value:
                reason = sample.split('reason="')[1].split('"')[0]
                if reason not in BY_DESIGN:
                    found[reason] = found.get(reason, 0) + int(value)
        return found

    def show(self, *arguments):
        return self.host.run("esplane", "show", *arguments, "--api", f"{self.directory}/sock")

    def stop(self, number=signal.SIGTERM):
        self.process.send(number)
        return self.process.wait()


def static_sa(own, peer, spi_in, spi_out, key_in, key_out, suite, esn, window, routes, udp):
    """A `static_sas` section of one entry."""
    encapsulation = "udp: { local_port: 4500, remote_port: 4500 }" if udp else ""
    return f"""\
static_sas:
  - name: peer
    local: "{own}"
    remote: "{peer}"
    {encapsulation}
    suite: {SUITES[suite][0]}
    esn: {str(esn).lower()}
    window_packets: {window}
    inbound: {{ spi: {spi_in:#x}, key: {key_in} }}
    outbound: {{ spi: {spi_out:#x}, key: {key_out} }}
    routes: [{", ".join(f'"{route}"' for route in routes)}]
"""
