"""Networks for unseen tasks: generated, compared with baselines, reported.

It serves any family of binary tasks: networks for groups of image classes, and adapters of a language model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.devices import single_threaded
from rpg.evaluation.conditional import Regression, choose_regressions, random_other, unseen_baselines
from rpg.evaluation.engine import Engine, Kind, Made, Seen, Workers
from rpg.evaluation.judges import Answer, TaskScorer
from rpg.evaluation.page.page import write_report
from rpg.evaluation.report import Report
from rpg.evaluation.task_networks import LinearHead, LinearHeadTraining, Parts, TaskNetworks, in_parts, tune_linear_head
from rpg.evaluation.two_sample import measure_per_task, scores_of_sets
from rpg.experiments.single import existing, merges_of, require_for_choices
from rpg.experiments.tasks_page import tasks_page
from rpg.generation.generator import Generator
from rpg.merging.adapters import Merges
from rpg.merging.methods import AFFORDABLE_MERGES, NetworkMerges
from rpg.seeding import derive_seed
from rpg.tasks import build_task
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.class_splits import hamming_to_nearest
from tokenization.checkpoint.checkpoint import StateDict
from tokenization.checkpoint.progress import steps
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo

NUM_WORST = 5

METHODS = ("original", "generated", "kernel_ridge")
"""Those of which more than metrics is kept."""


@dataclass(frozen=True)
class Methods:
    """What makes networks for tasks.

    Attributes:
        generator: makes those that are compared.
        seen: the networks of all seen tasks, as the generator's layout cuts them.
        regressions: by the name they are reported under; ``kernel_ridge`` among them.
        task: scores them, and knows what a task's training began with, from which networks are merged as deviations.
        head: a linear head of all seen tasks, if there is one.
    """

    generator: Generator
    zoo: Zoo
    seen: TaskNetworks
    regressions: Mapping[str, Regression]
    task: TaskFamily
    head: LinearHead | None = None
    seed: int = 0
    workers: Workers = field(default_factory=Workers)

    @functools.cached_property
    def merges(self) -> Merges:
        """Merges the adapters of ``seen``, or its networks."""
        last = {tuple(map(int, entry.condition or ())): index for index, entry in enumerate(self.zoo.entries)}
        entries = [last[tuple(bits)] for bits in self.seen.bits.tolist()]
        return merges_of(self.generator.adapter, self.zoo, entries, self.generator.layout)

    def measure(self, originals: TaskNetworks, own: bool, split: str) -> Engine:
        """Every method's networks for the tasks of ``originals`` ``[T, C]``, scored on a split.

        Of a kind the report also has the distance to the nearest seen task, and the share of tasks on which the
        generated network is better.

        Args:
            originals: trained for the tasks.
            own: the tasks are seen ones.
        """
        bits, asked = originals.bits, originals.bits.tolist()
        rows = self.generator.share(len(bits), self.workers.partition)
        engine, far = Engine(TaskScorer(self.task, split), self.workers), hamming_to_nearest(bits, self.seen.bits)[0]
        # without tasks of its own a process names the kinds all the same: nothing of them is made
        made = self._networks(originals, rows or [0], own)
        for name in steps("scoring tasks", list(made), after=0):
            engine.look(name, Made(len(bits), rows, made[name]), asked, keep=name in METHODS)
        kinds = engine.kinds
        if isinstance(self.task, ImageTaskFamily):
            summed = base_summed(self.task, self.task.base_probabilities(self.zoo, split), bits, split)
            kinds["base_summed"] = Kind([Seen(Answer({"accuracy": value})) for value in summed.tolist()], asked)
        for name, kind in kinds.items():
            kind.distances["hamming"] = far
            if name != "generated":
                kind.extras["generated_better"] = (kinds["generated"].first > kind.first).double().mean().item()
        return engine

    def _networks(self, originals: TaskNetworks, rows: Sequence[int], own: bool) -> dict[str, Parts]:
        """Every method's networks for some of the tasks."""
        bits, mine = originals.bits, originals if len(rows) == len(originals.bits) else originals.select(rows)
        others, partition = random_other(bits, self.seen.bits, self.seed), self.workers.partition
        heads = {} if self.head is None else {name: value.detach() for name, value in self.head(mine.bits).items()}
        return {
            "original": mine.parts(),
            "generated": parts_for(self.generator, bits, self.seed, partition=partition),
            "no_condition": parts_for(self.generator, others, self.seed, partition=partition),
            **untrained(self.task, self.zoo, mine.bits, originals.part_size),
            **({"linear_head": [heads]} if heads else {}),
            **unseen_baselines(self.seen, mine.bits, self.regressions, own),
            **self._merged(mine.bits),
        }

    def _merged(self, bits: Tensor) -> dict[str, Parts]:
        """Merges of the seen networks with the largest shares in kernel ridge, for the tasks ``[T, C]``."""
        shares = self.regressions["kernel_ridge"].mixture(self.seen.bits, bits)
        plain, large = isinstance(self.merges, NetworkMerges), self.seen.is_large
        size = 1 if large else len(bits)

        def made(method: str) -> Iterator[StateDict]:
            for tasks, part in zip(bits.split(size), shares.split(size), strict=True):
                begun = next(iter(self.task.untrained(self.zoo, tasks).values())) if plain else {}
                for place, (task, row) in enumerate(zip(tasks, part, strict=True)):
                    seed = derive_seed(self.seed, method, *task.tolist())
                    yield self.merges.merge(method, row, seed, {name: value[place] for name, value in begun.items()})

        methods = AFFORDABLE_MERGES if plain and large else self.merges.methods
        return {method: in_parts(made(method)) for method in methods}


