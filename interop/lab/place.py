"""Where hosts live: a guest under QEMU, or namespaces of this machine. Both run the agent and speak alike."""

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from .packages import kernel

# A guest is up after five seconds, on a busy machine after a minute.
BOOT_SECONDS = 150
BOOT_ATTEMPTS = 2


class PlaceError(Exception):
    """The place does not do as told, or is gone."""


class Place:
    """The agent's other end. Thread-safe. Made, it has begun to start; `come_up` waits for it; `close` ends it at any time."""

    def __init__(self):
        self.answers, self.arrived, self.number = {}, threading.Condition(), 0
        self.gone = None
        self.writing = threading.Lock()
        # What was asked for and when, for whoever looks into a scenario that failed.
        self.steps = None

    def attach(self, read, write, seconds):
        """Begins to listen; returns once the agent says it is ready."""
        self.send_bytes = write
        threading.Thread(target=self.listen, args=(read,), daemon=True).start()
        self.await_answer(0, seconds)

    def listen(self, read):
        pending = b""
        with contextlib.suppress(OSError):
            while chunk := read(1 << 20):
                *lines, pending = (pending + chunk).split(b"\n")
                with self.arrived:
                    for line in lines:
                        message = json.loads(line)
                        self.answers[message["id"]] = message
                    self.arrived.notify_all()
        with self.arrived:
            self.gone = self.gone or "the agent is gone"
            self.arrived.notify_all()

    def ask(self, op, patience=180, **arguments):
        with self.arrived:
            self.number += 1
            number = self.number
        line = json.dumps({"id": number, "op": op} | arguments).encode() + b"\n"
        self.note(f"{op} {arguments.get('netns') or ''} {arguments.get('argv') or arguments.get('function') or arguments.get('path') or ''}")
        with self.writing:
            try:
                self.send_bytes(line)
            except OSError as error:
                raise PlaceError(f"cannot reach the agent: {error}") from error
        message = self.await_answer(number, patience)
        if "error" in message or op in ("run", "call", "join", "wait"):
            self.note(f"  -> {str(message.get('value', message.get('error')))[:300]}")
        if "error" in message:
            raise PlaceError(f"{op} failed inside:\n{message['error']}")
        return message["value"]

    def note(self, text):
        if self.steps:
            with self.writing, open(self.steps, "a") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def await_answer(self, number, seconds):
        with self.arrived:
            if not self.arrived.wait_for(lambda: number in self.answers or self.gone, seconds):
                raise PlaceError(f"no answer within {seconds} s\n{self.last_words()}")
            if number not in self.answers:
                raise PlaceError(f"{self.gone}\n{self.last_words()}")
            return self.answers.pop(number)

    def collect(self, directory):
        """Copies what lies below /work to a directory of this machine."""
        data = base64.b64decode(self.ask("collect"))
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(directory, filter="data")

    def last_words(self):
        return ""


class Guest(Place):
    """A virtual machine without disk: kernel, initramfs, and one virtio-serial port for the agent.

    It has one processor: with two, the kernel's own ESP sends packets up to 41 places late, behind the smallest window. Emulated,
    its time goes by its instructions (`-icount`): on a busy machine it is slow as a whole, where its clocks would else run up to
    fifteen times too fast and everything time out.
    """

    def __init__(self, root, image, accelerator, memory_mib=1024, more=()):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="esplane-interop-"))
        self.console = self.directory / "console"
        port = self.directory / "agent"
        command = [
            "qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-m", str(memory_mib),
            *(["-accel", "kvm", "-cpu", "host"] if accelerator == "kvm" else ["-accel", "tcg", "-icount", "shift=1", "-cpu", "max"]),
            "-kernel", str(kernel(root)), "-initrd", str(image),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on",
            "-serial", f"file:{self.console}", "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={port},server=on,wait=off",
            "-device", "virtserialport,chardev=agent", *more,
        ]  # fmt: skip
        self.log = open(self.directory / "qemu.log", "w")
        # It dies with the thread that made it, whatever becomes of the rest.
        self.process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def come_up(self, seconds=BOOT_SECONDS):
        connection = self.connect(self.directory / "agent")
        self.attach(connection.recv, connection.sendall, seconds)

    def connect(self, port):
        end = time.monotonic() + 10
        while True:
            try:
                connection = socket.socket(socket.AF_UNIX)
                connection.connect(str(port))
                return connection
            except OSError:
                connection.close()
                if self.process.poll() is not None or time.monotonic() > end:
                    raise PlaceError(f"QEMU did not start:\n{self.last_words()}") from None
                time.sleep(0.05)

    def last_words(self):
        texts = [path.read_text(errors="replace")[-3000:] for path in (self.directory / "qemu.log", self.console) if path.exists()]
        return "\n".join(texts)

    def close(self):
        self.gone = self.gone or "closed"
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Machine(Place):
    """Namespaces of this machine: processes, mounts and network of their own, with the very files of a guest, on this machine's kernel.

    All of it ends with its first process, which ends with this one.
    """

    def __init__(self, image):
        super().__init__()
        self.error = tempfile.TemporaryFile()
        script = f"""set -e
            mount -t tmpfs files /mnt && cd /mnt
            # Two archives in a row: the kernel reads on by itself, cpio does not.
            {{ cpio --extract --make-directories --quiet --io-size=512; cpio --extract --make-directories --quiet --io-size=512 --unconditional; }} <{image}
            mount -t proc proc proc && mount -t sysfs sysfs sys && mount --rbind /dev dev
            mkdir -p opt/busybox && chroot . busybox --install -s /opt/busybox && ln -sfn /run var/run
            exec chroot . python3 /opt/lab/agent.py"""
        command = ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "sh", "-c", script]
        environment = {"PATH": "/usr/bin:/usr/sbin:/bin:/sbin:/opt/busybox", "HOME": "/root", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.error, env=environment, bufsize=0)  # fmt: skip

    def come_up(self, seconds=BOOT_SECONDS):
        self.attach(self.process.stdout.read, self.process.stdin.write, seconds)

    def last_words(self):
        self.error.seek(0)
        return self.error.read().decode(errors="replace")[-3000:]

    def close(self):
        self.gone = self.gone or "closed"
        self.process.kill()
        self.process.wait()
        self.error.close()


def accelerator(root, image, base):
    """`kvm` if a guest really comes up under it, else `tcg`. The answer holds until this machine boots again."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = base / "accelerator"
    if memory.exists() and memory.read_text().startswith(boot):
        return memory.read_text().split()[1]
    found = "tcg"
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        # There are machines that have KVM and where a guest hangs in it.
        probe = Guest(root, image, "kvm")
        with contextlib.suppress(PlaceError):
            probe.come_up(seconds=8)
            found = "kvm"
        probe.close()
    memory.write_text(f"{boot} {found}\n")
    return found
