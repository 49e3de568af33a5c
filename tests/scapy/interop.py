#!/usr/bin/env python3
"""Esplane's ESP against scapy's: each must read what the other wrote.

    scapy's SecurityAssociation  <-- outer IP packets as hex -->  dataplane/examples/esp_stdio.rs

For every suite, with ESN and without, inner and outer IPv4 and IPv6, in UDP and plain:

  ours     we seal, scapy opens; every field of the packet is checked, down to padding and checksums
  theirs   scapy seals (random IVs, as RFC 4106 allows), we open
  forged   each part of a packet damaged, a wrong key, replays: we drop it and name the reason
  numbers  the walk over 2^32 with ESN, the full stop at 2^32 without

Run it with `tests/run scapy`. Arguments: the esp_stdio program.
"""

import itertools
import random
import subprocess
import sys

from scapy.config import conf
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.ipsec import ESP, IPSecIntegrityError, SecurityAssociation
from scapy.packet import Raw

conf.verb = 0
SPI = 0xC0FFEE01
PORT = 4500
SIZES = [0, 1, 2, 3, 4, 15, 16, 17, 63, 64, 255, 512, 1023, 1400]
WALK = [1, 2, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**32 + 1, 2**33 - 2**31, 2**33 - 1, 2**33, 2**33 + 7]

#         our name            scapy's name        key bytes with salt
SUITES = {
    "aes128gcm16": ("AES-GCM", 20),
    "aes256gcm16": ("AES-GCM", 36),
    "chacha20poly1305": ("CHACHA20-POLY1305", 36),
}
OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8:f::1", "2001:db8:f::2")}
INNER = {4: ("10.1.0.5", "10.2.0.6"), 6: ("fd00:1::5", "fd00:2::6")}


class Esplane:
    """One esp_stdio process: one command a line in, one answer a line out."""

    def __init__(self, program):
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=10)

    def say(self, line):
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        if not answer:
            raise AssertionError(f"esp_stdio ended at: {line}")
        return answer[0], answer[1] if len(answer) > 1 else ""

    def install(self, direction, case, **more):
        local, remote = OUTER[case.outer] if direction == "out" else OUTER[case.outer][::-1]
        options = {
            "spi": f"{SPI:#010x}",
            "suite": case.suite,
            "key": case.key.hex(),
            "esn": "on" if case.esn else "off",
            "local": local,
            "remote": remote,
            "udp": f"{PORT}:{PORT}" if case.udp else "none",
        } | more
        answer = self.say(f"sa {direction} " + " ".join(f"{name}={value}" for name, value in options.items()))
        assert answer[0] == "ok", answer

    def seal(self, packet):
        verdict, text = self.say("seal " + packet.hex())
        return bytes.fromhex(text) if verdict == "ok" else text

    def open(self, packet):
        verdict, text = self.say("open " + packet.hex())
        return bytes.fromhex(text) if verdict == "ok" else text


class Case:
    """One cell's parameters, its key, and scapy's view of the same SA."""

    def __init__(self, suite, esn, inner, outer, udp):
        self.suite, self.esn, self.inner, self.outer, self.udp = suite, esn, inner, outer, udp
        self.random = random.Random(f"{suite} {esn} {inner} {outer} {udp}")
        self.key = self.random.randbytes(SUITES[suite][1])

    def row(self):
        carried = "in UDP" if self.udp else "plain"
        return f"{self.suite:17} {'on' if self.esn else 'off':4} IPv{self.inner:<3} IPv{self.outer:<3} {carried:8}"

    def scapy_sa(self, key=None):
        source, destination = OUTER[self.outer]
        header = IP(src=source, dst=destination, ttl=64) if self.outer == 4 else IPv6(src=source, dst=destination)
        return SecurityAssociation(
            ESP,
            spi=SPI,
            crypt_algo=SUITES[self.suite][0],
            crypt_key=key or self.key,
            tunnel_header=header,
            nat_t_header=UDP(sport=PORT, dport=PORT) if self.udp else None,
            esn_en=self.esn,
        )

    def inner_packet(self, size):
        source, destination = INNER[self.inner]
        header = IP(src=source, dst=destination) if self.inner == 4 else IPv6(src=source, dst=destination)
        body = UDP(sport=40000, dport=7) if size % 2 else ICMP() if self.inner == 4 else ICMPv6EchoRequest()
        # Size 0 is an IP header and nothing behind it.
        return bytes(header / body / Raw(self.random.randbytes(size))) if size else bytes(header / Raw(b""))

    def outer_packet(self, data):
        return (IP if self.outer == 4 else IPv6)(data)

    def scapy_seal(self, sa, inner, sequence):
        # scapy keeps the high half of an extended number apart from the low one.
        sa.seq_num, sa.esn = sequence % 2**32, sequence >> 32
        return bytes(sa.encrypt((IP if self.inner == 4 else IPv6)(inner)))

    def scapy_open(self, sa, data, sequence):
        sa.esn = sequence >> 32
        return bytes(sa.decrypt(self.outer_packet(data)))

    def esp_offset(self):
        return (20 if self.outer == 4 else 40) + (8 if self.udp else 0)


