"""Two-sample measures in the space of what networks compute: are generated networks told from held-out originals?

Each network is one vector, its class probabilities on the same images. The measures are those of PointFlow (Yang et
al., 2019, arXiv 1906.12320, section 5.1), taken over for weights by HyperDiffusion (arXiv 2303.17015). M networks of
either kind, F numbers a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rpg.evaluation import baselines
from rpg.evaluation.novelty import distances
from rpg.evaluation.results import TwoSample, TwoSampleScores
from rpg.evaluation.vectors import StateDict
from rpg.seeding import make_rng
from rpg.tasks.base import LogitTask


def nearest_neighbour_accuracy(first: Tensor, second: Tensor, between: Tensor) -> float:
    """Share of networks whose nearest neighbour is of their own kind: 0.5 where the kinds cannot be told apart.

    A network has one neighbour fewer of its own kind than of the other, which would pull small sets below 0.5.
    Therefore one of the other kind is left out, too: the mean over all choices. A tie counts half.

    Args:
        first, second: distances among each kind, ``[M, M]``, M at least 2.
        between: distances of the first to the second, ``[M, M]``.
    """
    shares = [_own_share(first, between), _own_share(second, between.T)]
    return sum(shares) / 2


def _own_share(own: Tensor, other: Tensor) -> float:
    count = len(own)
    nearest = own.clone().fill_diagonal_(float("inf")).amin(1)  # [M]
    others = other.sort(1).values[:, :2]  # the nearest, and who is nearest once that is left out
    wins = (nearest[:, None] < others).double() + 0.5 * (nearest[:, None] == others).double()
    return (wins[:, 0] * (count - 1) / count + wins[:, 1] / count).mean().item()


def coverage(between: Tensor) -> float:
    """Share of held-out networks that are the nearest of at least one made: distances ``[made, held out]``."""
    return len(between.argmin(1).unique()) / between.shape[1]


def minimum_matching_distance(between: Tensor) -> float:
    """Mean distance of a held-out network to the nearest made: distances ``[made, held out]``."""
    return between.amin(0).mean().item()


def two_sample(sets: Mapping[str, Tensor], originals: Tensor, held_out: Tensor) -> TwoSample | None:
    """Compare every kind of networks with held-out originals, by class probabilities ``[num, images, classes]``.

    Args:
        sets: the kinds; the first M of each count, a single network counts M times.
        originals: those that were learned from, which are also a kind: M of them, evenly spaced.
        held_out: originals that nothing was learned from; M of them, evenly spaced.

    Returns:
        None where there are fewer than two originals, held-out originals or networks of a kind.
    """
    num = min(len(originals), len(held_out), *(len(each) for each in sets.values() if len(each) > 1))
    if num < 2:
        return None
    training, reference = function_vectors(originals), function_vectors(evenly(held_out, num))
    within = distances(reference, reference)
    kinds = {"originals": evenly(originals, num)} if "originals" not in sets else {}
    kinds |= {name: each.expand(num, -1, -1) if len(each) == 1 else each[:num] for name, each in sets.items()}
    return TwoSample(
        num=num,
        held_out_nearest_training=distances(reference, training).amin(1).median().item(),
        sets={name: _scores(function_vectors(each), reference, within, training) for name, each in kinds.items()},
    )


def evenly(members: Tensor, num: int) -> Tensor:
    """``num`` of them, evenly spaced."""
    return members[torch.linspace(0, len(members) - 1, num).round().long()]


def _scores(vectors: Tensor, held_out: Tensor, within: Tensor, training: Tensor) -> TwoSampleScores:
    between = distances(vectors, held_out)
    return TwoSampleScores(
        nearest_neighbour_accuracy=nearest_neighbour_accuracy(distances(vectors, vectors), within, between),
        coverage=coverage(between),
        minimum_matching_distance=minimum_matching_distance(between),
        nearest_training=distances(vectors, training).amin(1).median().item(),
    )


def function_vectors(probabilities: Tensor) -> Tensor:
    """``[num, images, classes]`` as vectors whose distance is a root mean square over the images."""
    return probabilities.flatten(1) / probabilities.shape[1] ** 0.5


def trivial_samples(
    originals: Sequence[StateDict], conditions: Sequence[object], wanted: Sequence[object], seed: int
) -> dict[str, list[StateDict]]:
    """Baselines, one network for each condition in ``wanted`` from the originals of that very condition.

    Args:
        originals: the training checkpoints.
        conditions: the condition of each, anything hashable; one and the same for all of a zoo without conditions.
        wanted: conditions of the networks to make.
        seed: decides the draws.

    Returns:
        Originals, their average, midpoints of two, independent and covariance Gaussians. A condition that no original
        has takes all of them; midpoints and Gaussians of a lone original are that original.
    """
    made: dict[str, list[StateDict]] = {
        name: [] for name in ("originals", "average", "midpoint", "coordinate_gaussian", "covariance_gaussian")
    }
    orders: dict[object, list[int]] = {}
    for number, condition in enumerate(wanted):
        rows = [i for i, each in enumerate(conditions) if each == condition] or list(range(len(originals)))
        rng = make_rng(seed, "two sample", number)
        if not orders.get(condition):  # every original once, then all of them again
            orders[condition] = [rows[i] for i in torch.randperm(len(rows), generator=rng).tolist()]
        members = [originals[i] for i in rows]
        pair = [members[i] for i in torch.randperm(len(members), generator=rng)[:2].tolist()]
        made["originals"].append(originals[orders[condition].pop()])
        made["average"].append(baselines.average(members))
        made["midpoint"].append(baselines.average(pair))
        made["coordinate_gaussian"] += baselines.coordinate_gaussian(members, 1, rng)
        made["covariance_gaussian"] += baselines.covariance_gaussian(members, 1, rng)
    return made


def measure_two_sample(
    task: object,
    originals: Sequence[StateDict],
    generated: Sequence[StateDict],
    held_out: Sequence[StateDict],
    split: str,
    seed: int,
    *,
    conditions: Sequence[object] | None = None,
    wanted: Sequence[object] | None = None,
) -> TwoSample | None:
    """Compare generated networks and baselines with held-out originals; all are held in memory.

    Args:
        task: a `LogitTask`.
        originals: those that were learned from.
        generated: one for each held-out original where there are conditions.
        held_out: originals that nothing was learned from.
        split: images.
        seed: decides the baselines' draws.
        conditions, wanted: of the originals and of the held-out; None of a zoo without conditions.

    Returns:
        None where there are fewer than two networks of a kind or the task gives no logits.
    """
    num = min(len(originals), len(generated), len(held_out))
    if num < 2 or not isinstance(task, LogitTask):
        return None
    trivial = trivial_samples(originals, conditions or [None] * len(originals), (wanted or [None] * num)[:num], seed)

    def probabilities(networks: Sequence[StateDict]) -> Tensor:
        return torch.stack([logits.float().softmax(-1) for logits in task.logits(networks, split)])

    sets = {name: probabilities(each) for name, each in {"generated": generated[:num], **trivial}.items()}
    return two_sample(sets, probabilities(originals), probabilities(held_out))
