"""The systems compared: how each gets from a topology to a tunnel between g1 and g2."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from topology import INNER_MTU, SERVER, Failed, eventually, run

BORINGTUN = "0.7.1"
GATEWAYS = (("g1", 1, 2), ("g2", 2, 1))


class Missing(Exception):
    """A system that is not to be had here, and why."""


class Tools:
    """Programs: of this machine where it has them, otherwise fetched into target/compare."""

    def __init__(self, target, esplane):
        self.packet_rate = target / "release" / "packet-rate"
        self.esplane = esplane.resolve() if esplane else target / "release" / "esplane"
        self.directory = target / "compare"
        places = [self.directory / "debian" / part / f"{os.uname().machine}-linux-gnu" for part in ("lib", "usr/lib")]
        self.libraries = ":".join(map(str, places))
        for command, package in (("iperf3", "iperf3"), ("ip", "iproute2"), ("taskset", "util-linux"), ("sysctl", "procps")):
            if not shutil.which(command):
                raise SystemExit(f"tests/compare/run: needs {command} (Debian package {package})")
        try:
            self.ping = self.debian("ping", "iputils-ping")
        except Missing as missing:
            raise SystemExit(f"tests/compare/run: {missing}") from None

    def debian(self, command, package, libraries=()):
        """A program of a Debian package, unpacked but not installed: no service starts."""
        if found := shutil.which(command):
            return found
        tree = self.directory / "debian"
        places = [tree / part / command for part in ("usr/sbin", "usr/bin", "bin")]
        if not any(place.exists() for place in places):
            tree.mkdir(parents=True, exist_ok=True)
            for name in (package, *libraries):
                fetched = subprocess.run(["apt-get", "download", name], cwd=tree, capture_output=True, check=False)
                archives = list(tree.glob(f"{name}_*.deb"))
                if fetched.returncode != 0 or not archives:
                    raise Missing(f"{command} is not here and Debian's package {name} cannot be fetched")
                run("dpkg", "-x", str(archives[0]), str(tree))
        return next(str(place) for place in places if place.exists())

    def boringtun(self):
        if found := shutil.which("boringtun-cli"):
            return found
        root = self.directory / "cargo"
        program = root / "bin" / "boringtun-cli"
        if not program.exists():
            install = ["cargo", "install", "--quiet", "--locked", "boringtun-cli", "--version", BORINGTUN]
            environment = {**os.environ, "CARGO_TARGET_DIR": str(self.directory / "build")}
            done = subprocess.run([*install, "--root", str(root)], env=environment, capture_output=True, check=False)
            if done.returncode != 0:
                raise Missing(f"boringtun-cli {BORINGTUN} cannot be built: {done.stderr.decode()[-300:]}")
        return str(program)


class System:
    """A tunnel that is up: what its gateways run."""

    def __init__(self, name, processes=(), mtu=INNER_MTU):
        self.name, self.processes, self.mtu = name, list(processes), mtu

    def process_ids(self):
        """Of the gateways' programs themselves; `ip netns exec`, nice and taskset have become them."""
        return [process.pid for process in self.processes]


@contextlib.contextmanager
def none(topology, tools):
    for gateway, _, far in GATEWAYS:
        topology.ip(gateway, "route", "add", f"10.{far}.0.0/24", "via", f"192.0.2.{far}")
        topology.ip(gateway, "route", "add", f"fd00:{far}::/64", "via", f"2001:db8::{far}")
    yield up(topology, tools, System("none"))


def up(topology, tools, system, logs=None):
    """Waits until packets pass."""
    def answers():
        with contextlib.suppress(Failed):
            return topology.run("h1", tools.ping, "-c1", "-W1", SERVER)
        if dead := [process for process in system.processes if process.poll() is not None]:
            raise Failed(f"it has ended with {dead[0].returncode}")

    try:
        eventually(answers, "a ping is answered")
    except Failed as failed:
        raise Failed(f"{failed}{tail(logs)}") from None
    return system


