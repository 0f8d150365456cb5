"""Evaluate a run; for `accelerate launch scripts/evaluate.py RUN [OPTIONS]`: the processes share the networks.

(Launchers take `--num` for an option of their own; `-n` is the same.)
"""

import sys

from rpg.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
