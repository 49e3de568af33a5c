"""The README's section "Behind strongSwan", followed word by word from a working strongSwan to the takeover.

Two strongSwans carry traffic in their kernels. On ga an operator does what the README says and what `esplane strongswan check`
answers, and nothing else, while numbered packets flow.
"""

import re

from lab.behind import Plan, Sites
from lab.runner import ROOT, Scenario
from lab.world import check, eventually, same

SECTION = re.compile(r"^## Behind strongSwan\n(.*?)^## ", re.M | re.S)
CONF = "/etc/swanctl/swanctl.conf"


def scenarios():
    yield Scenario("strongswan-by-the-readme", follow, quick=True)


def follow(world):
    readme = Readme((ROOT / "README.md").read_text())
    sites = Sites(world, Plan(takeover=False), vici_a="/var/run/charon.vici").start()
    sites.ping()
    before = sites.charon_a.installed()

    # 1. Ask what is missing.
    answer = world.ga.try_run(*readme.ask)
    world.ga.write("/work/check-before.txt", answer["out"] + answer["err"])
    same(answer["status"], 1, "something is missing", answer["out"], answer["err"])
    check("NOT READY" in answer["out"], "it says so", answer["out"])

    # 2. Do what it says: lines, file, commands.
    write_lines(sites.charon_a, answer["out"], readme.lines)
    world.ga.write("/etc/esplane/esplane.yaml", readme.yaml)
    numbers = re.findall(r"swanctl --terminate --child-id (\d+)", answer["out"])
    same(numbers, [str(sa["number"]) for sa in before], "the answer names the SAs that are to end", answer["out"])
    with sites.flow() as flow:
        flow.keep(seconds=1)
        for command in readme.commands:
            for number in numbers if "NUMBER" in command else [""]:
                do(world.ga, command.replace("NUMBER", number))
        flow.keep(seconds=2)
    # As whenever a CHILD_SA is new: its responder may send with it before the initiator has it.
    lost = sum(flow.lost())
    check(lost <= 5 and flow.longest_gap() < 1, "the way over costs a few packets at most", lost, flow.received)

    # 3. See that all is well.
    ready = world.ga.try_run(*readme.ask)
    world.ga.write("/work/check-after.txt", ready["out"] + ready["err"])
    same(ready["status"], 0, "nothing is missing any more", ready["out"], ready["err"])
    tunnels = world.ga.run(*readme.look)
    world.ga.write("/work/show-tunnels.txt", tunnels)
    check(re.search(r"^site: .*?^ +net: #\d+, .*INSTALLED", tunnels, re.M | re.S), "the tunnel is shown by its names in swanctl.conf", tunnels)
    sites.ping(sizes=(100, 1000))
    counted = eventually(lambda: [sa for sa in sites.charon_a.installed() if sa["in"][2] and sa["out"][2]], "swanctl counts what Esplane carries")
    same(len(counted), 1, "one SA pair is left")
    return f"{sum(sent['sent'] for sent in flow.sent)} numbered packets on the way over, {lost} lost in the moment"


class Readme:
    """What the section tells an operator to type and to write."""

    def __init__(self, text):
        section = SECTION.search(text)
        check(section, 'README.md has the section "Behind strongSwan"')
        self.yaml = "".join(line.removeprefix("   ") + "\n" for line in re.search(r"```yaml\n(.*?)```", section[1], re.S)[1].splitlines())
        blocks = re.findall(r"(?:^ {7}\S.*\n)+", section[1], re.M)
        blocks = [[line.strip() for line in block.splitlines()] for block in blocks]
        check(len(blocks) == 4, "the section has a question, lines, commands, and two last looks", blocks)
        (ask,), self.lines, self.commands, (again, look) = blocks
        same(again, ask, "the last look asks the first question again")
        self.ask, self.look = ask.split(), look.split()


def write_lines(charon, answer, expected):
    """Puts the lines where the answer says: at the end of the section that begins at FILE:LINE."""
    places = re.findall(r"add at the end of the section `\S+` that begins at (\S+):(\d+):\n\n((?: {8}\S.*\n)+)", answer)
    same(len(places), 1, "the answer says where to add lines", answer)
    file, begins, lines = places[0]
    lines = [line.strip() for line in lines.splitlines()]
    same(lines, expected, "the README's example has the lines of the answer")
    same(file, CONF, "the answer names the file")
    charon.add_lines(int(begins), lines)


def do(host, command):
    """One line of a shell; with `&` it stays."""
    if command.endswith("&"):
        host.start(*command.rstrip("& ").split(), log="esplane-ga.log")
        eventually(lambda: host.try_run("esplane", "show", "--json")["status"] == 0, "Esplane runs", 60)
    else:
        host.run(*command.split())
