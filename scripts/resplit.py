"""Make the zoo of a configuration from one that differs in its held-out tasks only: resplit.py CONFIG SOURCE_ZOO."""

import sys

from rpg.config import Config
from rpg.experiments.held_out_tasks import subset_task
from rpg.tasks.images.subsets import resplit
from tokenization.errors import InputError


def main() -> None:
    if len(sys.argv) != 3:
        raise InputError("resplit", f"{len(sys.argv) - 1} arguments", "CONFIG SOURCE_ZOO")
    config = Config.load(sys.argv[1])
    zoo = resplit(sys.argv[2], config.zoo, subset_task(config))
    print({split: len(zoo.subset(split)) for split in ("train", "validation", "unseen")}, "in", zoo.path)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
