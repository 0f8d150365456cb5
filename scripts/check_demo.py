"""Fail unless generated networks are as good as the originals: `python scripts/check_demo.py RUN [--points 2]`.

The mean accuracy of the generated networks may lie at most so many percentage points below that of the originals.
"""

import argparse
import json
import sys
from pathlib import Path


def shortfall(run: Path) -> float:
    """Percentage points by which the generated networks' mean accuracy is below the originals'."""
    kinds = json.loads((run / "evaluation.json").read_text())["kinds"]
    original, generated = (kinds[name]["summaries"]["accuracy"]["mean"] for name in ("original", "generated"))
    return 100 * (original - generated)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--points", type=float, default=2.0)
    arguments = parser.parse_args()
    found = shortfall(arguments.run)
    print(f"{arguments.run}: generated networks are {-found:+.2f} points from the originals' mean")
    return 0 if found <= arguments.points else 1


if __name__ == "__main__":
    sys.exit(main())
