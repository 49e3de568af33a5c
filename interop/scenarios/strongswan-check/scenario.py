"""A working strongSwan; `esplane strongswan check` says what to do, each line is done literally, and Esplane carries the traffic.

Numbered packets flow meanwhile, first through the kernel of ga, in the end through Esplane. Nothing is written or run on ga
but what the report says: lines into swanctl.conf where it says, then its commands in their order. (A lab of namespaces
shares /run, so charon's socket is named to `check` and swanctl besides.)
"""

import json

from lab.behind import Plan, Sites
from lab.esplane import Esplane
from lab.runner import Scenario
from lab.world import check, eventually, same

SWANCTL_CONF = "/etc/swanctl/swanctl.conf"
SECTION = "strongswan:"


def scenarios():
    yield Scenario("strongswan-check", follow, quick=True)


def follow(world):
    sites = Sites(world, Plan(takeover=False)).start()
    sites.ping()
    with sites.flow() as flow:
        flow.keep(seconds=1)
        first = report(sites, ready=False)
        same([child["state"] for child in first["children"]], ["change"], "one child lacks lines")
        old = sites.charon_a.installed()
        for child in first["children"]:
            file, line = child["add"]["place"].rsplit(":", 1)
            same(file, SWANCTL_CONF, "the report names the file", child["add"])
            sites.charon_a.add_lines(int(line), child["add"]["lines"])
        for step in first["steps"]:
            carry_out(sites, step)
        # What came up meanwhile is not ended by a number that an earlier report gave.
        for step in report(sites)["steps"]:
            carry_out(sites, step)
        eventually(lambda: report(sites)["ready"], "the report says ready")
        sites.await_carried()
        flow.keep(seconds=2)
    new = sites.charon_a.installed()
    check(len(new) == 1 and new[0]["number"] != old[0]["number"], "a fresh CHILD_SA has taken the place of the old", old, new)
    # The peer sends with the fresh SA as soon as it has it, and ends the old one before it says so.
    check(max(flow.lost()) <= 100, "at most two seconds of packets are lost in the takeover", flow.lost())
    sites.ping(sites.sizes())
    with sites.flow() as after:
        after.keep(seconds=2)
    after.nothing_lost()
    return f"taken over by following the report; {sum(flow.lost())} packets lost in that moment, none afterwards"


def report(sites, ready=None):
    charon = sites.charon_a
    answer = charon.host.try_run("esplane", "strongswan", "check", "--json", "--vici", charon.vici)
    check(answer["status"] in (0, 1), "the check ends", answer)
    found = json.loads(answer["out"])
    same(answer["status"] == 0, found["ready"], "the exit status says the same as the report", found)
    if ready is not None:
        same(found["ready"], ready, "the report says whether all is ready", found)
    return found


def carry_out(sites, step):
    if step["lines"][:1] == [SECTION] and not sites.esplane:
        section = "\n".join([*step["lines"], f"  vici: {sites.charon_a.vici}"])
        sites.esplane = Esplane(sites.world.ga, section).start()
    for line in step["lines"]:
        program, *arguments = line.split()
        if program == "swanctl":
            sites.charon_a.swanctl(*arguments)