def untrained(task: TaskFamily, zoo: Zoo, bits: Tensor, part_size: int) -> dict[str, Parts]:
    """The initial weights of training for each task ``[T, C]``, by the name that reports give them."""
    parts = bits.split(part_size)

    def made(name: str) -> Parts:
        for each in parts:
            yield task.untrained(zoo, each)[name]

    return {name: made(name) for name in task.untrained(zoo, parts[0][:1])}


def as_many(networks: TaskNetworks, num: int) -> TaskNetworks:
    """At most ``num`` of them, far apart."""
    return networks.select(torch.linspace(0, len(networks.bits) - 1, min(num, len(networks.bits))).round().long())


def parts_for(generator: Generator, bits: Tensor, seed: int, **options: Any) -> Parts:
    """One generated network for each task ``[T, C]``, a part at a time."""
    return in_parts(generator.one_by_one(len(bits), condition=bits.float(), seed=seed, **options))


def networks_of(zoo: Zoo, split: str, layout: Layout | None = None) -> TaskNetworks:
    """The last checkpoint of every task of a split; with a layout as that cuts them, LoRA pairs in canonical form.

    Raises:
        InputError: the split is empty.
    """
    last = {zoo.entries[index].run: index for index in zoo.subset(split)}
    if not last:
        raise InputError(f"{zoo.path} has no task of split {split!r}; change task.unseen")
    bits = torch.tensor([zoo.entries[index].condition for index in last.values()]).long()
    opened = zoo.checkpoint if layout is None else functools.partial(layout.checkpoint, zoo)
    return TaskNetworks(bits, [opened(index) for index in last.values()])


NUM_DIVERSITY_TASKS, NUM_DRAWS = 50, 5

SPARED = 4
"""Of large networks one in so many seen tasks is scored, and one in so many of those that are drawn several times."""

LARGE_NOTE = (
    "networks are large: {} of {} seen tasks are scored, two candidates of each kind of regression are tried, "
    "and of the merges only linear and TIES"
)


