from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rpg.evaluation import field_measures as sampled
from rpg.evaluation.judges import TaskScorer, less_is_better
from rpg.experiments.evaluating import Judge, evaluate_run
from rpg.experiments.single import collect
from rpg.tasks import build_task
from rpg.training.loop import train
from tests.conftest import small_config
from tests.reports import checked_report
from tokenization.errors import InputError


def task_of(folder: Path, **changes):
    settings = {
        "name": "diffusion_unet", "channels": (8,), "groups": 4, "train_steps": 30, "batch_size": 32, "steps": 2,
        "samples": 60, "sample_steps": 4, "learning_rate": 1e-2, "base": str(folder / "base.safetensors"),
    }  # fmt: skip
    return build_task({**settings, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    task = task_of(folder)
    return task, task.collect(folder / "zoo").state_dict(1)


def test_the_loss_is_that_of_predicted_noise(trained):
    """An untrained network that says 0 has a loss of 1, the noise's own square; a trained one has less."""
    task, weights = trained
    batch, network = next(task.batches_after(7)), task.build()
    assert batch.shape == (32, 1, 8, 8) and batch.aminmax() == (-1.0, 1.0)
    silent = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    network.load_state_dict(silent)
    assert task.loss(network, batch, 3).item() == pytest.approx(1.0, abs=0.05)
    network.load_state_dict(weights)
    assert task.loss(network, batch, 3).item() < 0.8
    assert torch.equal(task.loss(network, batch, 3), task.loss(network, batch, 3))


def test_the_pipeline_of_diffusers_draws_from_a_checkpoint(trained):
    from diffusers import DDIMPipeline, UNet2DModel

    task, weights = trained
    unet = task.build()
    assert isinstance(unet, UNet2DModel)
    unet.load_state_dict(weights)
    pipeline = DDIMPipeline(unet, task.scheduler("DDIMScheduler"))
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    drawn = pipeline(batch_size=3, generator=rng, num_inference_steps=4, output_type="np").images
    assert drawn.shape == (3, 8, 8, 1) and drawn.min() >= 0 and drawn.max() <= 1


def test_a_zoo_serves_whatever_is_drawn_from_it(trained, tmp_path):
    base = trained[0].config.base
    assert len(task_of(tmp_path, base=base).collect(tmp_path / "zoo", limit=1)) == 1
    assert len(task_of(tmp_path, base=base, samples=8, sample_steps=2).collect(tmp_path / "zoo")) == 2
    with pytest.raises(InputError, match=r"task\.average"):
        task_of(tmp_path, base=base, average=0.5).collect(tmp_path / "zoo")


def test_samples_come_from_the_same_noise_and_a_broken_network_draws_black(trained):
    task, weights = trained
    drawn = task.samples(weights, 5)
    assert torch.equal(drawn, task.samples(weights, 5)) and drawn.std() > 0.1
    broken = {name: torch.full_like(value, torch.nan) for name, value in weights.items()}
    assert not task.samples(broken, 5).any()


def test_figures_are_the_measures_of_fields(trained, monkeypatch):
    task, weights = trained
    monkeypatch.setattr(sampled, "letter_features", lambda size, channels: lambda images: images[:, :6])
    scorer = TaskScorer(task, "validation")
    figures = scorer(weights, None, "a network")
    assert list(figures)[:3] == ["one_nna", "coverage", "mmd"] and all(value >= 0 for value in figures.values())
    assert less_is_better(figures) == {"one_nna", "mmd", "frechet"}
    held_out = task.images("validation")
    monkeypatch.setattr(type(task), "samples", lambda self, network: sampled.evenly(held_out, 60))
    perfect = scorer(weights, None, "a network")
    assert perfect["mmd"] == pytest.approx(0, abs=1e-3) and perfect["coverage"] == 1.0
    assert perfect["frechet"] == pytest.approx(0, abs=1e-3)
    with pytest.raises(InputError, match=r"fewer than task\.samples"):
        monkeypatch.setattr(type(task), "samples", lambda self, network: torch.zeros(251, 1, 8, 8))
        scorer(weights, None, "a network")


def test_channels_that_cannot_be_grouped_are_named(tmp_path):
    with pytest.raises(InputError, match=r"task\.channels"):
        task_of(tmp_path, channels=(9,)).build()


def test_a_run_is_scored_by_samples_and_shows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "letter_features", lambda size, channels: lambda images: images[:, :6])
    task = {
        "name": "diffusion_unet", "channels": [8], "groups": 4, "train_steps": 5, "steps": 6, "hold_out": 3,
        "samples": 20, "sample_steps": 2, "average": 0.5, "base": str(tmp_path / "base.safetensors"),
    }  # fmt: skip
    config = small_config(
        tmp_path, task=task, evaluate={"num": 2, "num_baseline": 2, "noise": [0.05], "baselines": ["noise"]},
        tokens={"size": 64},
    )  # fmt: skip
    collect(config)
    train(config)
    evaluate_run(config.run, Judge())
    result = checked_report(tmp_path / "run", "networks")
    assert list(result.kinds) == ["original", "generated", "held_out", "average", "noise_0.05"]
    assert result.first == "one_nna" and result.better["one_nna"] == "less"
    assert [result.kinds[name].count for name in ("original", "held_out", "generated")] == [4, 2, 2]
    height, width = sampled.ROWS * 9 + 1, 4 * (sampled.COLUMNS * 9 + 1) + 3 * sampled.GAP
    assert Image.open(tmp_path / "run" / "samples.png").size == (sampled.SCALE * width, sampled.SCALE * height)
