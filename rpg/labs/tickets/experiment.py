"""The experiment on lottery tickets: find them, learn to generate them, train under every kind of mask.

T tasks, S tasks that were learned from, P weights that may be pruned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.config import Config
from rpg.evaluation.combinations import nearest_rows
from rpg.evaluation.conditional import random_other
from rpg.evaluation.page.page import Page
from rpg.evaluation.report import Curve, Networks, Report, networks
from rpg.experiments.driver import Experiment
from rpg.experiments.evaluating import judges
from rpg.experiments.single import generate_for, tasks_scored
from rpg.experiments.unseen_tasks import networks_of
from rpg.generation.generator import Generator
from rpg.labs.tickets.task import TicketsTask, cut_globally
from rpg.models.conditioning import regression_inputs
from rpg.models.kernel_regression import KernelRidge
from rpg.tasks import require_task
from tokenization.zoo.zoo import Zoo

SPARSITIES = (0.9, 0.95, 0.98)
"""Shares of zeros at which all kinds of masks are compared."""

Scores = Mapping[str, Tensor]
"""Of the weights, by kind of mask: ``[T, P]``."""


def experiment(config: Config) -> Experiment:
    """What `rpg run` does with a configuration."""
    return Experiment("tickets", evaluate_tickets)


def tickets_task(config: Config) -> TicketsTask:
    """The task of a configuration. Raises InputError if it is another one."""
    return require_task(config.task, TicketsTask, "but this is the experiment on tickets; set task.name to tickets")


@judges
def evaluate_tickets(generator: Generator, zoo: Zoo, *, run: Path, seed: int, split: str) -> tuple[Report, Page]:
    """Train the start under generated masks, tickets and simple baselines, for unseen tasks."""
    task = tickets_task(generator.config)
    seen, wanted = (networks_of(zoo, each, generator.layout) for each in ("train", tasks_scored(split)))
    bits, sparsity = wanted.bits, task.config.sparsity
    flatten = task.space.flatten
    made: dict[str, Tensor] = {"original": flatten(wanted.weights())}
    made["generated"] = flatten(generate_for(generator, bits, seed))
    made["no_condition"] = flatten(generate_for(generator, random_other(bits, seen.bits, seed), seed))
    made |= simple_baselines(flatten(seen.weights()), seen.bits, bits)
    made |= {name: flatten(each) for name, each in task.untrained(zoo, bits).items()}

    def judge(scores: Tensor, share: float) -> Tensor:
        return task.accuracies(task.space.unflatten(scores), bits, split, share)

    kinds, curve = compare(made, judge, sparsity, bits, seed)
    whole, one = judge(made["original"], 0.0).mean().item(), seconds_of_one(generator, task, bits[:1])
    report = Report(
        experiment="tickets", judge=f"trained under masks of {sparsity:.0%} zeros", split=split, seed=seed,
        better={"accuracy": "more", "overlap": "more"}, kinds=kinds, references=("original", "no_condition"),
        curves={"accuracy by share of zeros": curve},
        facts={
            "sparsity": sparsity, "whole": whole, "seconds_of_one": one,
            "training_seconds": generator.facts.get("training seconds"),
        },
        notes=(
            f"Originals are searched tickets. Without zeros networks have {whole:.1%}.",
            f"One mask takes {one['generated']:.2f} processor seconds generated, {one['original']:.2f} searched.",
        ),
    )  # fmt: skip
    return report, Page(f"Lottery tickets: {run.name}")


def simple_baselines(tickets: Tensor, seen: Tensor, bits: Tensor) -> dict[str, Tensor]:
    """Scores that need no generator, made of the tickets ``[S, P]`` of ``seen`` tasks, for ``bits``: ``[T, P]`` each.

    ``nearest_seen``: the ticket of the nearest task; ``average``: of all; ``kernel_ridge``: regression on the bits.
    """
    mean = tickets.mean(0)
    known, asked = (regression_inputs("binary", each, each.shape[1]) for each in (seen, bits))
    rest = (tickets - mean).double()
    return {
        "kernel_ridge": mean + (KernelRidge.fit(known, rest @ rest.T).shares(asked) @ rest).float(),
        "nearest_seen": tickets[nearest_rows(seen, bits, own=False)],
        "average": mean.expand(len(bits), -1),
    }


def compare(
    made: Scores, judge: Callable[[Tensor, float], Tensor], sparsity: float, bits: Tensor, seed: int
) -> tuple[dict[str, Networks], Curve]:
    """Every kind of mask at one share of zeros, task by task, and its mean accuracy at others.

    Args:
        made: scores by kind, ``original`` (the tickets), ``generated`` and ``random`` among them.
        judge: accuracies ``[T]`` of masks cut from scores at a share of zeros.

    Returns:
        Kinds with ``accuracy`` and ``overlap`` (intersection over union of living weights with the tickets'), and among
        their extras ``better_than_random`` (share of tasks) and ``generated_better`` (share of tasks on which generated
        masks are better than these); accuracy by share of zeros.
    """
    shares = sorted({*SPARSITIES, sparsity})
    found = {name: {share: judge(scores, share) for share in shares} for name, scores in made.items()}
    tickets = cut_globally(made["original"], sparsity)
    kinds = {}
    for name, by_share in found.items():
        accuracies, masks = by_share[sparsity], cut_globally(made[name], sparsity)
        extras = {
            "better_than_random": _share_above(accuracies, found["random"][sparsity]),
            "generated_better": _share_above(found["generated"][sparsity], accuracies),
        }
        overlap = (masks * tickets).sum(1) / (masks + tickets).clamp(max=1).sum(1)
        metrics = {"accuracy": accuracies, "overlap": overlap}
        kinds[name] = networks(metrics, conditions=bits, seed=seed, extras=extras)
    lines = {name: tuple(each.mean().item() for each in by_share.values()) for name, by_share in found.items()}
    return kinds, Curve(x=tuple(shares), lines=lines, across="share of zeros", up="accuracy")


def _share_above(first: Tensor, second: Tensor) -> float:
    return (first > second).double().mean().item()


def seconds_of_one(generator: Generator, task: TicketsTask, bits: Tensor) -> dict[str, float]:
    """Processor seconds of one mask for a task ``[1, C]``: generated, searched, or pruned once after training."""
    makers: dict[str, Callable[[], Any]] = {
        "generated": lambda: generate_for(generator, bits, 0),
        "original": lambda: task.find(bits),
        "one_shot": lambda: task.sizes(torch.ones(1, task.space.size), bits),
    }
    found = {}
    for name, make in makers.items():
        started = time.process_time()
        make()
        found[name] = time.process_time() - started
    return found
