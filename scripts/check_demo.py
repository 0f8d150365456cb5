"""Fail unless generated networks are good and differ: `python scripts/check_demo.py RUN [--points 2]`.

Their mean accuracy may lie at most so many percentage points below that of the originals and of the best simple
baseline, and their median distance to one another must be a tenth of the originals' at least; each run's average fails.
Networks for sensors must be five points better than every simple baseline instead.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DIVERSITY, AHEAD = 0.1, 5.0


def faults(scores: dict[str, Any], points: float) -> list[str]:
    """What is wrong with the networks of an ``evaluation.json``."""
    mean = {name: each["summaries"]["accuracy"]["mean"] for name, each in scores["kinds"].items() if each["count"]}
    spread = scores["extras"].get("spread")
    generated = mean.pop("generated")
    if scores.get("experiment") == "sensors":
        name, best = max(
            ((name, each) for name, each in mean.items() if name not in scores["references"]), key=lambda each: each[1]
        )
        print(f"generated {generated:.2%}, best baseline {name} {best:.2%}")
        return [] if 100 * (generated - best) >= AHEAD else [f"less than {AHEAD:g} points above {name}"]
    best = max(mean, key=lambda name: mean[name])
    diversity = (spread or {}).get("diversity_ratio") or 0.0
    print(f"generated {generated:.2%}, best other {best} {mean[best]:.2%}, diversity {diversity:.2f} of the originals'")
    found = [
        f"{100 * (each - generated):.2f} points below {name}"
        for name, each in mean.items()
        if each - generated > points / 100
    ]
    return found + ([f"copies of one another: diversity {diversity:.2f}"] if diversity < DIVERSITY else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--points", type=float, default=2.0)
    arguments = parser.parse_args()
    found = faults(json.loads((arguments.run / "evaluation.json").read_text()), arguments.points)
    print(*(f"{arguments.run}: {each}" for each in found), sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
