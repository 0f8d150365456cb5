"""Bring the runs of a zoo into one order of their hidden units (Git Re-Basin, arXiv 2209.04836).

Independent runs find the same units in other places. After alignment the runs lie nearer one another, averages and
Gaussians over runs mean something, and a generator need not learn each run's own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rpg.evaluation.matching import Distances
from rpg.evaluation.permutations import symmetries
from rpg.evaluation.rebasin import permute
from rpg.evaluation.vectors import average
from rpg.tasks import Task
from tokenization.checkpoint.structure import StateDict
from tokenization.errors import InputError
from tokenization.files import atomic_folder
from tokenization.zoo.description import require_new_folder
from tokenization.zoo.locks import locks
from tokenization.zoo.zoo import Zoo


def run_orders(measure: Distances, sweeps: int = 4) -> dict[int, list[Tensor]]:
    """The order of the hidden units of each run, ``[group]`` permutations each.

    The checkpoints of a run keep the order of their units, so that their mean stands for them. All runs are matched to
    the first, then in turn to the mean of the others (section 3.2's merging of several models) until nothing changes.

    Args:
        measure: the zoo, and its groups of interchangeable units.
        sweeps: how often every run is matched to the others' mean at most.
    """
    runs = measure.runs.tolist()
    centres: dict[int, StateDict] = {
        run: average([each for each, other in zip(measure.originals, runs, strict=True) if other == run])
        for run in dict.fromkeys(runs)
    }
    matcher = measure.matcher
    orders: dict[int, list[Tensor]] = {}
    reference: StateDict = next(iter(centres.values()))
    for sweep in range(sweeps + 1):
        changed = False
        for run, centre in centres.items():
            if sweep and len(centres) > 1:
                others = {other: order for other, order in orders.items() if other != run}
                reference = average([permute(centres[other], measure.groups, order) for other, order in others.items()])
            found = matcher.orders(reference, centre)
            same = run in orders and all(bool((a == b).all()) for a, b in zip(found, orders[run], strict=True))
            orders[run] = found
            changed |= not same
        if not changed:
            break
    return orders


@locks(lambda zoo, task, target: target, beside=True)
def align_zoo(zoo: Zoo, task: Task, target: Path | str) -> Zoo:
    """Write a zoo whose runs share one order of hidden units, all of it or none; every network computes what it did.

    Args:
        zoo: whose runs are aligned.
        task: builds its network.
        target: the folder to write.

    Raises:
        InputError: there is something at ``target``, or nothing is known of the network's symmetries.
    """
    target = Path(target)
    require_new_folder(target)
    groups = symmetries(task)
    if not groups:
        raise InputError(
            f"nothing is known of the symmetries of the networks in {zoo.path}; align a zoo of a known network"
        )
    originals: Sequence[StateDict] = [zoo.state_dict(index) for index in range(len(zoo))]
    measure = Distances(originals, [entry.run for entry in zoo.entries], groups)
    orders = run_orders(measure)
    require_new_folder(target)
    with atomic_folder(target) as folder:
        aligned = Zoo.create(folder, task=zoo.task, condition=zoo.condition)
        for entry, original in zip(zoo.entries, originals, strict=True):
            aligned.append(
                permute(original, measure.groups, orders[entry.run]),
                run=entry.run,
                step=entry.step,
                condition=entry.condition,
                metrics=entry.metrics,
                split=entry.split,
            )
    return Zoo.open(target)
