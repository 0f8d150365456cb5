"""Fail unless generated networks beat every simple baseline: `python scripts/check_demo.py RUN [--points 5]`.

Their mean accuracy must lie at least so many percentage points above that of the best baseline.
"""

import argparse
import sys
from pathlib import Path

from rpg.evaluation.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--points", type=float, default=5.0)
    arguments = parser.parse_args()
    report = Report.load(arguments.run)
    name, best = next(iter(report.rivals().items()))
    ahead = 100 * ((report.mean("generated") or 0.0) - best)
    print(f"{arguments.run}: generated networks are {ahead:+.2f} points from the best baseline, {name}")
    return 0 if ahead >= arguments.points else 1


if __name__ == "__main__":
    sys.exit(main())
