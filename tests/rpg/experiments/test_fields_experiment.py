"""The experiment on fields, small: a generated field is one function at any resolution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rpg.config import Config, overridden
from rpg.experiments.single import collect
from rpg.generation.generator import Generator
from rpg.labs.fields import experiment, pictures
from rpg.labs.fields.experiment import evaluate_fields, fields_task
from rpg.labs.fields.pictures import render_files
from rpg.tasks.side_by_side import stack
from rpg.training.data import training_entries
from rpg.training.loop import train
from tests.reports import checked_report
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A generator of fields of 24 images of two classes, discs and bars, that learned next to nothing."""
    folder = tmp_path_factory.mktemp("fields")
    rows = torch.linspace(-1, 1, 8)
    rng = torch.Generator().manual_seed(0)
    for name in ("bar", "disc"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(24):
            y, x = torch.rand(2, generator=rng) - 0.5
            distance = (rows[:, None] - y).abs() if name == "bar" else torch.hypot(rows[:, None] - y, rows[None] - x)
            ink = (255 * torch.sigmoid(12 * (0.4 - distance))).expand(8, 8).byte().numpy()
            Image.fromarray(ink).save(folder / "images" / name / f"{number:02d}.png")
    config = Config.load(
        "configs/fields.yaml",
        [
            f"run={folder / 'run'}", f"zoo={folder / 'zoo'}", f"task.data={folder / 'images'}", "task.altered=1",
            "task.hidden=16", "model.state.width=12", "model.state.prior.width=32", "model.state.prior.depth=1",
            "model.state.prior.steps=8", "model.state.neighbours=5", "model.state.prior.start=0.5", "train.steps=20",
            "train.log_every=10", "train.splits=[train, validation, altered_train, altered_validation]",
        ],
    )  # fmt: skip
    collect(config)
    train(config)
    return folder / "run"


def test_a_generated_field_is_one_function_at_two_resolutions(run, tmp_path):
    generator = Generator.from_pretrained(run)
    (file,) = generator.generate(1, seed=3, condition=[1.0], output=run / "generated")
    task = fields_task(generator.config)
    field = Checkpoint.open(file).state_dict()
    coarse, fine = task.sample([field], 8)[0], task.sample([field], 24)[0]
    # Every third pixel of the fine image, from the second on, has the centre of a coarse one.
    assert torch.allclose(fine[:, 1::3, 1::3], coarse, atol=1e-5)
    (picture,) = render_files([file], 24, tmp_path)
    drawn = torch.frombuffer(bytearray(Image.open(picture).tobytes()), dtype=torch.uint8).view(24, 24) / 255
    assert torch.allclose(drawn, 1 - fine[0].clamp(0, 1), atol=0.5 / 255 + 1e-6)


def test_solid_shapes_are_generated_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "NUM_SETS", 1)
    monkeypatch.setattr(pictures, "FINE", 20)
    monkeypatch.setattr(pictures, "PER_CLASS", 2)
    config = Config.load(
        "configs/fields3d.yaml",
        [
            f"run={tmp_path / 'run'}", f"zoo={tmp_path / 'zoo'}", "task.num_shapes=96", "task.image_size=8",
            "task.hidden=16", "model.state.width=12", "train.steps=20", "train.log_every=10", "task.held_out=0.2",
        ],
    )  # fmt: skip
    collect(config)
    train(config)
    report = evaluate_fields(config.run)
    for name in ("generated", "average", "midpoint", "covariance_gaussian", "neighbourhood", "original"):
        assert {"one_nna", "coverage", "class_accuracy", "nearest"} <= report.kinds[name].metrics.keys()
    assert report.mean("original", "nearest") == 0
    for name in ("fine", "nearest"):
        assert min(Image.open(tmp_path / "run" / f"{name}.png").size) > 16
    generator = Generator.from_pretrained(config.run)
    (file,) = generator.generate(1, seed=3, condition=[1.0], output=tmp_path / "new")
    # One function at two resolutions: every third point of the fine grid, from the second on, is one of the coarse.
    task, field = fields_task(generator.config), Checkpoint.open(file).state_dict()
    assert torch.allclose(task.sample([field], 24)[0, 0, 1::3, 1::3, 1::3], task.sample([field], 8)[0, 0], atol=1e-4)
    shape = Zoo.open(config.zoo).file(1)  # a dumbbell
    picture, mesh = render_files([shape], 24, tmp_path / "new")
    assert (picture.suffix, mesh.suffix) == (".png", ".ply") and mesh.read_bytes().startswith(b"ply")
    assert Image.open(picture).size == (24, 24)


