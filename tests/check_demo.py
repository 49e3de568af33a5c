#!/usr/bin/env python3
"""Whether the demo's JSON (its file is the argument) says what issue 2 wants: all sent is received, at least
three rekeys, no drop, nothing in clear."""

import json
import sys
from pathlib import Path

result = json.loads(Path(sys.argv[1]).read_text().splitlines()[-1])
checks = {
    "ok": result["ok"] is True,
    "pings answered": 0 < result["ping"]["sent"] == result["ping"]["received"],
    "UDP received": 0 < result["udp"]["sent"] == result["udp"]["received"],
    "TCP flows": result["tcp"]["gbit_per_second"] > 0,
    "three rekeys": result["rekeys"] >= 3,
    "no drops": not any(result["drops"].values()),
}
wrong = [name for name, holds in checks.items() if not holds]
print(f"summary: {result['rekeys']} rekeys, {result['tcp']['gbit_per_second']:.2f} Gbit/s; " + (f"WRONG: {wrong}" if wrong else "nothing lost"))
sys.exit(bool(wrong))
