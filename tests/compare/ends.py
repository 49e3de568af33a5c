"""What runs at the two ends of a soak: `ends.py ROLE ADDRESS PORT ...`.

    receive A P MIB       takes one TCP connection, prints the SHA-256 of what came and how many bytes are missing
    send A P MIB          fills it; nothing compresses, and no block is like another
    echo A P              sends every datagram back
    ask A P MTU           sends datagrams of edge sizes with Don't Fragment, each until its like has come back; one more byte
                          than MTU must be refused, and the path's MTU be known as MTU then
"""

import hashlib
import os
import socket
import sys
import time

MIB = 1 << 20
PATIENCE = 20
#: Of Linux (in.h, in6.h), which Python does not name: levels, options to set and to ask, value "always".
DISCOVER = {socket.AF_INET: (socket.IPPROTO_IP, 10, 14), socket.AF_INET6: (socket.IPPROTO_IPV6, 23, 24)}
ALWAYS = 2
HEADERS = {socket.AF_INET: 20 + 8, socket.AF_INET6: 40 + 8}
#: Replies lost to a full queue are asked for again as often.
TRIES = 50


def receive(address, port, mib):
    digest, left = hashlib.sha256(), mib * MIB
    with socket.create_server((address, port), family=family(address)) as server:
        server.settimeout(PATIENCE)
        stream = server.accept()[0]
    stream.settimeout(PATIENCE)
    while left and (data := stream.recv(min(left, MIB))):
        digest.update(data)
        left -= len(data)
    print(digest.hexdigest(), left)


def send(address, port, mib):
    digest, block = hashlib.sha256(), os.urandom(MIB)
    with socket.create_connection((address, port), timeout=PATIENCE) as stream:
        for number in range(mib):
            data = number.to_bytes(8, "big") + block[8:]
            digest.update(data)
            stream.sendall(data)
    print(digest.hexdigest(), 0)


def echo(address, port):
    with socket.socket(family(address), socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        while True:
            data, sender = server.recvfrom(65535)
            server.sendto(data, sender)


def ask(address, port, mtu):
    with socket.socket(family(address), socket.SOCK_DGRAM) as client:
        level, discover, known = DISCOVER[client.family]
        client.setsockopt(level, discover, ALWAYS)
        client.settimeout(0.2)
        client.connect((address, port))
        headers = HEADERS[client.family]
        sizes = [*range(headers, 96), 575, 576, 577, 1279, 1280, 1281, *range(mtu - 40, mtu + 1)]
        for size in sizes:
            exchange(client, os.urandom(size - headers))
        refused(client, bytes(mtu + 1 - headers))
        if (path := client.getsockopt(level, known)) != mtu:
            sys.exit(f"the path's MTU is taken for {path}, not {mtu}")
        print(len(sizes))


def exchange(client, data):
    for _ in range(TRIES):
        try:
            client.send(data)
            while (answer := client.recv(65535)) != data:  # a late one of those before
                if len(answer) == len(data) >= 8:
                    sys.exit(f"{len(data)} bytes of data came back changed")
            return
        except TimeoutError:
            pass
        except ConnectionRefusedError:
            time.sleep(0.1)  # the other end still starts
    sys.exit(f"{len(data)} bytes of data never came back")


def refused(client, data):
    """What does not fit must be told to the sender."""
    for _ in range(TRIES):
        try:
            client.send(data)
        except OSError as error:
            if error.errno == 90:  # EMSGSIZE
                return
            raise
        time.sleep(0.1)
    sys.exit(f"{len(data)} bytes of data are more than fits, and nobody says so")


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


if __name__ == "__main__":
    role, address, *numbers = sys.argv[1:]
    {"receive": receive, "send": send, "echo": echo, "ask": ask}[role](address, *map(int, numbers))
