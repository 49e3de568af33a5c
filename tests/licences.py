#!/usr/bin/env python3
"""Checks every dependency against deny.toml, offline: its licence, its source, its name.

A small stand-in for `cargo deny check licenses bans sources`, from the standard library and
`cargo metadata` alone. Advisories need a database from the network: `cargo deny check advisories`.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def allowed(expression, licences):
    """Whether an SPDX expression can be satisfied with `licences`: OR of ANDs, with parentheses."""
    # "MIT/Apache-2.0" is the old way to write OR.
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either():
        result = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            result = both() or result
        return result

    def both():
        result = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            result = one() and result
        return result

    def one():
        token = tokens.pop(0)
        if token == "(":
            result = either()
            tokens.pop(0)
            return result
        if tokens and tokens[0] == "WITH":
            token = f"{token} WITH {tokens[1]}"
            del tokens[:2]
        return token in licences

    return either() and not tokens


def complaints(package, rules):
    name = f"{package['name']} {package['version']}"
    licence = package["license"]
    if licence is None:
        yield f"{name}: names no licence"
    elif not allowed(licence, rules["licenses"]["allow"]):
        yield f"{name}: licence {licence} is not allowed"
    source = package["source"]
    if source and not source.startswith("registry+"):
        yield f"{name}: comes from {source}, not from the registry"
    for ban in rules["bans"]["deny"]:
        if ban["crate"] == package["name"]:
            yield f"{name}: refused: {ban['reason']}"


def self_test():
    """A check that cannot refuse checks nothing."""
    mit = ["MIT", "Apache-2.0 WITH LLVM-exception"]
    for good in ("MIT", "GPL-3.0 OR MIT", "MIT/GPL-2.0", "(GPL-2.0 OR MIT) AND MIT", "Apache-2.0 WITH LLVM-exception"):
        assert allowed(good, mit), good
    for bad in ("GPL-3.0", "MIT AND GPL-3.0", "(MIT OR X) AND Y", "Apache-2.0"):
        assert not allowed(bad, mit), bad


def main():
    self_test()
    rules = tomllib.loads((ROOT / "deny.toml").read_text())
    command = ["cargo", "metadata", "--format-version=1", "--locked"]
    packages = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)["packages"]
    wrong = [line for package in packages for line in complaints(package, rules)]
    print("\n".join(wrong))
    print(f"summary: {len(packages)} crates, {len(wrong)} refused; advisories need cargo-deny")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
