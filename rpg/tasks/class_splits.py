"""Binary tasks over the classes of a labelled image set: which classes are the positive ones.

With C classes there are 2^C − 2 tasks (all-negative and all-positive ones ask nothing). Task number m, from 1 to
2^C − 2, has bit c set where class c is positive (arXiv 2501.11587, section 5). T tasks, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.seeding import permutation
from rpg.tasks.images.config import HammingWeightSplit, RandomSplit, UnseenSplit
from tokenization.errors import InputError


def all_tasks(num_classes: int) -> Tensor:
    """Every task's bits in the order of their numbers, ``[2^C − 2, C]`` of 0 and 1 (int64)."""
    numbers = torch.arange(1, 2**num_classes - 1)
    return (numbers[:, None] >> torch.arange(num_classes)) & 1


def assign_splits(bits: Tensor, unseen_split: UnseenSplit, num_validation: int, seed: int) -> list[str]:
    """The split of every task ``[T, C]``: ``unseen``, ``validation`` (seen, but kept for choices) or ``train``.

    Raises InputError if the unseen part is impossible, or leaves nothing to train on.
    """
    unseen = _unseen(bits, unseen_split, seed)
    splits = ["unseen" if flag else "train" for flag in unseen.tolist()]
    seen = [i for i, split in enumerate(splits) if split == "train"]
    if not len(seen) > num_validation:
        raise InputError(
            f"task.unseen leaves {len(seen)} of {len(bits)} tasks, of which {num_validation} are for validation "
            "and none to train on; withhold fewer"
        )
    for place in permutation(len(seen), seed, "validation tasks")[:num_validation].tolist():
        splits[seen[place]] = "validation"
    return splits


def _unseen(bits: Tensor, unseen_split: UnseenSplit, seed: int) -> Tensor:
    num_classes = bits.shape[1]
    if isinstance(unseen_split, RandomSplit):
        unseen = torch.zeros(len(bits), dtype=torch.bool)
        unseen[permutation(len(bits), seed, "unseen tasks")[: unseen_split.num]] = True
    elif isinstance(unseen_split, HammingWeightSplit):
        unseen = torch.isin(bits.sum(1), torch.tensor(unseen_split.weights))
    else:
        first, second = unseen_split.pair
        if first == second or not (0 <= first < num_classes and 0 <= second < num_classes):
            raise InputError(
                f"task.unseen.pair must be two different classes from 0 to {num_classes - 1}, not {unseen_split.pair}"
            )
        unseen = bits[:, first] == bits[:, second]
    if not unseen.any():
        raise InputError("task.unseen withholds no task; choose it so that at least one is unseen")
    return unseen


def check_bits(values: Sequence[float] | Tensor, num_classes: int, where: str = "condition") -> Tensor:
    """A task's bits, ``[C]`` int64.

    Raises InputError for a wrong length, values other than 0 and 1, or a task that asks nothing (all 0, all 1).
    """
    vector = torch.as_tensor(values, dtype=torch.float32)
    if vector.shape != (num_classes,):
        raise InputError(f"{where} has {vector.numel()} values; give {num_classes}, one for each class")
    if not ((vector == 0) | (vector == 1)).all():
        raise InputError(f"{where} must be zeros and ones, not {vector.tolist()}")
    if vector.sum() in (0, num_classes):
        found = "no positive class" if vector.sum() == 0 else "every class positive"
        raise InputError(f"{where} has {found}, which asks nothing; leave at least one class on each side")
    return vector.long()


def bits_of_classes(names: Sequence[str], classes: Sequence[str], where: str = "--classes") -> Tensor:
    """The task whose positive classes are ``names``, ``[C]`` int64; a class may also be given by its number.

    Raises InputError for an unknown class, or a task that asks nothing.
    """
    known = {name.lower(): index for index, name in enumerate(classes)}
    known |= {str(index): index for index in range(len(classes)) if str(index) not in known}
    bits = torch.zeros(len(classes), dtype=torch.long)
    for name in names:
        key = name.strip().lower()
        if key not in known:
            raise InputError(
                f"{where} names {name.strip()!r}, which is not a class here; choose among {', '.join(classes)}"
            )
        bits[known[key]] = 1
    return check_bits(bits, len(classes), where)


def hamming_to_nearest(bits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to and place of the nearest seen task: ``[T, C]``, ``[S, C]`` → int64 ``[T]``, ``[T]``."""
    distance = (bits[:, None] != seen[None]).sum(-1)  # [T, S]
    least = distance.min(1)
    return least.values, least.indices
