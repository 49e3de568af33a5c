"""What hosts of a scenario send, receive and count. The agent calls these in a thread inside the host's namespace.

Functions that serve until they are told to stop, or that count what comes in, take `ready`, which they set once they listen.
"""

import base64
import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import os
import select
import socket
import struct
import threading
import time

STOP = threading.Event()


def stop_all():
    """Ends what runs in the background, and lets the next scenario begin."""
    global STOP
    STOP.set()
    STOP = threading.Event()


def family_of(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# --- echo -------------------------------------------------------------------------------------------


def ping(to, sizes, count=1, timeout=5.0, outstanding=16, dont_fragment=True):
    """ICMP echoes of `sizes` bytes of whole inner packet; the kernel at the other end answers.

    Returns what was sent and answered, and which sizes lack an answer. An answer with other bytes than the question's
    counts as none.
    """
    v6 = ":" in to
    headers = 48 if v6 else 28
    protocol = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
    with socket.socket(family_of(to), socket.SOCK_RAW, protocol) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        if not v6 and dont_fragment:
            raw.setsockopt(socket.IPPROTO_IP, 10, 3)  # IP_MTU_DISCOVER, IP_PMTUDISC_PROBE
        ident = struct.unpack("!H", os.urandom(2))[0]
        waiting, sent, answered, refused = {}, 0, 0, []
        plan = [size for _ in range(count) for size in sizes]
        deadline = time.monotonic() + timeout
        while sent < len(plan) or waiting:
            while sent < len(plan) and len(waiting) < outstanding:
                body = os.urandom(max(plan[sent] - headers, 0))
                packet = echo_request(v6, ident, sent & 0xFFFF, body)
                try:
                    raw.sendto(packet, (to, 0))
                    waiting[sent & 0xFFFF] = plan[sent], body
                except OSError as error:
                    refused.append([plan[sent], error.strerror])
                sent += 1
                deadline = time.monotonic() + timeout
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([raw], [], [], left)[0]:
                break
            packet = raw.recv(65535)
            packet = packet if v6 else packet[(packet[0] & 15) * 4:]
            if packet[0] == (129 if v6 else 0) and packet[4:6] == struct.pack("!H", ident):
                number = struct.unpack("!H", packet[6:8])[0]
                if number in waiting and waiting[number][1] == packet[8:]:
                    del waiting[number]
                    answered += 1
        return {"sent": sent, "answered": answered, "refused": refused,
                "unanswered_sizes": sorted(size for size, _ in waiting.values())}


def echo_request(v6, ident, number, body):
    # The kernel fills in the check sum of ICMPv6.
    packet = struct.pack("!BBHHH", 128 if v6 else 8, 0, 0, ident, number) + body
    if v6:
        return packet
    even = packet + b"\0" * (len(packet) & 1)
    total = sum(struct.unpack(f"!{len(even) // 2}H", even))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return packet[:2] + struct.pack("!H", total ^ 0xFFFF) + packet[4:]


# --- TCP --------------------------------------------------------------------------------------------


def tcp_sink(address, port, ready):
    """Takes one connection to its end; how many bytes came, and their hash."""
    with socket.socket(family_of(address)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        ready.set()
        listener.settimeout(100)
        connection, _ = listener.accept()
        connection.settimeout(100)
        digest, count = hashlib.sha256(), 0
        while data := connection.recv(1 << 18):
            digest.update(data)
            count += len(data)
        connection.close()
        return {"bytes": count, "sha256": digest.hexdigest()}


def tcp_send(to, port, size, source=None):
    """Sends random bytes of this many in all, in pieces of every length up to a large one."""
    with socket.socket(family_of(to)) as client:
        client.settimeout(100)
        if source:
            client.bind((source, 0))
        client.connect((to, port))
        digest, left, piece = hashlib.sha256(), size, 1
        started = time.monotonic()
        while left:
            data = os.urandom(min(piece, left))
            client.sendall(data)
            digest.update(data)
            left -= len(data)
            piece = piece % 65537 + 601
        client.shutdown(socket.SHUT_WR)
        client.recv(1)
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return {"bytes": size, "sha256": digest.hexdigest(), "seconds": time.monotonic() - started,
                "retransmitted": struct.unpack_from("I", info, 100)[0]}


# --- numbered packets -------------------------------------------------------------------------------


def flow_receive(address, port, ready, quiet=3.0, limit=600.0, stop_file=None):
    """Counts numbered UDP packets until the sender's last one, and what is still under way behind it; or until `stop_file` is there."""
    stop = STOP
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        receiver.bind((address, port))
        ready.set()
        seen, duplicates, reordered, highest, damaged = set(), 0, 0, -1, 0
        total, arrivals, end = None, [], time.monotonic() + limit
        last = time.monotonic()
        while not stop.is_set() and time.monotonic() < end:
            if total is not None and (len(seen) >= total or time.monotonic() - last > quiet):
                break
            receiver.settimeout(0.2)
            try:
                data = receiver.recv(65535)
            except TimeoutError:
                if stop_file and os.path.exists(stop_file):
                    break
                continue
            number, count, size = struct.unpack_from("!QQI", data)
            if count:
                total = count
                continue
            last = time.monotonic()
            if len(data) != size or data[20:] != filling(number, size - 20):
                damaged += 1
                continue
            if number in seen:
                duplicates += 1
                continue
            seen.add(number)
            reordered += number < highest
            highest = max(highest, number)
            arrivals.append(last)
        gaps = [b - a for a, b in zip(arrivals, arrivals[1:])]
        missing = sorted(set(range(total if total is not None else highest + 1)) - seen)
        return {"received": len(seen), "expected": total, "missing": missing[:200], "lost": len(missing),
                "duplicates": duplicates, "reordered": reordered, "damaged": damaged,
                "longest_gap_seconds": max(gaps, default=0.0)}


def flow_send(to, port, packets_per_second, seconds=None, size=200, source=None, ready=None, stop_file=None):
    """Numbered packets at an even rate, for some seconds or until `stop_file` is there. Says at its end how many there were."""
    stop = STOP
    with socket.socket(family_of(to), socket.SOCK_DGRAM) as sender:
        if source:
            sender.bind((source, 0))
        if ready:
            ready.set()
        number, failed, started = 0, {}, time.monotonic()
        while not stop.is_set():
            now = time.monotonic() - started
            if seconds is not None and now >= seconds or stop_file and os.path.exists(stop_file):
                break
            due = int(now * packets_per_second) + 1
            while number < due:
                try:
                    sender.sendto(struct.pack("!QQI", number, 0, size) + filling(number, size - 20), (to, port))
                except OSError as error:
                    failed[error.strerror] = failed.get(error.strerror, 0) + 1
                number += 1
            time.sleep(max(0.0, started + number / packets_per_second - time.monotonic()))
        for _ in range(5):
            time.sleep(0.3)
            sender.sendto(struct.pack("!QQI", 0, number, 20), (to, port))
        return {"sent": number, "failed": failed}


def burst(to, port, count, size=200):
    """Numbered packets as fast as they go, with no word at the end."""
    with socket.socket(family_of(to), socket.SOCK_DGRAM) as sender:
        for number in range(count):
            with contextlib.suppress(OSError):
                sender.sendto(struct.pack("!QQI", number, 0, size) + filling(number, size - 20), (to, port))


def filling(number, size):
    return (struct.pack("!Q", number * 0x9E3779B97F4A7C15 & (1 << 64) - 1) * (size // 8 + 1))[:size]


# --- raw frames -------------------------------------------------------------------------------------


def capture(device, file, ready, stop_file, port=4500):
    """Keeps every ESP packet, plain or in UDP, that this host sends on a device, until `stop_file` is there.

    Unlike tcpdump it ends behind the last packet that was sent before it was told to. Frames go to a pcap file.
    """
    stop = STOP
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as tap:
        tap.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        tap.bind((device, 3))  # ETH_P_ALL
        tap.settimeout(0.1)
        ready.set()
        frames, ending = [], False
        while True:
            try:
                frame, address = tap.recvfrom(65535)
            except (TimeoutError, BlockingIOError):
                if ending:
                    break
                if stop.is_set() or os.path.exists(stop_file):
                    ending = True
                    tap.setblocking(False)
                continue
            if address[2] == socket.PACKET_OUTGOING and carries_esp(frame[14:], port):
                frames.append((time.time(), frame))
        dropped = struct.unpack("II", tap.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
    with open(file, "wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1))
        for moment, frame in frames:
            out.write(struct.pack("<IIII", int(moment), int(moment % 1 * 1e6), len(frame), len(frame)) + frame)
    return {"frames": len(frames), "dropped": dropped}


def carries_esp(packet, port):
    if packet[0] >> 4 == 4:
        protocol, payload = packet[9], packet[(packet[0] & 15) * 4:]
    elif packet[0] >> 4 == 6:
        protocol, payload = packet[6], packet[40:]
    else:
        return False
    # In UDP, four zero bytes mark what is not ESP (RFC 3948 §2.2).
    return protocol == 50 or protocol == 17 and payload[2:4] == struct.pack("!H", port) and payload[8:12] != bytes(4)


def inject(device, frames):
    """Puts recorded frames onto a link once more, as they are, and no faster than queues take them."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as link:
        link.bind((device, 0))
        for number, frame in enumerate(frames):
            link.send(base64.b64decode(frame))
            if number % 16 == 15:
                time.sleep(0.004)
    return len(frames)


def offloads_off(devices):
    """Every frame on these links is a packet of its own with a complete check sum, so that captures can be read and replayed."""
    commands = (0x17, 0x15, 0x19, 0x1F, 0x24, 0x2C)  # ETHTOOL_STXCSUM, SRXCSUM, SSG, STSO, SGSO, SGRO
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for device in devices:
            for command in commands:
                value = ctypes.create_string_buffer(struct.pack("II", command, 0))
                request = struct.pack("16sP", device.encode(), ctypes.addressof(value)).ljust(40, b"\0")
                # A link that has no such offload needs none turned off.
                with contextlib.suppress(OSError):
                    fcntl.ioctl(control, 0x8946, request)  # SIOCETHTOOL


# --- the daemon and the kernel ----------------------------------------------------------------------


def http_get(path, port=9470, address="127.0.0.1"):
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return {"status": answer.status, "body": answer.read().decode()}
    except OSError as error:
        return {"status": 0, "body": str(error)}
    finally:
        connection.close()


def hold_udp_encap(port, ready):
    """Keeps the socket that hands ESP in UDP to the kernel (RFC 3948), as a key exchange daemon would."""
    stop = STOP
    sockets = []
    for family in (socket.AF_INET, socket.AF_INET6):
        held = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", port))
        held.setsockopt(socket.IPPROTO_UDP, 100, 2)  # UDP_ENCAP, UDP_ENCAP_ESPINUDP
        sockets.append(held)
    ready.set()
    while not stop.wait(0.2):
        pass
    for held in sockets:
        held.close()
