"""From measurements to a table, a JSON object, and a chart."""

import os
import platform
import statistics
import sys

#: The rows of the table and of the JSON object: case and what of it.
ROWS = [
    ("tcp1", None), ("tcp8", None), ("udp1400", None), ("pps64", None), ("ppsimix", None),
    ("latency", "p50 idle"), ("latency", "p99 idle"), ("latency", "p50 loaded"), ("latency", "p99 loaded"),
    ("soak", "memory grown"),
]
#: Of the gateways themselves.
RESOURCES = [("cpu", None), ("idle", None), ("memory", None)]


class Results:
    def __init__(self):
        self.values, self.units, self.failures, self.absent = {}, {}, [], {}

    def add(self, system, case, value, unit, what=None):
        self.values.setdefault((system, case, what), []).append(value)
        self.units[case] = unit

    def failed(self, system, case, why):
        self.failures.append(f"{system}: {case}: {why}")
        print(f"  {self.failures[-1]}", file=sys.stderr, flush=True)

    def left_out(self, system, why):
        if system not in self.absent:
            print(f"  left out: {why}", file=sys.stderr, flush=True)
        self.absent[system] = why

    def median(self, system, case, what=None):
        values = self.values.get((system, case, what))
        return statistics.median(values) if values else None

    def systems(self):
        return list(dict.fromkeys(system for system, _, _ in self.values))

    def complete(self, chosen):
        """Whether something came of every system asked for and nothing failed."""
        return not self.failures and not self.absent and set(chosen.systems) == set(self.systems())


def as_json(results, chosen):
    def entries(rows):
        for system in results.systems():
            for case, what in rows:
                if values := results.values.get((system, case, what)):
                    entry = {"system": system, "case": case, **({"what": what} if what else {}), "unit": results.units[case]}
                    yield entry | {"min": min(values), "median": statistics.median(values), "max": max(values)}

    return {
        "results": list(entries(ROWS)),
        "resources": list(entries(RESOURCES)),
        "left_out": results.absent,
        "failures": results.failures,
        "machine": {"kernel": platform.release(), "processor": processor(), "cores": os.cpu_count()},
        "rounds": chosen.rounds,
        "seconds": chosen.seconds,
    }


def processor():
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def table(results, chosen):
    """Medians with their range, and the ratios that matter."""
    systems = results.systems()
    head = ["case", "unit", *systems]
    lines = [head]
    for case, what in ROWS + RESOURCES:
        cells = [results.values.get((system, case, what)) for system in systems]
        if any(cells):
            shown = [f"{show(statistics.median(c))} ({show(min(c))}-{show(max(c))})" if c else "-" for c in cells]
            lines.append([f"{case} {what or ''}".strip(), results.units[case], *shown])
    for base in ("none", "boringtun", "wireguard-go"):
        if base in systems:
            for case in ("tcp1", "tcp8", "pps64", "ppsimix"):
                if below := results.median(base, case):
                    over = [results.median(system, case) for system in systems]
                    lines.append([case, f"of {base}", *(f"{value / below:.2f}" if value else "-" for value in over)])
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    text = [f"median (min-max) of {chosen.rounds} interleaved rounds, {chosen.seconds:g} s each; {processor()}, Linux {platform.release()}"]
    text += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    text += [f"left out: {why}" for why in results.absent.values()]
    text += [f"failed: {failure}" for failure in results.failures]
    return "\n".join(text)


def show(value):
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


# --- the chart ---------------------------------------------------------------------------------------

BAR, GAP, LEFT, WIDTH = 18, 6, 130, 360


def chart(results):
    """Bars of the medians: one group a case, one bar a system."""
    parts, y = [], 8
    for case, title in (("tcp1", "TCP, 1 stream, Gbit/s"), ("tcp8", "TCP, 8 streams, Gbit/s"), ("pps64", "64-byte packets, Mpps"), ("ppsimix", "IMIX, Mpps")):
        bars = [(system, results.median(system, case)) for system in results.systems() if system != "none"]
        bars = [(system, value) for system, value in bars if value is not None]
        if not bars:
            continue
        longest = max(value for _, value in bars)
        y += 20
        parts.append(f'<text x="8" y="{y - 4}" class="title">{title}</text>')
        for system, value in bars:
            width = max(1, round(WIDTH * value / longest)) if longest else 1
            kind = "ours" if system.startswith("esplane") else "theirs"
            parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" class="name">{system}</text>')
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{width}" height="{BAR}" class="{kind}"/>')
            parts.append(f'<text x="{LEFT + width + 6}" y="{y + 14}">{show(value)}</text>')
            y += BAR + GAP
        y += 8
    style = (
        "text{font:13px sans-serif;fill:#57606a}.title{font-weight:bold}.name{text-anchor:end}"
        ".ours{fill:#1a7f37}.theirs{fill:#8c959f}"
    )
    size = f'width="{LEFT + WIDTH + 70}" height="{y}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><style>{style}</style>\n' + "\n".join(parts) + "\n</svg>\n"
