"""One body and a classifier that is linear in the bits, in place of a generator: unseen_head.py RUN [STEPS].

What the generator of a run is to be compared with where it has learned a common body and a head that follows the bits:
the base network's body, shared by all tasks, and a head that is an affine function of the bits, both trained by the
run's own behaviour loss on its seen tasks. The learning rate is chosen on validation tasks and images.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.metrics import summarize
from rpg.experiments.held_out_tasks import subset_task
from rpg.seeding import generator
from rpg.tasks.images.collection import single_threaded
from rpg.tasks.images.subsets import SubsetTask, load_base
from rpg.tasks.side_by_side import Stacked
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

RATES = (3e-3, 1e-2, 3e-2, 1e-1)


class LinearHead:
    """The weights of every task: one body, and a head ``coefficients · (1, ±bits)``."""

    def __init__(self, task: SubsetTask, base: dict[str, Tensor]) -> None:
        shapes = {name: value.shape for name, value in task.build().state_dict().items()}
        self.body = {
            name: value.clone().requires_grad_() for name, value in base.items() if value.shape == shapes[name]
        }
        self.head: dict[str, Tensor] = {}  # [1 + C, 2, …]
        for name, value in base.items():
            if name not in self.body:  # the logits' difference starts as the signed sum of the base's logits
                rows = torch.stack([-value, value], 1) / 2  # [C, 2, …]
                self.head[name] = torch.cat([torch.zeros_like(rows[:1]), rows]).requires_grad_()

    def __call__(self, bits: Tensor) -> Stacked:
        """Stacked weights of the tasks ``[T, C]``."""
        signs = torch.cat([torch.ones(len(bits), 1), 2.0 * bits - 1], 1)
        heads = {name: torch.tensordot(signs, value, dims=1) for name, value in self.head.items()}
        bodies = {name: value.expand(len(bits), *value.shape) for name, value in self.body.items()}
        return {**bodies, **heads}


class Experiment:
    """The seen tasks, images and loss of a run."""

    def __init__(self, run: Path, steps: int | None) -> None:
        self.config = Config.load(run / "config.yaml")
        settings = self.config.train.behaviour
        if settings is None:
            raise InputError(str(run), "a run without behaviour loss", "one with train.behaviour")
        self.settings, self.steps = settings, steps or self.config.train.steps
        self.zoo, self.task = Zoo.open(self.config.zoo), subset_task(self.config)
        self.teacher = self.task.teacher(self.zoo) if settings.target == "base" else None

    def bits(self, split: str) -> Tensor:
        """The tasks of a split, ``[T, C]``."""
        return torch.tensor([self.zoo.entries[index].condition for index in self.zoo.subset(split)]).long()

    def fit(self, splits: Sequence[str], rate: float) -> LinearHead:
        """Train on the tasks of some splits."""
        model = LinearHead(self.task, load_base(self.zoo))
        seen = torch.cat([self.bits(split) for split in splits])
        stream = generator(self.config.seed, "linear head")
        optimizer = torch.optim.AdamW([*model.body.values(), *model.head.values()], lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self.steps + 1)
        for _ in range(self.steps):
            bits = seen[torch.randint(len(seen), (self.config.train.batch_size,), generator=stream)]
            losses = self.task.behaviour_losses(model(bits), bits.float(), self.settings.images, stream, self.teacher)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            schedule.step()
        return model

    @torch.inference_mode()
    def score(self, model: LinearHead, split: str, images: str) -> Tensor:
        """Accuracy of every task of a split."""
        bits = self.bits(split)
        return self.task.accuracies(model(bits), bits, images)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise InputError("unseen_head", f"{len(sys.argv) - 1} arguments", "RUN [STEPS]")
    experiment = Experiment(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    with single_threaded():
        chosen: dict[float, float] = {}
        for rate in RATES:
            model = experiment.fit(["train"], rate)
            chosen[rate] = experiment.score(model, "validation", "validation").mean().item()
            print(f"rate {rate:g}: {chosen[rate]:.2%} on validation tasks and images")
        started = time.process_time()
        model = experiment.fit(experiment.config.train.splits, max(chosen, key=lambda rate: chosen[rate]))
        print(f"{experiment.steps} steps in {time.process_time() - started:.0f} s of one core")
        found = summarize(experiment.score(model, "unseen", "test"))
    low, high = found.ci95
    print(f"unseen tasks, test images: {found.mean:.2%} ({low:.2%} to {high:.2%}), worst {found.min:.1%}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
