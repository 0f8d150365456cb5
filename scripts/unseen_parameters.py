"""The classifier of original and generated networks of seen and unseen tasks as heat maps (arXiv 2501.11587, figure 5).

What `rpg unseen` draws as parameters.png, without the rest: at most 100 values, in their spread over the originals.

python scripts/unseen_parameters.py RUN OUTPUT.png [--zoo ZOO]
"""

from __future__ import annotations

import torch
from _common import Parser, run_command
from torch import Tensor

from rpg.evaluation.held_out_plots import plot_parameters
from rpg.experiments.task_methods import generate_for, networks_of
from rpg.generation.generator import Generator
from rpg.tasks.images.collection import single_threaded
from rpg.tasks.side_by_side import Stacked
from tokenization.zoo.zoo import Zoo

SPLITS = {"seen": "train", "unseen": "unseen"}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("output", help="the picture")
    parser.add_argument("--zoo", help="where the run's zoo lies now")
    arguments = parser.parse_args()
    generator = Generator.from_pretrained(arguments.run)
    zoo = Zoo.open(arguments.zoo or generator.config.zoo)
    pairs = {}
    with single_threaded():
        for name, split in SPLITS.items():
            originals = networks_of(zoo, split)
            made = generate_for(generator, originals.bits, generator.config.seed)
            pairs[name] = (head(originals.weights()), head(made))
            alike = torch.corrcoef(torch.stack([(each - pairs[name][0].mean(0)).flatten() for each in pairs[name]]))[
                0, 1
            ]
            print(f"{name}: {len(originals.bits)} tasks, correlation of deviations from the mean {alike:.2f}")
    plot_parameters(pairs, arguments.output)


def head(weights: Stacked) -> Tensor:
    """The last matrix, flattened, ``[T, V]``."""
    return [value for value in weights.values() if value.dim() == 3][-1].flatten(1)


if __name__ == "__main__":
    run_command(main)