# --- the four checks ---------------------------------------------------------------------------


def ours(program, case):
    """scapy reads what we seal, and finds every field as the RFCs want it."""
    with Esplane(program) as esplane:
        esplane.install("out", case)
        sa = case.scapy_sa()
        for sequence, size in enumerate(SIZES, 1):
            inner = case.inner_packet(size)
            sealed = esplane.seal(inner)
            assert isinstance(sealed, bytes), f"not sealed: {sealed}"
            check_outer(case, sealed, sequence)
            check_trailer(case, sa, sealed, inner)
            assert case.scapy_open(sa, sealed, sequence) == inner, f"size {size}: another packet came out"
    return len(SIZES)


def theirs(program, case):
    """We read what scapy seals, out of order too."""
    with Esplane(program) as esplane:
        esplane.install("in", case)
        sa = case.scapy_sa()
        sequences = list(range(1, len(SIZES) + 1))
        case.random.shuffle(sequences)
        for sequence, size in zip(sequences, SIZES):
            inner = case.inner_packet(size)
            got = esplane.open(case.scapy_seal(sa, inner, sequence))
            assert got == inner, f"size {size}: {got}"
    return len(SIZES)


def forged(program, case):
    """Whatever is damaged, replayed or sealed with another key is dropped for the right reason."""
    count = 0

    def dropped(data, reason):
        nonlocal count
        got = esplane.open(data)
        assert got == reason, f"{reason} expected, got {got}"
        count += 1

    with Esplane(program) as esplane:
        esplane.install("in", case, window=64)
        sa = case.scapy_sa()
        inner = case.inner_packet(100)
        good = case.scapy_seal(sa, inner, 100)
        at = case.esp_offset()
        #            offset in ESP    what lies there
        for offset, reason in [
            (0, "unknown_spi"),
            (7, "authentication_failed"),  # sequence number
            (8, "authentication_failed"),  # IV
            (16, "authentication_failed"),  # ciphertext
            (len(good) - at - 17, "authentication_failed"),  # the encrypted next header
            (len(good) - at - 16, "authentication_failed"),  # ICV, first byte
            (len(good) - at - 1, "authentication_failed"),  # ICV, last byte
        ]:
            damaged = bytearray(good)
            damaged[at + offset] ^= 1
            dropped(bytes(damaged), reason)
        wrong_key = bytes([case.key[0] ^ 1]) + case.key[1:]
        dropped(case.scapy_seal(case.scapy_sa(wrong_key), inner, 100), "authentication_failed")
        wrong_salt = case.key[:-1] + bytes([case.key[-1] ^ 1])
        dropped(case.scapy_seal(case.scapy_sa(wrong_salt), inner, 100), "authentication_failed")
        if case.esn:
            # The high half does not travel, but it is authenticated.
            dropped(case.scapy_seal(sa, inner, 2**32 + 100), "authentication_failed")
        # None of these changed any state: the true packet is still welcome, once.
        assert esplane.open(good) == inner
        dropped(good, "replay_duplicate")
        assert esplane.open(case.scapy_seal(sa, inner, 300)) == inner
        # With ESN a number behind the window is taken for one of the next 2^32 (RFC 4303 §A2.1).
        dropped(case.scapy_seal(sa, inner, 300 - 64), "authentication_failed" if case.esn else "replay_too_old")
        assert esplane.open(case.scapy_seal(sa, inner, 300 - 63)) == inner
    # And scapy refuses ours when damaged, so that its agreement above means something.
    with Esplane(program) as esplane:
        esplane.install("out", case)
        damaged = bytearray(esplane.seal(inner))
        damaged[-1] ^= 1
        try:
            case.scapy_open(case.scapy_sa(), bytes(damaged), 1)
        except IPSecIntegrityError:
            return count + 1
        raise AssertionError("scapy accepted a damaged packet")


