"""The experiment on adapters; for `accelerate launch scripts/lora.py CONFIG [OPTIONS]`."""

import sys

from rpg.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "lora")
    main()
