"""What crosses the Internet of a scenario: captures, replays, and tshark as an independent reader who has the keys."""

import base64
import struct
import subprocess

from .world import check, same

# What tshark calls a suite; Debian's (4.0) does not know ChaCha20-Poly1305 in ESP.
TSHARK_SUITES = {
    "gcm128": "AES-GCM with 16 octet ICV [RFC4106]",
    "gcm256": "AES-GCM with 16 octet ICV [RFC4106]",
}


class Capture:
    """The ESP packets a host sends on one of its links, plain or in UDP. Reading them ends it."""

    def __init__(self, host, device, name):
        self.host, self.name = host, name
        self.stop_file, self.file = f"/work/{name}.stop", f"/work/{name}.pcap"
        self.thread = host.background("capture", device=device, file=self.file, stop_file=self.stop_file)
        self.data = None

    def bytes(self):
        """As a pcap file."""
        if self.data is None:
            self.host.write(self.stop_file, "")
            result = self.thread.join()
            same(result["dropped"], 0, "the capture is complete")
            self.data = self.host.read(self.file)
        return self.data

    def frames(self):
        """Ethernet frames in their order."""
        return read_pcap(self.bytes())


def read_pcap(data):
    order = "<" if data[:4] == b"\xd4\xc3\xb2\xa1" else ">"
    frames, at = [], 24
    while at + 16 <= len(data):
        captured, length = struct.unpack_from(order + "II", data, at + 8)
        check(captured == length, "frames are captured whole")
        frames.append(data[at + 16 : at + 16 + captured])
        at += 16 + captured
    return frames


def esp_of(frame):
    """(SPI, low half of the sequence number) of a frame with ESP, plain or in UDP."""
    packet = frame[14:]
    if packet[0] >> 4 == 4:
        protocol, payload = packet[9], packet[(packet[0] & 15) * 4 :]
    else:
        protocol, payload = packet[6], packet[40:]
    payload = payload[8:] if protocol == 17 else payload
    return struct.unpack_from("!II", payload)


def replay(host, device, frames):
    """Sends recorded frames once more."""
    encoded = [base64.b64encode(frame).decode() for frame in frames]
    return host.call("inject", device=device, frames=encoded)


def tshark(root, directory, data, keys, fields, name):
    """One row of fields per packet, decoded with the keys: (suite, source, destination, SPI, key).

    Debian's tshark (4.0) cannot be told the high half of extended sequence numbers, which the ICV covers: with ESN it decrypts,
    and calls every ICV wrong.
    """
    (directory / f"{name}.pcap").write_bytes(data)
    options = ["-o", "esp.enable_encryption_decode:TRUE", "-o", "esp.enable_authentication_check:TRUE"]
    for suite, source, target, spi, key in keys:
        family = "IPv6" if ":" in source else "IPv4"
        row = [family, source, target, f"{spi:#010x}", TSHARK_SUITES[suite], f"0x{key}", "NULL", ""]
        options += ["-o", "uat:esp_sa:" + ",".join(f'"{word}"' for word in row)]
    columns = [word for field in fields for word in ("-e", field)]
    command = ["chroot", root, "tshark", "-n", "-r", "-", *options, "-T", "fields", "-E", "separator=|", "-E", "occurrence=f", *columns]
    result = subprocess.run(command, input=data, capture_output=True, timeout=120, env={"HOME": "/tmp", "PATH": "/usr/bin:/usr/sbin:/bin:/sbin"})
    complaints = [line for line in result.stderr.decode(errors="replace").splitlines() if "as user" not in line]
    check(result.returncode == 0 and not complaints, "tshark reads the capture", *complaints)
    return [line.split("|") for line in result.stdout.decode(errors="replace").splitlines()]
