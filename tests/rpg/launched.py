"""Several runs one after the other in one launch, which costs more than they do: CONFIG.yaml …; a leading + resumes."""

import sys

from rpg.config import Config
from rpg.training import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(Config.load(path.lstrip("+")), resume=path.startswith("+"))
