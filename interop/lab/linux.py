"""The kernel's own ESP as a peer, keyed by `ip xfrm` as an operator would by hand."""

import re

ALGORITHMS = {"gcm128": "rfc4106(gcm(aes))", "gcm256": "rfc4106(gcm(aes))", "chacha": "rfc7539esp(chacha20,poly1305)"}


class LinuxEsp:
    """SAs and policies of one tunnel on a host."""

    def __init__(self, host, own, peer, spi_in, spi_out, key_in, key_out, suite, esn, window, local, remote, udp, sequence_out=0):
        self.host, self.spi_in, self.spi_out = host, spi_in, spi_out
        if udp:
            self.holder = host.background("hold_udp_encap", port=4500)
        lines = []
        for spi, source, target, key, start in ((spi_in, peer, own, key_in, 0), (spi_out, own, peer, key_out, sequence_out)):
            line = f"xfrm state add src {source} dst {target} proto esp spi {spi:#x} reqid 1 mode tunnel replay-window {window}"
            line += " flag af-unspec"
            line += " flag esn" if esn else ""
            if start:
                line += f" replay-oseq {start & 0xFFFFFFFF:#x}" + (f" replay-oseq-hi {start >> 32:#x}" if esn else "")
            line += f" aead {ALGORITHMS[suite]} 0x{key} 128"
            line += " encap espinudp 4500 4500 0.0.0.0" if udp else ""
            lines.append(line)
        for direction, source, target, tunnel in (
            ("out", local, remote, (own, peer)),
            ("in", remote, local, (peer, own)),
            ("fwd", remote, local, (peer, own)),
        ):
            lines.append(f"xfrm policy add src {source} dst {target} dir {direction} tmpl src {tunnel[0]} dst {tunnel[1]} proto esp reqid 1 mode tunnel")
        self.host.sh("\n".join(f"ip {line.replace('(', chr(92) + '(').replace(')', chr(92) + ')')}" for line in lines))

    def sa(self, spi):
        """Bytes and packets an SA has carried, and what its replay window dropped."""
        text = self.host.run("ip", "-s", "xfrm", "state", "list", "spi", f"{spi:#x}")
        current = re.search(r"lifetime current:\s+(\d+)\(bytes\), (\d+)\(packets\)", text)
        failed = re.search(r"replay-window (\d+) replay (\d+) failed (\d+)", text)
        return {"bytes": int(current[1]), "packets": int(current[2]), "window_hits": int(failed[1]),
                "replays": int(failed[2]), "failed": int(failed[3]), "text": text}  # fmt: skip

    def statistics(self):
        """The kernel's counters of IPsec trouble on this host, without zeros."""
        lines = self.host.run("cat", "/proc/net/xfrm_stat").splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines) if value != "0"}
