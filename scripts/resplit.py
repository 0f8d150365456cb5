"""Make the zoo of a configuration from one that differs in its held-out tasks only."""

from _common import Parser, run_command

from rpg.config import Config
from rpg.experiments.unseen_tasks import task_family
from rpg.tasks.images.subsets import resplit


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", help="whose zoo to make")
    parser.add_argument("source_zoo", help="the zoo with the checkpoints")
    arguments = parser.parse_args()
    config = Config.load(arguments.config)
    zoo = resplit(arguments.source_zoo, config.zoo, task_family(config))
    print({split: len(zoo.subset(split)) for split in ("train", "validation", "unseen")}, "in", zoo.path)


if __name__ == "__main__":
    run_command(main)