@locks(lambda run, split="test", **_: None if split == "validation" else existing(run))
def evaluate_unseen(
    run: Path | str, *, seed: int = 0, split: str = "test", workers: Workers | None = None, command: str = "",
    path_condition: Sequence[float] | None = None,
) -> Report:  # fmt: skip
    """Generate a network for every task and compare with simple baselines.

    Writes ``evaluation.json``, ``scatter.png`` and ``report.html`` into the run.
    Regressions and averages are made of the networks as the generator's layout cuts them: LoRA pairs in canonical form.
    Networks are made, scored and dropped some at a time. No more seen tasks are scored than unseen ones, evenly chosen,
    and of large networks a quarter as many; of these only the best degree of ridge regression is scored.

    Args:
        split: images or rows to score on; ``validation`` scores on validation tasks in place of the unseen ones, and
            writes nothing.
        path_condition: the task whose denoising paths the page shows; the unseen one of median metric when None.

    Raises:
        InputError: the run is not one of a family of binary tasks, or has learned what choices are to be made by.
    """
    run, choosing, workers = Path(run), split == "validation", workers or Workers()
    generator = Generator.from_pretrained(run)
    config, zoo, task = generator.config, Zoo.open(generator.config.zoo), task_family(generator.config)
    require_for_choices(config, split)
    networks = {each: networks_of(zoo, each, generator.layout) for each in ("train", "validation")}
    seen = networks["train"].join(networks["validation"]) if "validation" in config.train.splits else networks["train"]
    wanted = {"unseen": networks["validation"] if choosing else networks_of(zoo, "unseen", generator.layout)}
    wanted["seen"] = as_many(seen, -(-len(wanted["unseen"].bits) // (SPARED if seen.is_large else 1)))
    with contextlib.nullcontext() if seen.is_large else single_threaded():
        chosen = choose_regressions(task, networks["train"], networks["validation"], workers)
        shown = chosen if isinstance(task, ImageTaskFamily) and not seen.is_large else ("ridge", "kernel_ridge")
        regressions = {name: chosen[name][0] for name in shown}
        head, tried = _linear_head(config, zoo, task, networks, seen.bits, workers)
        methods = Methods(generator, zoo, seen, regressions, task, head, seed, workers)
        measured = {name: methods.measure(each, name == "seen", split) for name, each in wanted.items()}
        extras: dict[str, Any] = {
            "regressions": {name: {**asdict(each), "validation_accuracy": a} for name, (each, a) in chosen.items()}
        }
        extras |= {"linear_head": tried} if tried else {}
        if isinstance(task, ImageTaskFamily) and not choosing:
            extras["diversity"] = diversity(generator, task, wanted["unseen"].bits, seen, seed, workers)
        report = _report(generator, task, measured, wanted["unseen"].bits, split, seed, extras)
    if seen.is_large:
        report = report.model_copy(update={"notes": (LARGE_NOTE.format(len(wanted["seen"].bits), len(seen.bits)),)})
    if not choosing and workers.is_first:
        write_report(run, report, tasks_page(run, report, generator, zoo, task, command, path_condition))
    return report


def require_splits(task: TaskFamily) -> None:
    """Raise InputError, before anything is trained, if a split that the comparison needs has no task."""
    splits = task.splits()
    for split in ("unseen", "validation"):
        if split not in splits:
            raise InputError(f"no task has the split {split!r}, which the comparison needs; set task.{split}")


def _linear_head(
    config: Config, zoo: Zoo, task: TaskFamily, networks: Mapping[str, TaskNetworks],
    seen: Tensor, workers: Workers,
) -> tuple[LinearHead | None, dict[str, float]]:  # fmt: skip
    """The linear head of all ``seen`` tasks, and how it was tuned; none if the generator saw no images."""
    settings = config.train.behaviour
    if not isinstance(task, ImageTaskFamily) or settings is None or not config.evaluate.linear_head:
        return None, {}
    training = LinearHeadTraining(
        config.train.steps, config.train.batch_size, settings.images, config.seed,
        task.teacher(zoo) if settings.target == "base" else None,
    )  # fmt: skip
    tasks = networks["train"].bits, networks["validation"].bits, seen
    head, rate, accuracy = tune_linear_head(task, task.base_network(zoo), *tasks, training, workers)
    return head, {"learning_rate": rate, "validation_accuracy": accuracy}


def diversity(
    generator: Generator, task: ImageTaskFamily, bits: Tensor, seen: TaskNetworks, seed: int, workers: Workers
) -> dict[str, Any]:
    """Several networks for each of some unseen tasks."""
    bits = bits[: NUM_DIVERSITY_TASKS // (SPARED if seen.is_large else 1)]
    rows = generator.share(len(bits), workers.partition)
    seeds = [1000 * (seed + 1) + number for number in range(NUM_DRAWS)]
    draws = [parts_for(generator, bits, each, partition=workers.partition) for each in seeds]
    return measure_diversity(task, draws, bits, seen.spread(), workers, rows)


def measure_diversity(
    task: ImageTaskFamily,
    draws: Sequence[Parts],
    bits: Tensor,
    originals_spread: float,
    workers: Workers | None = None,
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """How several networks for one task differ on test images, and what their vote gains: by name, as reports have it.

    Args:
        draws: R times networks for the same T tasks, in the same parts.
        bits: the tasks ``[T, C]``.
        originals_spread: root mean square deviation of the seen tasks' weights from their mean, to compare with.
        rows: the tasks that ``draws`` are for, those of this process; all when None.
    """
    workers, rows = workers or Workers(), range(len(bits)) if rows is None else rows
    own: list[tuple[Tensor, float, int]] = []
    for parts in steps("generating several networks a task", zip(*draws, strict=True)):
        made = torch.stack([task.probabilities(each, "test") for each in parts])
        for number in range(made.shape[1]):
            deviations = [torch.stack([each[name][number] for each in parts]).double().std(0) for name in parts[0]]
            square = sum(each.square().sum().item() for each in deviations)
            own.append((made[:, number].clone(), square, sum(each.numel() for each in deviations)))
    every, all_squares, counts = zip(*workers.collect(rows, own, len(bits)), strict=True)
    squares, count = sum(all_squares), sum(counts)
    probabilities = torch.stack(every, 1)  # [R, T, images, 2]
    answers = probabilities.argmax(-1)
    targets = task.targets(bits, "test")
    pairs = [(a, b) for a in range(len(draws)) for b in range(a)]
    return {
        "num_tasks": len(bits),
        "networks_per_task": len(draws),
        "disagreement": sum((answers[a] != answers[b]).double().mean().item() for a, b in pairs) / len(pairs),
        "mean_accuracy": (answers == targets).double().mean().item(),
        "ensemble_accuracy": (probabilities.mean(0).argmax(-1) == targets).double().mean().item(),
        "weight_spread": (squares / count) ** 0.5 / originals_spread,
    }


def base_summed(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> Tensor:
    """Accuracy ``[T]`` of the shared base network whose class probabilities are summed over each side of a task."""
    positive = bits.to(probabilities.dtype) @ probabilities.T  # [T, images]
    return ((positive > 0.5) == task.targets(bits, split).bool()).double().mean(1)


def worst_tasks(task: ImageTaskFamily, probabilities: Tensor, bits: Tensor, split: str) -> list[dict[str, Any]]:
    """The tasks at which networks do worst: bits, accuracy, and the share of right answers for each class of images.

    Args:
        probabilities: of one network for each task, ``[T, images, 2]``.
        bits: the tasks ``[T, C]``.
    """
    right = (probabilities.argmax(-1) == task.targets(bits, split)).double()  # [T, images]
    accuracies = right.mean(1)
    rows = accuracies.argsort()[:NUM_WORST]
    classes = task.classes(split)
    shares = torch.stack([right[rows][:, classes == each].mean(1) for each in range(bits.shape[1])], 1)  # [W, C]
    return [
        {"bits": bits[row].tolist(), "accuracy": accuracies[row].item(), "accuracy_of_class": share}
        for row, share in zip(rows.tolist(), shares.tolist(), strict=True)
    ]


def task_family(config: Config) -> Any:
    """The configuration's family of binary tasks. Raises InputError for any other task."""
    task = build_task(config.task) if config.task is not None else None
    if not isinstance(task, TaskFamily):
        found = "none" if config.task is None else config.task.name
        raise InputError(
            f"task.name is {found}, which is not a family of binary tasks; see configs/digits_unseen.yaml and "
            "configs/lora/tiny.yaml"
        )
    if task.condition.kind != "binary":
        raise InputError(
            f"task.conditions are of kind {task.condition.kind}, but the comparison's regressions take bits; "
            "give binary ones, or only train and generate, which work with any"
        )
    return task


def _report(
    generator: Generator, task: TaskFamily, measured: Mapping[str, Engine], bits: Tensor, split: str, seed: int,
    extras: dict[str, Any],
) -> Report:  # fmt: skip
    """The report of a family; for image tasks also the worst tasks, and networks of one task beside one another.

    Args:
        bits: the unseen tasks ``[T, C]``.
    """
    unseen = measured["unseen"].kinds
    if isinstance(task, ImageTaskFamily):
        stacked = {name: each.stacked("probabilities") for name, each in unseen.items()}
        kept = {name: each for name, each in stacked.items() if each is not None}
        extras["worst"] = worst_tasks(task, kept["generated"], bits, split)
        extras["per_task"] = measure_per_task(task, kept, bits, split, seed)
        for name, each in scores_of_sets(task, kept, bits, split).items():
            unseen[name].more["joint"] = each
        shown = {"error_iou": "error_iou", "one_nna": "nearest_neighbour_accuracy", "coverage": "coverage"}
        for name, each in (extras["per_task"] or {"methods": {}})["methods"].items():
            unseen[name].extras |= {key: each[metric] for key, metric in shown.items() if each[metric] is not None}
    kinds = {
        part: {name: each.reported(seed) for name, each in every.kinds.items()} for part, every in measured.items()
    }
    share = unseen["generated"].first.mean().item() / unseen["original"].first.mean().item()
    facts = {"training_seconds": generator.facts.get("training seconds"), **generator.facts}
    return Report(
        experiment="tasks", judge=f"{type(task).__name__}, {len(bits)} unseen tasks", split=split,
        seed=generator.config.seed, better=measured["unseen"].directions(), kinds=kinds["unseen"],
        parts={"seen": kinds["seen"]}, references=("original", "no_condition"),
        facts={**facts, "share_of_originals": share}, extras=extras,
    )  # fmt: skip
