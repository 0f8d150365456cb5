"""Time the commands of README's table, and say what grew: `python scripts/budget.py [--only unseen] [--limit 900]`.

Each command runs in an empty folder, its processes on one thread each, so that processor seconds do not depend on how
many cores wait. Its processor seconds, peak memory and mean figures go into scripts/budget.json.
What takes 30 % more than that file says, on a processor of the same name, or has figures that differ by more than a
hundredth is said, and the exit code is then 1; so is a command that fails or does not end within the limit.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _common import Parser, run_command, timed, work_folder

ROOT = Path(__file__).parent.parent
FILE = ROOT / "scripts" / "budget.json"
GROWN, DIFFERENT = 1.3, 0.01
SERVES = ("rpg app", "make bench")


def commands() -> dict[str, list[str]]:
    """The lines of README's table that end by themselves, with the ``rpg`` command that each stands for."""
    makefile, found = (ROOT / "Makefile").read_text(), {}
    for line in re.findall(r"^\| `((?:make|rpg) [^`]+)` \|", (ROOT / "README.md").read_text(), re.M):
        if line.startswith(SERVES):
            continue
        if line.startswith("make "):
            recipe = re.search(rf"^{line.split()[1]}:[^\n]*\n(?:\t[^\n]*\n)*?\t\$\(BIN\)/(rpg [^\n]*)", makefile, re.M)
            assert recipe, f"the Makefile has no rpg command for {line}"
            found[line] = shlex.split(re.sub(r"\$\(\w+\)", "", recipe[1]))
        else:
            found[line] = shlex.split(line)
    return found


def figures(folder: Path) -> dict[str, float]:
    """The mean of the first metric of every kind of networks, in all reports under a folder."""
    found = {}
    for path in sorted(folder.rglob("evaluation.json")):
        report = json.loads(path.read_text())
        first = next(iter(report.get("better", {})), "")
        for kind, each in report.get("kinds", {}).items():
            if summary := each["summaries"].get(first):
                found[f"{path.parent.relative_to(folder)}: {kind}, {first}"] = summary["mean"]
    return found


def processor() -> str:
    """The processor's name and what PyTorch makes of it: times are compared on the same one alone."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return f"{named[1] if named else '?'}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What takes more than it took, and which figures are others."""
    found = []
    if before.get("processor") == now["processor"]:
        for name in ("processor_seconds", "peak_gib"):
            if now[name] > GROWN * before[name]:
                found.append(f"{name.replace('_', ' ')} {before[name]} → {now[name]}")
    for name, value in now["figures"].items():
        if abs(value - before.get("figures", {}).get(name, value)) > DIFFERENT:
            found.append(f"{name} {before['figures'][name]:.4g} → {value:.4g}")
    return found


def main() -> dict[str, Any]:
    parser = Parser(__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="commands that have one of these words")
    parser.add_argument("--most", type=float, metavar="SECONDS", help="commands that took no longer last time")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="end a command that takes longer by the clock")
    parser.add_argument("--keep", action="store_true", help="leave scripts/budget.json as it is")
    arguments = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    grown = 0
    for line, words in commands().items():
        before = known.get(line, {})
        if arguments.only and not any(word in line for word in arguments.only):
            continue
        if arguments.most is not None and before.get("processor_seconds", float("inf")) > arguments.most:
            continue
        with work_folder(None) as folder:
            try:
                now = timed([sys.executable, "-m", "rpg", *words[1:]], folder, arguments.limit)
            except SystemExit as error:
                print(f"{line}: {error}", flush=True)
                grown += 1
                continue
            now["figures"] = figures(folder)
        now |= {"processor": processor(), "commit": git.stdout.strip(), "date": f"{datetime.date.today()}"}
        found = changes(before, now)
        grown += bool(found)
        print(
            f"{line}: {now['processor_seconds']} s of processor, {now['peak_gib']} GiB", *found, sep="\n  ", flush=True
        )
        if not arguments.keep:
            FILE.write_text(json.dumps(known := known | {line: now}, indent=1) + "\n")
    return {"exit_code": 1 if grown else 0}


if __name__ == "__main__":
    run_command(main)
