"""Which scenarios run, where, how many at a time; and the table at the end."""

import argparse
import contextlib
import fnmatch
import importlib.util
import json
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from . import image, packages
from .place import BOOT_ATTEMPTS, Guest, Machine, PlaceError, accelerator
from .world import Failed, World

LAB = Path(__file__).resolve().parent.parent
ROOT = LAB.parent
BASE = ROOT / "target/interop"


@dataclass
class Scenario:
    """A story and where it is told. `story(world)` raises if something does not hold; what it returns is the remark."""

    name: str
    story: Callable
    # Which of a family stand for it when time is short.
    quick: bool = False
    # `guest`: a virtual machine. `machine`: namespaces of this machine, on its own kernel.
    place: str = "guest"
    about: str = ""


@dataclass
class Verdict:
    name: str
    passed: bool
    seconds: float
    remark: str


def main():
    arguments = parse()
    scenarios = choose(load(), arguments)
    if arguments.list:
        for scenario in scenarios:
            print(f"  {scenario.name:44} {'quick' if scenario.quick else '':6} {scenario.about}")
        return 0
    # A termination unwinds like Ctrl-C, so that all that was made is removed; also in the background of a script, where
    # Ctrl-C is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        packages.need_tools()
        root = packages.prepare(BASE, arguments.fresh)
        programs = beside(arguments.esplane.resolve()) if arguments.esplane else build()
        verdicts, seconds = tell(scenarios, root, programs, arguments)
    except packages.Missing as missing:
        print(f"interop/run: {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterop/run: interrupted", file=sys.stderr)
        return 130
    report(verdicts, seconds, arguments)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def interrupted(*_):
    raise KeyboardInterrupt


def parse():
    parser = argparse.ArgumentParser(prog="interop/run", description=__doc__ + " Needs root; fetches Debian packages into target/interop/.")
    parser.add_argument("scenario", nargs="*", help="names or patterns such as 'linux-*'; default: all")
    parser.add_argument("--quick", action="store_true", help="a few that stand for the rest")
    parser.add_argument("--list", action="store_true", help="show the scenarios and what each shows")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="guests at a time (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the table")
    parser.add_argument("--esplane", type=Path, metavar="FILE", help="the program to test (default: a release build)")
    parser.add_argument("--fresh", action="store_true", help="fetch the Debian packages again")
    return parser.parse_args()