def numbers(program, case):
    """Extended numbers walk over 2^32 in both directions; short ones end there."""
    inner = case.inner_packet(40)
    with Esplane(program) as esplane:
        esplane.install("out", case, first=2**32 - 3)
        sa = case.scapy_sa()
        for sequence in range(2**32 - 3, 2**32 + 5):
            sealed = esplane.seal(inner)
            if not case.esn and sequence >= 2**32:
                assert sealed == "sequence_exhausted", sealed
                continue
            check_outer(case, sealed, sequence)
            assert case.scapy_open(sa, sealed, sequence) == inner
    with Esplane(program) as esplane:
        esplane.install("in", case)
        walk = [number for number in WALK if case.esn or number < 2**32]
        for sequence in walk:
            got = esplane.open(case.scapy_seal(sa, inner, sequence))
            assert got == inner, f"number {sequence}: {got}"
            if case.esn and sequence % 2**32 == 0:
                # A straggler from before the turn still finds its high half.
                assert esplane.open(case.scapy_seal(sa, inner, sequence - 5)) == inner
    return 8 + len(walk)


# --- fields ------------------------------------------------------------------------------------


def check_outer(case, data, sequence):
    """Outer headers: addresses, lengths, checksums, ports; then SPI, number and IV."""
    packet = case.outer_packet(data)
    assert (packet.src, packet.dst) == OUTER[case.outer]
    if case.outer == 4:
        assert packet.len == len(data) and packet.ihl == 5
        rebuilt = packet.copy()
        del rebuilt.chksum
        assert IP(bytes(rebuilt)).chksum == packet.chksum, "IPv4 header checksum"
        assert packet.proto == (17 if case.udp else 50)
    else:
        assert packet.plen == len(data) - 40
        assert packet.nh == (17 if case.udp else 50)
    if case.udp:
        udp = packet[UDP]
        assert (udp.sport, udp.dport, udp.len) == (PORT, PORT, len(data) - case.esp_offset() + 8)
        # RFC 3948 §2.1: the checksum SHOULD be zero; IPv6 wants a true one (RFC 8200 §8.1).
        rebuilt = packet.copy()
        del rebuilt[UDP].chksum
        assert udp.chksum == (0 if case.outer == 4 else rebuilt.__class__(bytes(rebuilt))[UDP].chksum), "UDP checksum"
    esp = data[case.esp_offset() :]
    assert int.from_bytes(esp[:4], "big") == SPI
    assert int.from_bytes(esp[4:8], "big") == sequence % 2**32
    # Our IV is the whole number: unique per key as long as numbers are.
    assert int.from_bytes(esp[8:16], "big") == sequence
    assert len(esp) % 4 == 0, "RFC 4303 §2.4: aligned to four bytes"


def check_trailer(case, sa, data, inner):
    """The decrypted trailer: padding 1, 2, 3… as short as can be, next header 4 or 41."""
    plain = sa.crypt_algo.decrypt(sa, ESP(data[case.esp_offset() :]), sa.crypt_key, 16, esn_en=case.esn, esn=0)
    assert bytes(plain.padding) == bytes(range(1, plain.padlen + 1)) and plain.padlen < 4
    assert plain.nh == {4: 4, 6: 41}[case.inner]


# --- the matrix --------------------------------------------------------------------------------

CHECKS = [ours, theirs, forged, numbers]


def run(check, program, case):
    try:
        return str(check(program, case))
    except AssertionError as error:
        print(f"FAILED {check.__name__}, {case.row()}: {error}")
        return "FAILED"


def main():
    program = sys.argv[1]
    print("packets checked:")
    print(f"{'suite':17} {'ESN':4} {'inner':6} {'outer':6} {'carried':8} " + " ".join(f"{c.__name__:>8}" for c in CHECKS))
    cells = failures = packets = 0
    for suite, esn, inner, outer, udp in itertools.product(SUITES, (True, False), (4, 6), (4, 6), (True, False)):
        results = [run(check, program, Case(suite, esn, inner, outer, udp)) for check in CHECKS]
        row = Case(suite, esn, inner, outer, udp).row()
        print(" ".join([row] + [f"{result:>8}" for result in results]), flush=True)
        cells += len(results)
        failures += results.count("FAILED")
        packets += sum(int(result) for result in results if result != "FAILED")
    print(f"summary: {cells - failures} of {cells} cells agree with scapy, {packets} packets")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
