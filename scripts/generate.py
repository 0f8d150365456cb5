"""Generate networks; for `accelerate launch scripts/generate.py RUN [-n NUM] [--seed SEED]`.

All processes fill one folder. (Launchers take `--num` for an option of their own; `-n` is the same.)
"""

import sys

from rpg.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    main()