def load():
    """Every scenario of interop/scenarios/NAME/scenario.py."""
    found = []
    for file in sorted((LAB / "scenarios").glob("*/scenario.py")):
        spec = importlib.util.spec_from_file_location(f"scenario_{file.parent.name.replace('-', '_')}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        quick = getattr(module, "QUICK", set())
        first_line = module.__doc__.strip().splitlines()[0]
        for scenario in module.scenarios():
            scenario.about = scenario.about or first_line
            scenario.quick |= scenario.name in quick
            quick = quick - {scenario.name}
            found.append(scenario)
        assert not quick, f"{file}: no scenario is called {', '.join(quick)}"
    names = [scenario.name for scenario in found]
    assert len(set(names)) == len(names), "two scenarios have the same name"
    return found


def choose(scenarios, arguments):
    chosen = []
    for pattern in arguments.scenario:
        matching = [scenario for scenario in scenarios if fnmatch.fnmatch(scenario.name, pattern)]
        if not matching:
            sys.exit(f"interop/run: no scenario is called {pattern}; see interop/run --list")
        chosen += [scenario for scenario in matching if scenario not in chosen]
    chosen = chosen if arguments.scenario else scenarios
    return [scenario for scenario in chosen if scenario.quick or not arguments.quick]


def build():
    command = ["cargo", "build", "--release", "--package", "esplane-gateway", "--package", "esplane-preload"]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise packages.Missing("cargo build failed")
    return beside(ROOT / "target/release/esplane")


def beside(esplane):
    """The daemon, and the library for charon that was built with it."""
    return [esplane, esplane.parent / "libesplane_preload.so"]


def tell(scenarios, root, programs, arguments):
    started = time.monotonic()
    picture = image.guest_image(BASE, root, LAB, programs)
    try:
        fast = accelerator(root, picture, BASE)
        waiting = queue.SimpleQueue()
        for scenario in scenarios:
            waiting.put(scenario)
        crew = Crew(root, picture, fast, waiting, len(scenarios), arguments.json)
        jobs = min(arguments.jobs, len(scenarios))
        threads = [threading.Thread(target=crew.work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        try:
            # Not by `join`: Python 3.11 takes a thread for ended once its join has been interrupted.
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.1)
        finally:
            crew.stop()
            for thread in threads:
                thread.join()
        order = {scenario.name: number for number, scenario in enumerate(scenarios)}
        return sorted(crew.verdicts, key=lambda verdict: order[verdict.name]), time.monotonic() - started
    finally:
        picture.unlink()


class Crew:
    """Workers, each with a guest of its own that serves scenario after scenario."""

    def __init__(self, root, picture, fast, waiting, total, quiet):
        self.root, self.picture, self.fast, self.waiting, self.total = root, picture, fast, waiting, total
        self.quiet = quiet
        self.verdicts, self.places, self.stopping = [], set(), False
        self.lock = threading.Lock()

    def work(self):
        places = {}
        try:
            while not self.stopping:
                try:
                    scenario = self.waiting.get_nowait()
                except queue.Empty:
                    return
                self.one(scenario, places)
        finally:
            for kind in list(places):
                self.leave(places, kind)

    def one(self, scenario, places):
        started = time.monotonic()
        directory = BASE / "logs" / scenario.name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        passed, remark = False, ""
        try:
            place = places.get(scenario.place) or self.enter(scenario.place, places)
            try:
                remark = scenario.story(World(place, directory, self.root)) or ""
                passed = True
            finally:
                with contextlib.suppress(PlaceError):
                    place.collect(directory)
        except Exception as error:
            said = str(error).strip() or repr(error)
            remark = said.splitlines()[0][:160]
            (directory / "failure").write_text(said if isinstance(error, Failed) else traceback.format_exc())
        if self.stopping:
            return
        if passed:
            try:
                places[scenario.place].ask("reset")
            except PlaceError as error:
                passed, remark = False, f"its place cannot be cleaned up: {error}"
        if not passed and scenario.place in places:
            (directory / "place").write_text(places[scenario.place].last_words())
            # Whatever it left behind disturbs no other.
            self.leave(places, scenario.place)
        verdict = Verdict(scenario.name, passed, time.monotonic() - started, remark)
        with self.lock:
            self.verdicts.append(verdict)
            if not self.quiet:
                print(f"[{len(self.verdicts):3}/{self.total}] {row(verdict)}", flush=True)
                if not passed:
                    print("    " + (directory / "failure").read_text()[:3000].replace("\n", "\n    "), flush=True)

    def enter(self, kind, places):
        for attempt in range(BOOT_ATTEMPTS):
            place = Guest(self.root, self.picture, self.fast) if kind == "guest" else Machine(self.picture)
            places[kind] = place
            with self.lock:
                self.places.add(place)
            try:
                # Behind the line above, so that one that just begins is ended too.
                if self.stopping:
                    raise PlaceError("stopping")
                place.come_up()
                return place
            except PlaceError:
                if self.stopping or attempt + 1 == BOOT_ATTEMPTS:
                    raise
                self.leave(places, kind)

    def leave(self, places, kind):
        place = places.pop(kind)
        with self.lock:
            self.places.discard(place)
        place.close()

    def stop(self):
        """Ends all places: workers then fail at once and return."""
        self.stopping = True
        with self.lock:
            for place in self.places:
                place.gone = "stopping"
                place.process.kill()


def row(verdict):
    return f"{verdict.name:44} {'passed' if verdict.passed else 'FAILED':6} {verdict.seconds:6.1f} s  {verdict.remark}"


def report(verdicts, seconds, arguments):
    passed = sum(verdict.passed for verdict in verdicts)
    failed = len(verdicts) - passed
    if arguments.json:
        rows = [vars(verdict) | {"seconds": round(verdict.seconds, 1)} for verdict in verdicts]
        print(json.dumps({"scenarios": rows, "passed": passed, "failed": failed, "seconds": round(seconds, 1)}))
        return
    print(f"\nScenarios after {seconds / 60:.1f} min (logs and captures: target/interop/logs/NAME/)\n")
    for verdict in verdicts:
        print(f"  {row(verdict)}")
    print(f"\n{passed} passed, {failed} failed")