def test_codes_of_what_is_shown_lie_among_neighbours_of_the_class(run, tmp_path):
    """Codes of a class decode to fields of it, and a stored one to what its checkpoint shows."""
    generator = Generator.from_pretrained(run)
    task, zoo = fields_task(generator.config), Zoo.open(generator.config.zoo)
    wanted = torch.arange(2).repeat(20)
    made = generator.generate(40, seed=0, condition=wanted[:, None].float(), state="density")
    shown = task.sample(made, 8).flatten(1)
    near = torch.cdist(shown, task.data.values.flatten(1)).argmin(1)
    assert (task.data.labels[near] == wanted).double().mean() > 0.9
    table = generator.network.state
    known = generator.network.known(table.weight[:4], None, torch.arange(generator.layout.num_tokens))
    decoded = task.shown(generator.layout.decode_batch(known, constants=True))
    learned = training_entries(zoo, generator.config.train.splits)[:4]
    own = task.shown(stack([zoo.state_dict(i) for i in learned]))
    assert (decoded - own).norm() < 0.4 * (own - own.mean(0)).norm()  # twelve numbers for 64 pixels


def test_the_experiment_leaves_figures_and_pictures(run, monkeypatch):
    monkeypatch.setattr(experiment, "NUM_SETS", 1)
    monkeypatch.setattr("rpg.evaluation.field_measures.STEPS", 50)  # of the classifier of letters
    report = evaluate_fields(run)
    assert checked_report(run, "fields", "fields") == report
    assert report.first == "one_nna" and report.kinds["held_out"].count == 12 and "held_out" not in report.rivals()
    for name in ("generated", "average", "midpoint", "coordinate_gaussian", "covariance_gaussian", "original"):
        assert {"one_nna", "coverage", "class_accuracy", "nearest"} <= report.kinds[name].metrics.keys()
    # One field over and over: all its copies are told apart, and it is nearest to nothing but one original.
    assert report.mean("average") >= 0.5 and 0 < report.mean("average", "coverage") < 1 / 4
    assert report.mean("original", "nearest") == 0
    for name in ("classes", "fine", "nearest", "path"):
        assert min(Image.open(run / f"{name}.png").size) > 16


def test_a_run_that_learned_from_it_is_not_scored_on_validation(run):
    with pytest.raises(InputError, match="learns from the validation split.*\\[train,altered_train\\]"):
        evaluate_fields(run, split="validation")


def test_a_field_that_lies_nowhere_needs_a_configuration(run, tmp_path):
    (file,) = Generator.from_pretrained(run).generate(1, condition=[0.0], output=tmp_path)
    with pytest.raises(InputError, match="lies in no run or zoo of fields"):
        render_files([file], 8, None)
    assert render_files([file], 8, None, Config.load("configs/fields.yaml", ["task.hidden=16"]))[0].exists()


def test_only_fields_show_something(run, tmp_path):
    plain = Generator.from_pretrained(run).config.plain()
    config = Config.parse({**plain, "run": str(tmp_path / "run"), "task": {"name": "digits"}}, "test")
    with pytest.raises(
        InputError, match="DigitsTask has no networks that show something; set model.state.shown to false"
    ):
        train(config)
    changed = overridden(config.plain(), ["model.state.shown=false", "train.steps=1"])
    assert train(Config.parse(changed, "test")).is_dir()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.state={of: run, prior: null}", "shown and neighbours need of: code"),
        ("model.state.neighbours=null", "prior.start needs neighbours"),
        ("model.condition.kind=none", "state.neighbours needs condition.kind: class"),
        ("model.state.prior.objective=flow", "churn and start need objective: edm"),
    ],
)
def test_settings_of_codes_that_do_not_go_together_are_refused(setting, said):
    with pytest.raises(InputError, match=said):
        Config.load("configs/fields.yaml", [setting])
