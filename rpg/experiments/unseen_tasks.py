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
from rpg.devices import Partition, single_threaded
from rpg.evaluation.conditional import Regression, choose_regressions, random_other, unseen_baselines
from rpg.evaluation.judges import less_is_better
from rpg.evaluation.page.page import write_report
from rpg.evaluation.per_task import (
    SplitScores,
    base_summed,
    measure_diversity,
    measure_per_task,
    score_split,
    scores_of_sets,
    worst_tasks,
)
from rpg.evaluation.report import Report
from rpg.evaluation.task_networks import LinearHead, LinearHeadTraining, Parts, TaskNetworks, in_parts, tune_linear_head
from rpg.evaluation.workers import Workers
from rpg.experiments.single import existing, merges_of, require_for_choices
from rpg.experiments.tasks_page import tasks_page
from rpg.generation.generator import Generator
from rpg.merging.adapters import Merges, PeftMerges
from rpg.merging.methods import AFFORDABLE_MERGES, NetworkMerges
from rpg.seeding import derive_seed
from rpg.tasks import build_task
from rpg.tasks.base import ImageTaskFamily, TaskFamily
from rpg.tasks.side_by_side import Stacked
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo


@dataclass(frozen=True)
class Methods:
    """What makes networks for tasks.

    Attributes:
        generator: makes those that are compared.
        seen: the networks of all seen tasks, as the generator's layout cuts them.
        regressions: by the name they are reported under; ``kernel_ridge`` among them.
        task: knows what a task's training began with, from which networks are merged as deviations.
    """

    generator: Generator
    zoo: Zoo
    seen: TaskNetworks
    regressions: Mapping[str, Regression]
    task: TaskFamily
    seed: int = 0
    partition: Partition = field(default_factory=Partition)

    @functools.cached_property
    def merges(self) -> Merges:
        """Merges the adapters of ``seen``, or its networks."""
        last = {tuple(map(int, entry.condition or ())): index for index, entry in enumerate(self.zoo.entries)}
        entries = [last[tuple(bits)] for bits in self.seen.bits.tolist()]
        return merges_of(self.generator.adapter, self.zoo, entries, self.generator.layout)

    def rows(self, num: int) -> list[int]:
        """Which of ``num`` tasks are this process's."""
        return self.generator.share(num, self.partition)

    def networks(
        self, originals: TaskNetworks, own: bool, extra: Mapping[str, Parts] | None = None
    ) -> dict[str, Parts]:
        """Every method's networks for this process's share of the tasks of ``originals``; empty without a share.

        Args:
            originals: trained for the tasks.
            own: the tasks are seen ones.
            extra: further methods' networks, for this process's tasks.
        """
        rows, bits = self.rows(len(originals.bits)), originals.bits
        if not rows:
            return {}
        mine = originals if len(rows) == len(bits) else originals.select(rows)
        others = random_other(bits, self.seen.bits, self.seed)
        return {
            "original": mine.parts(),
            "generated": parts_for(self.generator, bits, self.seed, partition=self.partition),
            "no_condition": parts_for(self.generator, others, self.seed, partition=self.partition),
            **(extra or {}),
            **unseen_baselines(self.seen, mine.bits, self.regressions, own),
            **self._merged(mine.bits),
        }

    def _merged(self, bits: Tensor) -> dict[str, Parts]:
        """Merges of the seen networks with the largest shares in kernel ridge, for the tasks ``[T, C]``."""
        shares = self.regressions["kernel_ridge"].mixture(self.seen.bits, bits)

        whole = isinstance(self.merges, NetworkMerges) and self.seen.is_large
        begun: Stacked = {}
        if isinstance(self.merges, NetworkMerges) and not whole:
            begun = next(iter(self.task.untrained(self.zoo, bits).values()))

        def made(method: str) -> Iterator[Any]:
            for number, (row, task) in enumerate(zip(shares, bits, strict=True)):
                seed = derive_seed(self.seed, method, *task.tolist())
                if isinstance(self.merges, PeftMerges):
                    yield self.merges.merge(method, row, seed)
                    continue
                base, place = (
                    (next(iter(self.task.untrained(self.zoo, task[None]).values())), 0) if whole else (begun, number)
                )
                yield self.merges.merge(method, row, seed, {name: value[place] for name, value in base.items()})

        return {method: in_parts(made(method)) for method in (AFFORDABLE_MERGES if whole else self.merges.methods)}


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
    scored: dict[str, SplitScores] = {}
    with contextlib.nullcontext() if seen.is_large else single_threaded():
        chosen = choose_regressions(task, networks["train"], networks["validation"], workers)
        shown = chosen if isinstance(task, ImageTaskFamily) and not seen.is_large else ("ridge", "kernel_ridge")
        regressions = {name: chosen[name][0] for name in shown}
        methods = Methods(generator, zoo, seen, regressions, task, seed, workers.partition)
        head, tried = _linear_head(config, zoo, task, networks, seen.bits, workers)
        for name, originals in wanted.items():
            rows = methods.rows(len(originals.bits))
            mine = originals.bits[rows]
            extra: dict[str, Parts] = untrained(task, zoo, mine, originals.part_size) if rows else {}
            if head is not None and rows:
                extra["linear_head"] = [{key: value.detach() for key, value in head(mine).items()}]
            made = methods.networks(originals, name == "seen", extra)
            scored[name] = score_split(task, made, originals.bits, seen.bits, split, workers, rows)
        extras: dict[str, Any] = {
            "regressions": {name: {**asdict(each), "validation_accuracy": a} for name, (each, a) in chosen.items()}
        }
        extras |= {"linear_head": tried} if tried else {}
        if isinstance(task, ImageTaskFamily) and not choosing:
            extras["diversity"] = diversity(generator, task, wanted["unseen"].bits, seen, seed, workers)
        report = _report(generator, zoo, task, scored, split, seed, extras)
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
    generator: Generator, zoo: Zoo, task: TaskFamily, scored: Mapping[str, SplitScores], split: str, seed: int,
    extras: dict[str, Any],
) -> Report:  # fmt: skip
    """The report of a family; for image tasks also the summed base network, worst tasks and diversity."""
    kinds = {}
    if isinstance(task, ImageTaskFamily):
        probabilities = task.base_probabilities(zoo, split)
        for scores in scored.values():
            summed = base_summed(task, probabilities, scores.bits, split)
            scores.metrics["base_summed"] = {"accuracy": summed}
        generated = scored["unseen"].probabilities["generated"]
        extras["worst"] = worst_tasks(task, generated, scored["unseen"].bits, split)
    for name, scores in scored.items():
        kinds[name] = scores.kinds(seed)
    if isinstance(task, ImageTaskFamily):
        unseen = scored["unseen"]
        per_task = measure_per_task(task, unseen.probabilities, unseen.bits, split, seed)
        extras["per_task"] = per_task
        sets = scores_of_sets(task, unseen.probabilities, unseen.bits, split)
        kinds["unseen"] |= {
            name: kinds["unseen"][name].model_copy(update={"joint": each}) for name, each in sets.items()
        }
        shown = {"error_iou": "error_iou", "one_nna": "nearest_neighbour_accuracy", "coverage": "coverage"}
        for name, each in (per_task["methods"] if per_task else {}).items():
            found = {key: each[figure] for key, figure in shown.items() if each[figure] is not None}
            kinds["unseen"][name].extras.update(found)
    names = list(scored["unseen"].metrics["generated"])
    less = less_is_better(names)
    means = {name: scored["unseen"].first(name).mean().item() for name in ("generated", "original")}
    facts = {"training_seconds": generator.facts.get("training seconds"), **generator.facts}
    return Report(
        experiment="tasks", judge=f"{type(task).__name__}, {len(scored['unseen'].bits)} unseen tasks", split=split,
        seed=generator.config.seed, better={name: "less" if name in less else "more" for name in names},
        kinds=kinds["unseen"], parts={"seen": kinds["seen"]}, references=("original", "no_condition"),
        facts={**facts, "share_of_originals": means["generated"] / means["original"]}, extras=extras,
    )  # fmt: skip
