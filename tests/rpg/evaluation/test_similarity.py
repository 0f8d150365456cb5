from __future__ import annotations

import torch

from rpg.evaluation.two_sample import error_iou, max_similarity, max_similarity_among

LABELS = torch.zeros(6, dtype=torch.long)
# wrong at: {0, 1}; {1, 2, 3}; nothing; everything; {0, 1} with other answers
NETWORKS = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6, [1] * 6, [2, 3, 0, 0, 0, 0]])


def error_iou_by_sets(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The obvious twin."""

    def wrong(row: torch.Tensor) -> set[int]:
        return {index for index, (answer, label) in enumerate(zip(row, labels, strict=True)) if answer != label}

    def iou(a: set[int], b: set[int]) -> float:
        return len(a & b) / len(a | b) if a | b else 1.0

    return torch.tensor([[iou(wrong(a), wrong(b)) for b in second] for a in first], dtype=torch.float64)


def test_iou_by_hand():
    expected = [
        [1, 1 / 4, 0, 2 / 6, 1],
        [1 / 4, 1, 0, 3 / 6, 1 / 4],
        [0, 0, 1, 0, 0],
        [2 / 6, 3 / 6, 0, 1, 2 / 6],
        [1, 1 / 4, 0, 2 / 6, 1],
    ]
    torch.testing.assert_close(error_iou(NETWORKS, NETWORKS, LABELS), torch.tensor(expected, dtype=torch.float64))


def test_iou_equals_that_of_sets():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (60,), generator=generator)
    first, second = (
        torch.where(torch.rand(num, 60, generator=generator) < 0.1, torch.randint(10, (num, 60)), labels)
        for num in (7, 9)
    )
    torch.testing.assert_close(error_iou(first, second, labels), error_iou_by_sets(first, second, labels))


def test_a_copy_of_an_original_is_called_one():
    originals = NETWORKS[:2]
    assert max_similarity(originals[1:], originals, LABELS).tolist() == [1.0]


def test_maximum_over_the_zoo():
    assert max_similarity(NETWORKS[3:4], NETWORKS[:3], LABELS).tolist() == [0.5]


def test_originals_are_not_compared_with_themselves():
    assert max_similarity_among(NETWORKS[:4], LABELS).tolist() == [2 / 6, 0.5, 0.0, 0.5]
    # but a second network with the same errors is another network
    assert max_similarity_among(NETWORKS[[0, 4]], LABELS).tolist() == [1.0, 1.0]


def test_a_lone_original_resembles_nobody():
    assert max_similarity_among(NETWORKS[:1], LABELS).tolist() == [0.0]