def tail(logs):
    texts = [f"\n--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in sorted(logs.glob("*.log"))] if logs else []
    return "".join(texts)


@contextlib.contextmanager
def workspace():
    with tempfile.TemporaryDirectory(prefix="esplane-compare-") as directory:
        yield Path(directory)


# --- Esplane -----------------------------------------------------------------------------------------


def esplane(name, extra="", udp=True, outer="192.0.2.{}", mtu=INNER_MTU):
    """Keyed by Noise as in the README; plain ESP, which Noise does not negotiate, by hand."""

    @contextlib.contextmanager
    def system(topology, tools):
        with workspace() as directory:
            for gateway, number, far in GATEWAYS:
                (directory / gateway).mkdir()
                public = topology.run(gateway, tools.esplane, "keygen", "-o", directory / gateway / "private.key")
                (directory / f"{far}.public").write_text(public.split()[-1])
            secrets = {number: os.urandom(20).hex() for _, number, _ in GATEWAYS}
            processes = []
            for gateway, number, far in GATEWAYS:
                peer = noise(directory, number, far, outer.format(far)) if udp else static(number, far, secrets)
                file = directory / gateway / "esplane.yaml"
                file.write_text(f"""\
name: {gateway}
private_key_file: private.key
state_dir: {directory / gateway}
interface: {{ name: esp0, mtu: "{mtu}" }}
api: {{ listen: off, socket: {directory / gateway / "esplane.sock"} }}
{extra}{peer}""")
                file.chmod(0o600)
                log = directory / f"{gateway}.log"
                processes.append(topology.start(gateway, tools.esplane, "run", "-c", file, log=log))
            yield up(topology, tools, System(name, processes, mtu), directory)

    return system


def noise(directory, number, far, address):
    public = (directory / f"{number}.public").read_text()
    return f"""\
peers:
  - name: far
    public_key: {public}
    endpoint: "{address}:4500"
    routes: [{routes(far)}]
"""


def routes(far):
    return f'10.{far}.0.0/24, "fd00:{far}::/64"'


def static(number, far, secrets):
    return f"""\
static_sas:
  - name: far
    local: 192.0.2.{number}
    remote: 192.0.2.{far}
    suite: aes128gcm16
    inbound: {{ spi: 0x0000100{number}, key: {secrets[number]} }}
    outbound: {{ spi: 0x0000100{far}, key: {secrets[far]} }}
    routes: [{routes(far)}]
"""


# --- WireGuard in user space -------------------------------------------------------------------------


def wireguard(name, program, arguments=()):
    @contextlib.contextmanager
    def system(topology, tools):
        wg = tools.debian("wg", "wireguard-tools")
        daemon = program(tools)
        links = {gateway: f"cmp{os.getpid() % 100000}w{number}" for gateway, number, _ in GATEWAYS}
        with workspace() as directory, contextlib.ExitStack() as cleaning:
            for gateway, number, _ in GATEWAYS:
                private = subprocess.run([wg, "genkey"], capture_output=True, check=True).stdout
                public = subprocess.run([wg, "pubkey"], input=private, capture_output=True, check=True).stdout
                (directory / f"{number}.private").write_bytes(private)
                (directory / f"{number}.public").write_bytes(public)
            processes = []
            for gateway, _, _ in GATEWAYS:
                link, log = links[gateway], directory / f"{gateway}.log"
                control = Path(f"/var/run/wireguard/{link}.sock")
                cleaning.callback(control.unlink, missing_ok=True)
                environment = {**os.environ, "LOG_LEVEL": "error", "WG_SUDO": "1"}
                processes.append(topology.start(gateway, daemon, *arguments, link, log=log, env=environment))
                eventually(control.exists, f"{name} has made its control socket{tail(directory)}")
            for gateway, number, far in GATEWAYS:
                link = links[gateway]
                peer = ["peer", (directory / f"{far}.public").read_text().strip(), "endpoint", f"192.0.2.{far}:4500"]
                mine = ["listen-port", "4500", "private-key", str(directory / f"{number}.private")]
                topology.run(gateway, wg, "set", link, *mine, *peer, "allowed-ips", f"10.{far}.0.0/24")
                topology.ip(gateway, "link", "set", link, "mtu", str(INNER_MTU), "up")
                topology.ip(gateway, "route", "add", f"10.{far}.0.0/24", "dev", link)
            yield up(topology, tools, System(name, processes), directory)

    return system


# --- OpenVPN -----------------------------------------------------------------------------------------

LIBRARIES = ("liblzo2-2", "libpkcs11-helper1", "libnl-genl-3-200", "libnl-3-200", "libcap-ng0", "liblz4-1")


@contextlib.contextmanager
def openvpn(topology, tools):
    """TLS with two self-signed certificates that know each other's fingerprint; AES-128-GCM over UDP."""
    program = tools.debian("openvpn", "openvpn", LIBRARIES)
    environment = {**os.environ, "LD_LIBRARY_PATH": tools.libraries}
    with workspace() as directory:
        for gateway, _, _ in GATEWAYS:
            key, certificate = directory / f"{gateway}.key", directory / f"{gateway}.crt"
            new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
            made = [*new, "-days", "2", "-subj", f"/CN={gateway}", "-keyout", str(key), "-out", str(certificate)]
            subprocess.run(made, check=True, capture_output=True)
        processes = []
        for gateway, number, far in GATEWAYS:
            show = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", str(directory / f"g{far}.crt")]
            fingerprint = subprocess.run(show, check=True, capture_output=True, text=True).stdout.split("=")[1].strip()
            role = ["--tls-server", "--dh", "none"] if number == 1 else ["--tls-client"]
            words = [
                "--dev", "tun0", "--dev-type", "tun", "--proto", "udp", "--lport", "1194", "--rport", "1194",
                "--local", f"192.0.2.{number}", "--remote", f"192.0.2.{far}", "--tun-mtu", str(INNER_MTU),
                "--ifconfig", f"10.9.0.{number}", f"10.9.0.{far}", "--route", f"10.{far}.0.0", "255.255.255.0",
                "--cert", directory / f"{gateway}.crt", "--key", directory / f"{gateway}.key",
                "--peer-fingerprint", fingerprint, "--data-ciphers", "AES-128-GCM", "--cipher", "AES-128-GCM",
                "--data-ciphers-fallback", "AES-128-GCM", "--mssfix", "0", "--sndbuf", "4194304", "--rcvbuf", "4194304", "--txqueuelen", "4096",
                "--verb", "1", *role,
            ]
            processes.append(topology.start(gateway, program, *words, log=directory / f"{gateway}.log", env=environment))
        yield up(topology, tools, System("openvpn", processes), directory)


NIC = "outer: { xdp: { interface: outer } }\n"
NICS = NIC + "inner: { xdp: { interface: inner } }\n"

SYSTEMS = {
    "none": none,
    "esplane-udp": esplane("esplane-udp"),
    "esplane-esp": esplane("esplane-esp", udp=False),
    "esplane-xdp": esplane("esplane-xdp", NICS),
    "boringtun": wireguard("boringtun", Tools.boringtun, ("--foreground", "--disable-drop-privileges")),
    "wireguard-go": wireguard("wireguard-go", lambda tools: tools.debian("wireguard-go", "wireguard-go"), ("--foreground",)),
    "openvpn": openvpn,
    "esplane-xdp-esp": esplane("esplane-xdp-esp", NICS, udp=False),
    "esplane-xdp-outer": esplane("esplane-xdp-outer", NIC),
    "esplane-udp6": esplane("esplane-udp6", outer="[2001:db8::{}]", mtu=INNER_MTU - 20),  # IPv6 has 20 bytes more
}
#: Measured unless others are asked for.
USUAL = [name for name in SYSTEMS if name not in ("esplane-xdp-esp", "esplane-xdp-outer", "esplane-udp6")]
