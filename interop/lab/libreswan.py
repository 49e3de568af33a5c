"""Libreswan on a host: Debian's pluto, keyed by a secret, its kernel carrying the traffic."""

from .world import eventually

PLUTO, WHACK, ADDCONN = (f"/usr/libexec/ipsec/{name}" for name in ("pluto", "whack", "addconn"))


class Libreswan:
    """One connection `site`. Its log is /work/pluto-HOST.log."""

    def __init__(self, host, own, peer, own_id, peer_id, local, remote, esp, esn, secret, more=""):
        self.host, self.process = host, None
        self.etc = f"/work/pluto-{host.name}"
        self.control = ["--ctlsocket", f"{self.etc}/run/pluto.ctl"]
        host.write(f"{self.etc}/ipsec.conf", f"""\
config setup
    nssdir={self.etc}/nss

conn site
    authby=secret
    ikev2=insist
    left={own}
    leftid=@{own_id}
    leftsubnet={local}
    right={peer}
    rightid=@{peer_id}
    rightsubnet={remote}
    ike=aes_gcm128-sha2_256-dh31
    esp={esp}
    esn={"yes" if esn else "no"}
    replay-window=4096
    auto=add
    {more}
""")  # fmt: skip
        host.write(f"{self.etc}/ipsec.secrets", f'@{own_id} @{peer_id} : PSK "{secret}"\n', mode=0o600)

    def start(self):
        self.host.sh(f"mkdir -p {self.etc}/nss {self.etc}/run; certutil -N -d sql:{self.etc}/nss --empty-password")
        self.process = self.host.start(PLUTO, "--nofork", "--config", f"{self.etc}/ipsec.conf", "--secretsfile", f"{self.etc}/ipsec.secrets",
                                       "--nssdir", f"{self.etc}/nss", "--rundir", f"{self.etc}/run", "--stderrlog", log=f"pluto-{self.host.name}.log")  # fmt: skip
        eventually(lambda: self.host.try_run(WHACK, *self.control, "--status")["status"] == 0, "pluto answers")
        self.host.run(WHACK, *self.control, "--listen", ok=False)
        self.host.run(ADDCONN, *self.control, "--config", f"{self.etc}/ipsec.conf", "site")
        return self

    def whack(self, *arguments):
        return self.host.run(WHACK, *self.control, *arguments, ok=False)

    def rekey(self):
        return self.whack("--rekey-ipsec", "--name", "site")

    def children(self):
        """Serial numbers of the child SAs that are established."""
        return {line.split('"')[0].strip() for line in self.whack("--trafficstatus").splitlines() if "#" in line and 'type=ESP' in line}
