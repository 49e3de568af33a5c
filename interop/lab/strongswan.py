"""strongSwan on a host: Debian's charon-systemd and swanctl, as they come.

    peer      its kernel carries the traffic, as everywhere
    takeover  its children have the lines that make the kernel's SAs inert, and Esplane carries the traffic
"""

import re

from .world import eventually

# What a child needs for Esplane to take it over: the kernel's SAs get a mark that no packet has.
TAKEOVER = """policies = no
      mark_in = 0x00dead00/0xffffffff
      mark_out = 0x00dead00/0xffffffff
      mark_in_sa = yes"""

# Fewer plugins than Debian's default load: a guest's processor is emulated.
PLUGINS = "nonce openssl pem pkcs1 pubkey x509 kdf drbg constraints kernel-netlink socket-default vici updown counters error-notify"

SECRET = "a secret of these tests alone"


class StrongSwan:
    """charon on a host. Its files are those of /etc on that host alone; its log is /work/charon-HOST.log."""

    def __init__(self, host, charon="", plugins=PLUGINS, vici=None):
        self.host, self.process = host, None
        self.vici = vici or f"/run/{host.name}.vici"
        self.etc = f"/etc/netns/{host.name}"
        host.write(f"{self.etc}/strongswan.conf", f"""
charon-systemd {{
  load = {plugins}
  install_routes = no
  retransmit_tries = 3
  retransmit_timeout = 1.0
  retransmit_base = 1.5
  plugins {{ vici {{ socket = unix://{self.vici} }} }}
  {charon}
  filelog {{ all {{
    path = /work/charon-{host.name}.log
    time_format = %T
    time_add_ms = yes
    default = 1
    ike = 1
    knl = 2
    flush_line = yes
  }} }}
}}
swanctl {{ load = pem pkcs1 x509 pubkey openssl }}
""")  # fmt: skip
        for directory in ("x509", "x509ca", "x509aa", "x509ocsp", "x509crl", "x509ac", "pubkey", "private", "rsa", "ecdsa", "pkcs8", "pkcs12", "bliss"):
            host.write(f"{self.etc}/swanctl/{directory}/.empty", "")

    def start(self):
        self.process = self.host.start("charon-systemd", log=f"charon-{self.host.name}.out")
        eventually(lambda: self.host.try_run("swanctl", "--stats", "--uri", f"unix://{self.vici}")["status"] == 0, f"charon on {self.host.name} answers")
        return self

    def stop(self, number=15):
        self.process.send(number)
        return self.process.wait()

    def load(self, connections):
        """A swanctl.conf, loaded as an operator would."""
        self.host.write(f"{self.etc}/swanctl/swanctl.conf", connections)
        if self.process:
            self.swanctl("--load-all", "--noprompt")

    def add_lines(self, begins, lines):
        """Writes into swanctl.conf, as an operator with an editor: to the end of the section that begins at a line."""
        path = f"{self.etc}/swanctl/swanctl.conf"
        text = self.host.read(path).decode().splitlines()
        depth = 0
        for at in range(begins - 1, len(text)):
            depth += text[at].count("{") - text[at].count("}")
            if depth == 0:
                break
        text[at:at] = lines
        self.host.write(path, "\n".join(text) + "\n")

    def swanctl(self, *arguments, ok=True, timeout=120):
        command, *rest = arguments
        return self.host.run("swanctl", command, *rest, "--uri", f"unix://{self.vici}", ok=ok, timeout=timeout)

    def log(self):
        return self.host.read(f"/work/charon-{self.host.name}.log").decode(errors="replace")

    def sas(self):
        """Children that are installed: name, unique number, SPIs, bytes and packets each way, as --list-sas tells."""
        found = []
        for block in re.split(r"\n  (?=\S+: #\d+, reqid)", self.swanctl("--list-sas"))[1:]:
            name, number, state = re.match(r"(\S+): #(\d+), reqid \d+, (\w+)", block).groups()
            ways = {way: (spi, int(size), int(packets)) for way, spi, size, packets in re.findall(r"\n    (in|out)\s+(\w+).*?(\d+) bytes,\s+(\d+) packets", block)}
            found.append({"name": name, "number": int(number), "state": state} | ways)
        return found

    def installed(self, name="net"):
        return [sa for sa in self.sas() if sa["name"] == name and sa["state"] == "INSTALLED"]


def connection(own, peer, own_id, peer_id, children, name="site", auth="psk", version=2, more="", own_more="", peer_more=""):
    """One connection of a swanctl.conf. `children`: (name, local, remote, proposal, more lines)."""
    def section(child):
        child_name, local, remote, proposal, lines = child
        return f"""
    {child_name} {{
      local_ts = {local}
      remote_ts = {remote}
      esp_proposals = {proposal}
      {lines}
    }}"""

    return f"""
connections {{
  {name} {{
    version = {version}
    local_addrs = {own}
    remote_addrs = {peer}
    proposals = aes128gcm16-prfsha256-x25519
    {more}
    local {{
      auth = {auth}
      id = {own_id}
      {own_more}
    }}
    remote {{
      auth = {auth}
      id = {peer_id}
      {peer_more}
    }}
    children {{{"".join(section(child) for child in children)}
    }}
  }}
}}
"""


def psk():
    return f'secrets {{\n  ike-site {{ secret = "{SECRET}" }}\n}}\n'


def certificates(world, names):
    """A CA and a certificate for each name, as PEM texts."""
    directory = "/tmp/ca"
    script = [f"rm -rf {directory}; mkdir -p {directory}; cd {directory}",
              "openssl ecparam -name prime256v1 -genkey -noout -out ca.key",
              "openssl req -x509 -new -key ca.key -days 30 -subj '/CN=Interop CA' -addext basicConstraints=critical,CA:TRUE -out ca.pem 2>&1"]  # fmt: skip
    for name in names:
        script += [
            f"openssl ecparam -name prime256v1 -genkey -noout -out {name}.key",
            f"openssl req -new -key {name}.key -subj '/CN={name}' -out {name}.csr 2>&1",
            f"printf 'subjectAltName=DNS:{name}\\n' >{name}.ext",
            f"openssl x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile {name}.ext -out {name}.pem 2>&1",
        ]
    world.sh("\n".join(script))
    read = next(iter(world.hosts.values())).read
    return read(f"{directory}/ca.pem"), {name: (read(f"{directory}/{name}.pem"), read(f"{directory}/{name}.key")) for name in names}


