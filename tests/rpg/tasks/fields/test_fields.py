"""Neural fields: what they show, at which resolution, and their zoos."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.func import functional_call, jacrev

from rpg.labs.fields.config import FieldsConfig
from rpg.labs.fields.siren import Siren, evaluate, fit, grid_points, start
from rpg.labs.fields.task import FieldsTask
from rpg.tasks import build_task
from rpg.tasks.side_by_side import unstack
from tokenization.errors import InputError


def images_of(num: int, channels: int, size: int = 6) -> torch.Tensor:
    return torch.rand(num, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_a_start_shows_nothing():
    config = FieldsConfig()
    begin = {name: value[None] for name, value in start(config, 3).items()}
    shown = evaluate(config, begin, grid_points(9, 9))
    assert shown.shape == (1, 81, 3)
    assert torch.allclose(shown, torch.zeros_like(shown), atol=1e-5)


def test_the_start_needs_an_even_number_of_hidden_units():
    with pytest.raises(ValueError, match="even"):
        FieldsConfig(hidden=33)


@pytest.mark.parametrize("channels", [1, 3])
def test_side_by_side_fields_are_the_network(channels):
    config = FieldsConfig(hidden=8)
    fields = fit(config, images_of(3, channels, 4))
    network, points = Siren(config, channels), grid_points(5, 7)
    for shown, state_dict in zip(evaluate(config, fields, points), unstack(fields), strict=True):
        network.load_state_dict(state_dict)
        assert torch.allclose(shown, network(points), atol=1e-5)


@pytest.mark.parametrize(("channels", "grid"), [(1, (3, 3)), (2, (3, 3)), (1, (3, 3, 3)), (2, (9, 9))])
def test_a_step_is_that_of_the_jacobian(channels, grid):
    """The slow twin: the minimum of |y - f - J s|² + damping |s|² over the steps s, by J itself.

    The last grid has more residuals than the network has weights.
    """
    config = FieldsConfig(dimensions=len(grid), data="folder", hidden=8, steps=1, damping=0.3, output_scale=3.0)
    images = torch.rand(1, channels, *grid, generator=torch.Generator().manual_seed(0))
    network, begin, points = Siren(config, channels), start(config, channels), grid_points(*grid)

    def shown(weights):
        return functional_call(network, weights, (points,)).T.flatten()

    jacobian = torch.cat([each.flatten(1) for each in jacrev(shown)(begin).values()], 1)
    rest = images.flatten() - shown(begin)
    gram = jacobian @ jacobian.T + config.damping * torch.eye(len(rest))
    step = jacobian.T @ torch.linalg.solve(gram, rest)
    made = fit(config, images)
    found = torch.cat([(made[name][0] - value).flatten() for name, value in begin.items()])
    assert torch.allclose(found, step, atol=1e-4)


def test_digits_are_shown_by_their_fields():
    task = FieldsTask(FieldsConfig(seed=2))
    images = task.data.values[:64]
    shown = task.sample(unstack(fit(task.config, images)), 8)
    assert float((shown - images).square().mean()) < 1e-6  # 60 dB


def test_a_zoo_of_originals_and_altered_copies(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            values = (torch.rand(5, 7, 3, generator=generator) * 255).byte().numpy()
            Image.fromarray(values).save(tmp_path / "images" / name / f"{number}.png")
    task = build_task({"name": "fields", "data": str(tmp_path / "images"), "image_size": 5, "hidden": 8, "altered": 2})
    assert isinstance(task, FieldsTask)
    zoo = task.collect(tmp_path / "zoo")
    assert zoo.condition is not None and zoo.condition.names == ("cat", "dog", "cat altered", "dog altered")
    unseen = zoo.subset("unseen")
    assert len(zoo) == 12 + 2 * (12 - len(unseen)) and len(unseen) == 3
    assert {zoo.entries[i].step for i in unseen} == {0}
    for entry in zoo.entries:
        assert (entry.condition[0] >= 2) == (entry.step > 0) == entry.split.startswith("altered")
        assert entry.condition[0] % 2 == task.data.labels[entry.run]
    # A zoo that a kill cut short is completed, byte for byte.
    digests = {entry.file: entry.sha256 for entry in zoo.entries}
    lines = (tmp_path / "zoo" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "zoo" / "manifest.jsonl").write_text("".join(lines[:7]))
    assert {entry.file: entry.sha256 for entry in task.collect(tmp_path / "zoo").entries} == digests


def test_a_folder_without_images_is_a_mistake(tmp_path):
    with pytest.raises(InputError, match="holds no image files"):
        FieldsTask(FieldsConfig(data=str(tmp_path))).data  # noqa: B018
