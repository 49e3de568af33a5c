"""Debian packages as files: fetched by apt, unpacked below target/interop/, never installed.

`root/` then looks like a small Debian with strongSwan, Libreswan, iproute2, tcpdump, tshark, Python
and a kernel. It is made once; `interop/run --fresh` makes it again.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Each row is resolved on its own: Libreswan and strongSwan refuse to be installed together, which
# does not matter to files that lie side by side.
PACKAGES = [
    """python3.11 dash busybox-static iproute2 nftables tcpdump tshark iputils-ping iperf3 openssl kmod
    strongswan-swanctl charon-systemd libstrongswan-standard-plugins libstrongswan-extra-plugins
    libcharon-extra-plugins""",
    "libreswan",
    "linux-image-cloud-amd64",
]
# Not worth their place: what the kernel package wants in order to be installed.
SKIP = ("initramfs-tools", "linux-base", "perl", "usrmerge", "udev", "klibc", "libklibc", "dpkg", "debconf")

# Commands of the machine itself, with the package each comes from.
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "cpio": "cpio"}


class Missing(Exception):
    """What this machine lacks, and what would help."""


def prepare(base, fresh=False):
    """The unpacked root below `base`, made if it is not there."""
    root, stamp = base / "root", base / "root.stamp"
    wanted = "\n".join(" ".join(row.split()) for row in PACKAGES)
    base.mkdir(parents=True, exist_ok=True)
    # Two runs at once must not unpack over each other.
    with open(base / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if fresh or not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            unpack(fetch(base / "packages"), root)
            stamp.write_text(wanted)
    return root


def need_tools():
    """Installs the few commands that run on the machine itself, where it may."""
    if os.geteuid() != 0:
        raise Missing("interop/run needs root: it makes namespaces and device nodes")
    for command, package in TOOLS.items():
        if not shutil.which(command):
            print(f"installing the Debian package {package}", file=sys.stderr)
            apt("update")
            apt("install", "-y", "--no-install-recommends", package)
        if not shutil.which(command):
            raise Missing(f"needs the command {command} (Debian package {package})")


def fetch(directory):
    """Downloads the packages and what they depend on; the files."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "partial").mkdir(parents=True)
    print("interop: fetching Debian packages", file=sys.stderr)
    options = [
        # As if nothing were installed: else apt leaves out what this machine happens to have.
        "Dir::State::status=/dev/null",
        f"Dir::Cache::archives={directory}",
        "APT::Install-Recommends=false",
        "APT::Sandbox::User=root",
    ]
    options = [word for option in options for word in ("-o", option)]
    try:
        for row in PACKAGES:
            apt(*options, "--download-only", "-y", "install", *row.split())
    except Missing:
        # Package lists may be older than the archive.
        apt("update")
        for row in PACKAGES:
            apt(*options, "--download-only", "-y", "install", *row.split())
    return sorted(file for file in directory.glob("*.deb") if not file.name.startswith(SKIP))


def unpack(files, root):
    print(f"interop: unpacking {len(files)} packages", file=sys.stderr)
    shutil.rmtree(root, ignore_errors=True)
    for directory in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / directory).mkdir(parents=True)
        (root / directory).symlink_to(f"usr/{directory}")
    for file in files:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as archive:
            subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", root], stdin=archive.stdout, check=True)
        if archive.returncode != 0:
            raise Missing(f"{file} is damaged; run again with --fresh")
    # Not busybox: its shell takes its own `ip` for the real one.
    (root / "usr/bin/sh").unlink(missing_ok=True)
    (root / "usr/bin/sh").symlink_to("dash")
    (root / "usr/bin/python3").symlink_to("python3.11")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    for directory in ("proc", "sys", "dev", "run", "tmp", "work", "opt/lab", "opt/esplane", "root", "var/lib"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    version = next((root / "lib/modules").iterdir()).name
    subprocess.run(["chroot", root, "depmod", version], check=True)


def apt(*arguments):
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(["apt-get", "-q", *arguments], env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise Missing(f"apt-get {' '.join(arguments)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def closure(root, program):
    """The shared libraries a program of `root` loads, as paths inside of it."""
    loader = "/lib64/ld-linux-x86-64.so.2"
    result = subprocess.run(["chroot", root, loader, "--list", program], capture_output=True, text=True)
    lines = result.stdout.splitlines() if result.returncode == 0 else []
    if any("not found" in line for line in lines):
        raise Missing(f"{program} lacks libraries:\n{result.stdout}")
    return {word for line in lines for word in line.split() if word.startswith("/")} | {loader}


def kernel(root) -> Path:
    return next((root / "boot").glob("vmlinuz-*"))
