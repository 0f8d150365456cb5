"""Sets of examples as conditions: any order, any number, classes that are missing or unknown."""

import torch

from rpg.models.conditioning import ConditionConfig, ConditionEncoder, SetEncoder, example_rows, row_size

NUM_VALUES, NUM_CLASSES = 6, 3
SIZE = row_size(NUM_VALUES, NUM_CLASSES)


def sets(num: int, count: int, classes: torch.Tensor | None = None) -> torch.Tensor:
    values = torch.randn(num, count, NUM_VALUES, generator=torch.Generator().manual_seed(count))
    return example_rows(values, classes, NUM_CLASSES)


def encoder() -> SetEncoder:
    torch.manual_seed(0)
    return SetEncoder(SIZE, NUM_CLASSES, 8)


def test_rows_hold_values_class_and_presence():
    rows = example_rows(torch.tensor([[5.0, 6.0], [7.0, 8.0]]), torch.tensor([2, -1]), 3)
    assert rows.tolist() == [[5, 6, 0, 0, 1, 1], [7, 8, 0, 0, 0, 1]]


def test_the_order_of_examples_does_not_matter_and_their_classes_do():
    rows = sets(2, 5, torch.tensor([[0, 1, 2, 2, 1]]).expand(2, -1))
    turned = rows[:, torch.tensor([3, 1, 4, 0, 2])]
    encode = encoder()
    assert torch.allclose(encode(rows.flatten(1)), encode(turned.flatten(1)), atol=1e-6)
    others = sets(2, 5, torch.tensor([[1, 0, 2, 2, 1]]).expand(2, -1))
    assert not torch.allclose(encode(rows.flatten(1)), encode(others.flatten(1)), atol=1e-4)


def test_padding_is_no_example():
    rows = sets(2, 3, torch.tensor([[0, -1, 2]]).expand(2, -1))
    padded = torch.cat([rows, torch.zeros(2, 4, SIZE)], 1)
    encode = encoder()
    assert torch.allclose(encode(rows.flatten(1)), encode(padded.flatten(1)), atol=1e-6)


def test_sets_without_any_class_and_of_one_example_have_finite_vectors_and_gradients():
    encode = encoder()
    vectors = torch.cat([encode(sets(2, 1).flatten(1)), encode(sets(2, 40).flatten(1))])
    vectors.square().sum().backward()
    assert torch.isfinite(vectors).all()
    assert all(torch.isfinite(each.grad).all() for each in encode.parameters())


def test_examples_are_told_or_read_as_settings():
    """What is told lies within the embedding; what is read is all that the embedding is made of."""
    torch.manual_seed(0)
    rows = example_rows(torch.rand(3, 5, 4), torch.randint(2, (3, 5)), 2).flatten(1)
    asked = ConditionConfig(kind="examples", counts=(1,), classes=2, features=3)
    telling = ConditionEncoder(asked, row_size(4, 2), 8)
    assert torch.equal(telling(rows)[:, :3], telling.told)
    reading = ConditionEncoder(asked.model_copy(update={"read": True}), row_size(4, 2), 8)
    read = reading.reader(rows)
    assert read.shape == (3, 3) and torch.equal(reading(rows), reading(read)) and reading.told is None
