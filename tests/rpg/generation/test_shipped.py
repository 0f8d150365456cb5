"""The generator that comes with the package, and folders of its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rpg.generation.folders import SHIPPED_FOLDER, find_folder, which_generator
from rpg.generation.generator import Generator
from rpg.tasks import build_task
from rpg.tasks.sensors.task import SensorsTask
from rpg.tasks.side_by_side import stack
from scripts import ship
from tokenization.errors import InputError


def test_it_needs_no_zoo_and_is_far_better_than_one_fixed_network() -> None:
    generator = Generator.from_pretrained("sensors")
    assert generator.known is not None and generator.folder == SHIPPED_FOLDER / "sensors"
    task = build_task(generator.config.task)  # type: ignore[arg-type]
    assert isinstance(task, SensorsTask)
    settings = task.draw_tasks(20, torch.Generator().manual_seed(7))
    own = stack(generator.generate(20, condition=settings))  # type: ignore[arg-type]
    upright = stack(generator.generate(20, condition={}))  # type: ignore[arg-type]
    assert task.accuracies(own, settings).mean() > 0.88
    assert task.accuracies(upright, settings).mean() < 0.5
    expected = [generator.distance(each.tolist()) for each in settings]
    errors = torch.tensor([each.error for each in expected if each is not None and each.error is not None])
    assert len(errors) >= 18 and errors.mean().item() == pytest.approx(0.06, abs=0.03)


def test_a_folder_of_its_name_goes_before_it_only_if_it_holds_a_generator(
    example_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rpg
) -> None:
    monkeypatch.chdir(tmp_path)
    assert which_generator("sensors") == "sensors is the generator that comes with rpg"
    Path("sensors").mkdir()
    said = "sensors is the generator that comes with rpg (the folder sensors here holds none)"
    assert which_generator("sensors") == said and find_folder("sensors") == SHIPPED_FOLDER / "sensors"
    code, out, _ = rpg("generate", "sensors", "--setting", "angle=137")
    assert code == 0 and said in out and Path("generated").is_dir() and not any(Path("sensors").iterdir())
    Path("sensors").rmdir()
    Path("sensors").symlink_to(example_runs / "examples")
    assert find_folder("sensors") == Path("sensors/generator")
    assert find_folder("rpg:sensors") == SHIPPED_FOLDER / "sensors"
    said = "sensors is the folder here; rpg:sensors is the generator that comes with rpg"
    assert which_generator("sensors") == said and which_generator("runs/other") is None
    code, out, err = rpg("generate", "sensors", "--setting", "angle=137")
    assert code == 2 and said in out and "--setting 'angle=137' needs a generator of settings" in err


def test_shipping_leaves_places_and_times_out_and_refuses_what_is_large(
    example_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ship, "MOST_BYTES", 5_000_000)
    folder = ship.ship(str(example_runs / "examples"), "sensors", tmp_path)
    written = "".join((folder / name).read_text() for name in ("config.yaml", "README.md"))
    assert str(example_runs) not in written and "seconds" not in Generator.from_pretrained(folder).facts
    assert (folder / "known_range.safetensors").is_file()
    monkeypatch.setattr(ship, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match=r"bytes; train a smaller generator, the package takes 1,000"):
        ship.ship(str(example_runs / "examples"), "sensors", tmp_path)
