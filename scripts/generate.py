"""Generate networks; for `accelerate launch scripts/generate.py RUN [--num N] [--seed S]`."""

import sys

from rpg.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    main()
