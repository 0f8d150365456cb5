"""Train a generator; for `accelerate launch scripts/train.py CONFIG [--set KEY=VALUE] [--resume]`."""

import sys

from rpg.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
