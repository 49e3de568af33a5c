"""What the lab talks to inside a place: a line of JSON in, a line of JSON out, many at once.

    agent.py DEVICE     in a guest, over virtio-serial
    agent.py            in namespaces of the machine itself, over standard input and output

Requests carry `id` and `op`; the answer carries the same `id` and `value`, or `error`. A thread serves each, so
that one that takes long holds up no other. Whatever takes a `netns` happens in that namespace.
"""

import base64
import ctypes
import glob
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import traceback

import traffic

WORK = "/work"
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


def enter(netns):
    """Moves this thread into a namespace; threads serve one request each, so none moves back."""
    with open(f"/run/netns/{netns}") as there:
        if LIBC.setns(there.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {netns}")


class Agent:
    def __init__(self):
        self.processes = {}
        self.background = {}
        self.lock = threading.Lock()

    # --- commands

    def run(self, argv, netns=None, input=None, timeout=60, env=None):
        try:
            result = subprocess.run(self.command(argv, netns), input=input, capture_output=True, text=True,
                                    errors="replace", timeout=timeout, env=os.environ | (env or {}))
            return {"status": result.returncode, "out": result.stdout, "err": result.stderr}
        except subprocess.TimeoutExpired as late:
            said = [(text or b"").decode(errors="replace") for text in (late.stdout, late.stderr)]
            return {"status": -1, "out": said[0], "err": f"{said[1]}\nstill running after {timeout} s: ended"}

    def start(self, argv, netns=None, log=None, env=None):
        """A process that stays, in a session of its own; what it says goes to /work/LOG."""
        out = open(f"{WORK}/{log}", "ab") if log else subprocess.DEVNULL
        process = subprocess.Popen(self.command(argv, netns), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                   env=os.environ | (env or {}), start_new_session=True)
        with self.lock:
            self.processes[process.pid] = process
        return process.pid

    def signal(self, pid, number):
        os.kill(pid, number)

    def wait(self, pid, timeout=10):
        """The exit status, negative for a signal; null if it still runs."""
        try:
            return self.processes[pid].wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def command(self, argv, netns):
        return ["ip", "netns", "exec", netns, *argv] if netns else argv

    # --- files

    def read(self, path):
        with open(path, "rb") as file:
            return base64.b64encode(file.read()).decode()

    def write(self, path, data, mode=0o644):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(base64.b64decode(data))
        os.chmod(path, mode)

    def collect(self):
        """Everything below /work, as a tar archive: logs and captures."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for directory, _, names in os.walk(WORK):
                for name in names:
                    path = os.path.join(directory, name)
                    if os.path.isfile(path) and not os.path.islink(path):
                        tar.add(path, os.path.relpath(path, WORK))
        return base64.b64encode(archive.getvalue()).decode()

    # --- traffic

    def call(self, function, netns=None, args=None, background=False):
        """A function of traffic.py. In the background it gives a handle for `join`."""
        if not background:
            if netns:
                enter(netns)
            return getattr(traffic, function)(**(args or {}))
        ready, outcome = threading.Event(), {}

        def serve():
            try:
                if netns:
                    enter(netns)
                outcome["value"] = getattr(traffic, function)(**(args or {}), ready=ready)
            except Exception:
                outcome["error"] = traceback.format_exc()
            ready.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        ready.wait(20)
        with self.lock:
            handle = str(len(self.background))
            self.background[handle] = thread, outcome
        return handle

    def join(self, handle, timeout=60):
        thread, outcome = self.background[handle]
        thread.join(timeout)
        if thread.is_alive():
            raise TimeoutError(f"still at it after {timeout} s")
        if "error" in outcome:
            raise RuntimeError(outcome["error"])
        return outcome["value"]

    # --- the end of a scenario

    def reset(self):
        """As after boot: no process, no namespace, no file of a scenario."""
        traffic.stop_all()
        for process in self.processes.values():
            if process.poll() is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    process.kill()
            process.wait()
        self.processes.clear()
        names = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
        for name in names:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                if int(pid) != os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
        if names:
            batch = "".join(f"netns del {name}\n" for name in names)
            subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
        for path in [f"{WORK}/{name}" for name in os.listdir(WORK)] + glob.glob("/etc/netns/*"):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def main():
    os.makedirs(WORK, exist_ok=True)
    os.makedirs("/run/netns", exist_ok=True)
    if len(sys.argv) > 1:
        device = os.open(sys.argv[1], os.O_RDWR)
        reader, out = os.fdopen(os.dup(device), "rb", buffering=0), os.fdopen(device, "wb", buffering=0)
    else:
        reader, out = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
        # What else prints must not get between the answers.
        os.dup2(2, 1)
    agent, writing = Agent(), threading.Lock()

    def answer(message):
        data = json.dumps(message).encode() + b"\n"
        with writing:
            while data:
                data = data[out.write(data):]

    def serve(request):
        number, op = request.pop("id"), request.pop("op")
        try:
            answer({"id": number, "value": getattr(agent, op)(**request)})
        except Exception:
            answer({"id": number, "error": traceback.format_exc()})

    answer({"id": 0, "value": "ready"})
    pending = b""
    while chunk := reader.read(1 << 20):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            threading.Thread(target=serve, args=(json.loads(line),), daemon=True).start()


if __name__ == "__main__":
    main()
