"""The initramfs of a guest, from what `packages.py` unpacked.

A guest needs a tenth of the packages' files: the programs scenarios use, the libraries these load,
the kernel modules below, Python. An archive of those is made once per set of packages; a second one with
the agent and the daemon under test, which change all the time, is laid behind it, as the kernel allows.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .packages import closure

MODULES = """virtio_pci virtio_console virtio_net virtio_rng af_packet veth dummy tun bridge macvlan
    xfrm_user xfrm_interface esp4 esp6 tunnel4 tunnel6 af_key raw_diag udp_diag
    hmac sha256_generic sha512_generic ctr ecb drbg gcm ccm seqiv echainiv ghash_clmulni_intel aesni_intel chacha20poly1305 chacha_x86_64 poly1305_x86_64
    cbc sha1_generic authenc cmac
    sch_netem sch_tbf nf_tables nf_nat nft_chain_nat nft_masq nft_nat nft_ct nft_redir xt_policy
    nf_conntrack af_packet_diag""".split()

PROGRAMS = """usr/bin/busybox usr/bin/dash usr/bin/python3.11 usr/bin/ip usr/sbin/tc usr/sbin/nft usr/bin/tcpdump
    usr/bin/ping usr/bin/iperf3 usr/bin/openssl usr/sbin/charon-systemd usr/sbin/swanctl
    usr/libexec/ipsec/* usr/lib/ipsec/plugins/*.so usr/sbin/ipsec
    usr/bin/certutil usr/bin/pk12util usr/bin/crlutil
    usr/lib/python3.11/lib-dynload/*.so usr/lib/x86_64-linux-gnu/ossl-modules/*.so
    usr/lib/x86_64-linux-gnu/nss/*.so usr/lib/x86_64-linux-gnu/libfreebl*.so usr/lib/x86_64-linux-gnu/libsoftokn3.so
    usr/lib/x86_64-linux-gnu/libnssckbi.so usr/lib/x86_64-linux-gnu/libnss_files.so.2""".split()
# Loaded by name, so that no list of libraries shows it: glibc's pthread_cancel needs it.
LIBRARIES = ["usr/lib/x86_64-linux-gnu/libgcc_s.so.1"]
DATA = ["etc/passwd", "etc/group", "etc/hosts", "etc/protocols", "etc/services", "etc/strongswan.d",
        "etc/ipsec.conf", "etc/ipsec.secrets", "usr/lib/ssl", "etc/ssl"]
# Of Python, what the agent never imports.
PYTHON_WITHOUT = shutil.ignore_patterns("__pycache__", "test", "tkinter", "idlelib", "lib2to3", "ensurepip",
    "pydoc_data", "distutils", "sqlite3", "lib-dynload", "unittest", "wsgiref", "xmlrpc", "turtle*")
DYNLOAD_WITHOUT = ("_sqlite3", "_tkinter", "_curses", "readline", "_dbm", "_gdbm", "nis", "_test", "_xx", "audioop", "_codecs_")

AGENT_IMPORTS = "base64, contextlib, ctypes, fcntl, glob, hashlib, http.client, io, json, os, select, shutil, socket, struct, subprocess, tarfile, threading, traceback"


def base_archive(base, root):
    """The slow part: packages and kernel modules. Made again only when `root` is."""
    archive = base / "base.cpio"
    stamp = base / "root.stamp"
    source = Path(__file__)
    if archive.exists() and archive.stat().st_mtime > max(stamp.stat().st_mtime, source.stat().st_mtime):
        return archive
    with tempfile.TemporaryDirectory(dir=base) as directory:
        tree = Path(directory)
        usr_merged(tree)
        copy_programs(root, tree)
        copy_modules(root, tree)
        pack(tree, archive)
    return archive


def guest_image(base, root, lab, programs):
    """What QEMU boots: the base archive with the lab's files and the programs under test."""
    image = base / f"image-{os.getpid()}.cpio"
    with tempfile.TemporaryDirectory(dir=base) as directory:
        tree = Path(directory)
        usr_merged(tree)
        shutil.copytree(lab / "guest", tree / "opt/lab", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        os.rename(tree / "opt/lab/init", tree / "init")
        (tree / "init").chmod(0o755)
        copy_under_test(programs, tree)
        overlay = base / f"overlay-{os.getpid()}.cpio"
        pack(tree, overlay)
    with open(image, "wb") as out:
        for part in (base_archive(base, root), overlay):
            with open(part, "rb") as file:
                shutil.copyfileobj(file, out)
            out.write(b"\0" * (-out.tell() % 512))
    overlay.unlink()
    return image


def copy_under_test(programs, tree):
    """The programs go to /opt/esplane, with their libraries beside them, so that they meet the very C library
    they were linked with."""
    target = tree / "opt/esplane"
    target.mkdir(parents=True, exist_ok=True)
    for program in programs:
        shutil.copy(program, target / program.name)
        subprocess.run(["strip", "--strip-debug", target / program.name], check=False, stderr=subprocess.DEVNULL)
        listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        (target / "lib").mkdir(exist_ok=True)
        for word in listing.split():
            if word.startswith("/"):
                shutil.copy(word, target / "lib" / Path(word).name)
    # One command that finds them.
    wrapper = tree / "usr/bin/esplane"
    wrapper.parent.mkdir(parents=True, exist_ok=True)
    wrapper.write_text('#!/bin/sh\nexec /opt/esplane/lib/ld-linux-x86-64.so.2 --library-path /opt/esplane/lib /opt/esplane/esplane "$@"\n')
    wrapper.chmod(0o755)


def usr_merged(tree):
    for directory in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / directory).mkdir(parents=True)
        (tree / directory).symlink_to(f"usr/{directory}")
    for directory in ("proc", "sys", "dev", "run", "tmp", "work", "etc", "root", "var/lib", "opt/lab"):
        (tree / directory).mkdir(parents=True, exist_ok=True)


def copy_programs(root, tree):
    wanted = set(LIBRARIES)
    for pattern in PROGRAMS:
        for file in root.glob(pattern):
            if file.name.startswith(DYNLOAD_WITHOUT):
                continue
            wanted.add(str(file.relative_to(root)))
            wanted |= {name.lstrip("/") for name in closure(root, f"/{file.relative_to(root)}")}
    for name in sorted(wanted):
        copy(root, tree, name)
    for name in DATA:
        if (root / name).is_dir():
            shutil.copytree(root / name, tree / name, symlinks=True, dirs_exist_ok=True)
        elif (root / name).exists():
            copy(root, tree, name)
    shutil.copytree(root / "usr/lib/python3.11", tree / "usr/lib/python3.11", ignore=PYTHON_WITHOUT, dirs_exist_ok=True)
    (tree / "usr/bin/python3").symlink_to("python3.11")
    (tree / "usr/bin/sh").symlink_to("dash")
    # Over these `ip netns exec` lays what a host has in /etc/netns/HOST.
    (tree / "etc/strongswan.conf").touch()
    (tree / "etc/swanctl").mkdir()
    # Python keeps what it compiles for these: else a guest would at each boot, on an emulated processor.
    subprocess.run(["chroot", tree, "python3", "-c", f"import {AGENT_IMPORTS}"], check=True)


def copy(root, tree, name):
    target = tree / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy(os.path.realpath(root / name) if not (root / name).is_symlink() else resolve(root, name), target)


def resolve(root, name):
    """A link's target, with absolute ones taken inside the root."""
    path = root / name
    while path.is_symlink():
        link = os.readlink(path)
        path = root / link.lstrip("/") if link.startswith("/") else path.parent / link
    return path


def copy_modules(root, tree):
    """The modules wanted and what they depend on, with `order`: one a line, as they are to be loaded."""
    modules = next((root / "lib/modules").iterdir())
    needs, path_of = {}, {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, dependencies = line.split(":")
        needs[path] = dependencies.split()
        path_of[Path(path).name.split(".ko")[0].replace("-", "_")] = path
    order = []

    def add(path):
        for dependency in reversed(needs[path]):
            add(dependency)
        if path not in order:
            order.append(path)

    for name in MODULES:
        if name in path_of:
            add(path_of[name])
    target = tree / "opt/lab/modules"
    target.mkdir(parents=True)
    for path in order:
        shutil.copy(modules / path, target)
    (target / "order").write_text("".join(f"{Path(path).name}\n" for path in order))


def pack(tree, archive):
    files = subprocess.run(["find", ".", "-print0"], cwd=tree, stdout=subprocess.PIPE, check=True).stdout
    partial = archive.with_suffix(".new")
    with open(partial, "wb") as out:
        subprocess.run(["cpio", "--null", "-o", "-H", "newc", "-R", "0:0", "--quiet"], cwd=tree, input=files, stdout=out, check=True)
    partial.rename(archive)
