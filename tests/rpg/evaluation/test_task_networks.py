import pytest
import torch

from rpg.evaluation import task_networks
from rpg.evaluation.task_networks import TaskNetworks, in_parts
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint


@pytest.fixture
def networks(tmp_path):
    """Five checkpoints of 3 · 5 values and a counter, and their values [5, 15]."""
    rng = torch.Generator().manual_seed(0)
    values, opened = torch.randn(5, 15, generator=rng), []
    for number, row in enumerate(values):
        path = tmp_path / f"{number}.safetensors"
        save_checkpoint(path, {"a": row[:12].reshape(3, 4), "b": row[12:].clone(), "count": torch.tensor(7)})
        opened.append(Checkpoint.open(path))
    return TaskNetworks(torch.eye(5).long(), opened), values


@pytest.fixture(params=[1 << 29, 1], ids=["together", "one by one"])
def part_bytes(request, monkeypatch):
    monkeypatch.setattr(task_networks, "PART_BYTES", request.param)
    monkeypatch.setattr(task_networks, "BLOCK", 5)
    return request.param


def joined(parts):
    parts = list(parts)
    return torch.cat([torch.cat([part["a"].flatten(1), part["b"]], 1) for part in parts]), len(parts)


def test_parts_are_the_networks_whatever_fits(networks, part_bytes):
    ours, values = networks
    rows = torch.tensor([3, 0, 3])
    for found, expected in ((ours.parts(), values), (ours.parts(rows), values[rows])):
        found, num = joined(found)
        assert torch.equal(found, expected) and num == (1 if part_bytes > 1 else len(expected))
    again, num = joined(in_parts(each.state_dict() for each in ours.checkpoints))
    assert torch.equal(again, values) and num == (1 if part_bytes > 1 else 5)


def test_mixtures_products_and_spread_are_those_of_vectors(networks, part_bytes):
    ours, values = networks
    mixture = torch.rand(2, 5, dtype=torch.float64)
    made = list(ours.mixed(mixture))
    assert torch.allclose(joined(made)[0], (mixture @ values.double()).float(), atol=1e-6)
    assert all(part["count"].eq(7).all() for part in made)
    other = ours.select([1, 4])
    expected = (values - values[1]) @ (values[[1, 4]] - values[1]).T
    assert torch.allclose(ours.products(other), expected.double(), atol=1e-5)
    assert ours.spread() == pytest.approx(values.std(0).square().mean().sqrt().item(), rel=1e-6)
    assert torch.equal(ours.join(other).bits, torch.cat([ours.bits, ours.bits[[1, 4]]]))
