"""How far a request is: planted codes whose distances and errors are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rpg.generation.generator import Generator
from rpg.generation.request import Distance, KnownRange
from tests.test_formats import documented
from tokenization.errors import InputError

SEEN = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [6.0, 0.0]])  # neighbours are 2 apart: the unit


def requests(*places: float) -> torch.Tensor:
    """One part each, so far above the seen code at 0."""
    return torch.tensor([[[0.0, place]] for place in places])


def test_distances_and_errors_are_those_that_were_planted() -> None:
    known = KnownRange.measured(SEEN, requests(0, 1, 2, 4), torch.tensor([0.1, 0.1, 0.2, 0.4]))
    assert known.unit == 2 and known.distances.tolist() == [0, 0.5, 1, 2]
    found = known.of(requests(0, 2, 3, 4.2))
    assert [each.distance for each in found] == pytest.approx([0, 1, 1.5, 2.1])
    assert [each.error for each in found[:3]] == pytest.approx([0.1, 0.2, 0.3])
    assert found[3].error is None and found[3].known_to == 2


def test_errors_that_happen_to_fall_with_distance_are_averaged() -> None:
    known = KnownRange.measured(SEEN, requests(0, 2, 4), torch.tensor([0.1, 0.5, 0.3]))
    assert [each.error for each in known.of(requests(2, 4))] == pytest.approx([0.4, 0.4])


def test_the_farthest_part_of_a_request_counts_and_padding_does_not() -> None:
    known = KnownRange.measured(SEEN, requests(0, 8), torch.zeros(2))
    parts = torch.tensor([[[0.0, 1.0], [4.0, 3.0]], [[2.0, 1.0], [torch.nan, torch.nan]]])
    assert known.raw(parts).tolist() == [1.5, 0.5]


def test_what_is_said(tmp_path: Path) -> None:
    assert str(Distance(0.5, 2.0, 0.123)) == "distance from what was learned: 0.5; expected error 12.3%"
    assert str(Distance(3.0, 2.0, None)) == (
        "warning: the request is 3 from what was learned, and the error is known to 2 only: check these networks on "
        "data of your own"
    )
    (tmp_path / "known_range.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"known_range.safetensors could not be read .*; copy the generator's folder"):
        KnownRange.load(tmp_path / "known_range.safetensors")


def test_a_trained_generator_knows_its_range_and_files_name_the_distance(example_runs: Path, rpg) -> None:
    run = example_runs / "examples"
    generator = Generator.from_pretrained(run)
    assert generator.known is not None and len(generator.known.errors) == 2 + 200  # the zoo's, and fresh ones
    assert generator.known.errors.mean() > 0.5  # hardly trained
    with safe_open(run / "generator" / "known_range.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(documented("known_range.safetensors"))
    rng = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.rand(3, 64, generator=rng), torch.zeros(3, 10), torch.ones(3, 1)], 1)
    far = rows * torch.tensor([30.0] * 64 + [1.0] * 11)  # images thirty times as bright as any
    near, beyond = generator.distance(rows), generator.distance(far)
    assert near is not None and beyond is not None and beyond.distance > 3 * near.distance
    assert beyond.error is None and beyond.distance > beyond.known_to
    made = generator.generate(2, condition=far, output=example_runs / "far")
    with safe_open(made[1], "pt") as file:
        provenance = json.loads(file.metadata()["rpg.provenance"])
    assert provenance["distance"] == {"distance": beyond.distance, "known_to": beyond.known_to, "error": None}
    np.savez(example_runs / "far.npz", X=far[:, :64].numpy())
    out = rpg("generate", run, "--examples", example_runs / "far.npz", "--output", example_runs / "out")[1]
    (said,) = [line for line in out.splitlines() if "what was learned" in line]
    assert said == str(beyond)
    (single,) = generator.generate(1, condition=rows)
    again = Generator.from_pretrained(run)
    again.known = None
    assert again.distance(rows) is None
    assert torch.equal(again.generate(1, condition=rows)[0]["1.weight"], single["1.weight"])


def test_settings_are_near_where_they_were_seen(example_runs: Path) -> None:
    zoo_run = Generator.from_pretrained(example_runs / "examples_zoo")
    assert zoo_run.known is not None and len(zoo_run.known.errors) == 5 * 2  # no fresh ones where none were drawn
