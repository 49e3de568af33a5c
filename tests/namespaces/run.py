#!/usr/bin/env python3
"""The real daemon on the real kernel: `run.py ESPLANE [STORY...]`, as root. `tests/run namespaces` calls it.

Needs Python's standard library, `ip` and /dev/net/tun. Everything happens in namespaces made here.
"""

import signal
import sys
import time
import traceback
from pathlib import Path

from machines import World
from stories import STORIES


def tell(story, program):
    """One story in a world of its own; whether it holds."""
    started = time.monotonic()
    try:
        with World(program) as world:
            story(world)
        verdict = "passed"
    except Exception:
        traceback.print_exc(file=sys.stdout)
        verdict = "FAILED"
    print(f"{verdict}  {story.__name__:50} {time.monotonic() - started:5.1f} s", flush=True)
    return verdict == "passed"


def main():
    # A termination unwinds, so that every namespace is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    program = Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:]
    unknown = set(wanted) - {story.__name__ for story in STORIES}
    if unknown:
        sys.exit(f"no story called {', '.join(sorted(unknown))}")
    stories = [story for story in STORIES if not wanted or story.__name__ in wanted]
    held = [tell(story, program) for story in stories]
    print(f"summary: {sum(held)} of {len(held)} stories hold")
    return not all(held)


if __name__ == "__main__":
    sys.exit(main())
