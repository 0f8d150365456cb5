"""The experiment on unseen tasks; for `accelerate launch scripts/unseen.py CONFIG [OPTIONS]`."""

import sys

from rpg.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "unseen")
    main()
