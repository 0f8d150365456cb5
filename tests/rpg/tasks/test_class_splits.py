import pytest
import torch

from rpg.tasks.class_splits import (
    all_tasks,
    assign_splits,
    bits_of_classes,
    check_bits,
    hamming_to_nearest,
)
from rpg.tasks.images.config import ClassPairSplit, HammingWeightSplit, RandomSplit
from tokenization.errors import InputError

NAMES = ("cat", "dog", "ship")


def test_tasks_are_every_subset_but_the_empty_and_the_whole():
    bits = all_tasks(10)
    assert bits.shape == (1022, 10)
    assert len(bits.unique(dim=0)) == 1022
    assert bits.sum(1).min() == 1 and bits.sum(1).max() == 9
    assert bits[4].tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0]  # task number 5 = 0b101


def test_a_random_split_counts_and_repeats():
    bits = all_tasks(10)
    splits = assign_splits(bits, RandomSplit(num=200), 100, seed=3)
    assert (splits.count("unseen"), splits.count("validation"), splits.count("train")) == (200, 100, 722)
    assert splits == assign_splits(bits, RandomSplit(num=200), 100, seed=3)
    assert splits != assign_splits(bits, RandomSplit(num=200), 100, seed=4)


def test_structured_splits_hold_out_exactly_their_structure():
    bits = all_tasks(10)
    splits = assign_splits(bits, HammingWeightSplit(weights=(3, 7)), 10, seed=0)
    assert {int(row.sum()) for row, split in zip(bits, splits, strict=True) if split == "unseen"} == {3, 7}
    assert not {int(row.sum()) for row, split in zip(bits, splits, strict=True) if split != "unseen"} & {3, 7}
    splits = assign_splits(bits, ClassPairSplit(pair=(3, 8)), 10, seed=0)
    assert all((row[3] == row[8]) == (split == "unseen") for row, split in zip(bits, splits, strict=True))


@pytest.mark.parametrize(
    "held_out, num_validation",
    [
        (RandomSplit(num=1022), 10),
        (RandomSplit(num=1000), 22),
        (HammingWeightSplit(weights=(0,)), 0),
        (ClassPairSplit(pair=(3, 3)), 0),
        (ClassPairSplit(pair=(3, 10)), 0),
    ],
)
def test_impossible_splits_are_one_line(held_out, num_validation):
    with pytest.raises(InputError, match="task.unseen"):
        assign_splits(all_tasks(10), held_out, num_validation, seed=0)


@pytest.mark.parametrize(
    "values, words",
    [
        ([1, 0], "2 values"),
        ([1, 0, 0.5], "zeros and ones"),
        ([0, 0, 0], "no positive class"),
        ([1, 1, 1], "every class"),
    ],
)
def test_bad_bits_are_one_line(values, words):
    with pytest.raises(InputError, match=words):
        check_bits(values, 3)


def test_classes_by_name_and_number():
    assert bits_of_classes(["Cat", " 2"], NAMES).tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="'bird'.*cat, dog, ship"):
        bits_of_classes(["bird"], NAMES)


def test_nearest_by_hamming_distance():
    distance, place = hamming_to_nearest(torch.tensor([[1, 1, 0], [0, 0, 1]]), torch.tensor([[1, 0, 0], [0, 0, 1]]))
    assert distance.tolist() == [1, 0] and place.tolist() == [0, 1]
