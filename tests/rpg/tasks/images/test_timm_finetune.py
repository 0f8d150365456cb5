from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rpg.config import Config
from rpg.experiments.single import evaluate_run
from rpg.experiments.sweep import load_sweep
from rpg.tasks import TimmFinetuneConfig, build_task
from rpg.tasks.images.timm_finetune import last_norms
from rpg.training.loop import train
from tokenization.checkpoint.checkpoint import read_state_dict
from tokenization.errors import InputError

SWEEP = Path(__file__).parents[4] / "configs" / "sweeps" / "pdiff-networks.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of two classes: dark and bright."""
    root = tmp_path_factory.mktemp("finetune")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, level in (("bright", 200), ("dark", 40)):
            (root / "data" / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = (level + random.integers(-30, 30, (20, 20, 3))).astype("uint8")
                Image.fromarray(pixels).save(root / "data" / split / label / f"{index}.png")
    return root


def config_of(folder: Path, **changes) -> TimmFinetuneConfig:
    settings = {
        "network": "resnet10t", "pretrained": False, "data": str(folder / "data"), "image_size": 32, "steps": 5,
        "base": str(folder / "base.safetensors"), "train_epochs": 8, "batch_size": 8, "finetune_learning_rate": 1e-2,
    }  # fmt: skip
    return TimmFinetuneConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def zoo(folder):
    return build_task(config_of(folder)).collect(folder / "zoo")


def test_the_zoo_holds_the_last_two_norm_layers_after_each_step(folder, zoo):
    task = build_task(config_of(folder))
    names = last_norms(task.build(), 2)
    assert len(names) == 4 and [entry.step for entry in zoo.entries] == [1, 2, 3, 4, 5]
    assert set(zoo.state_dict(0)) == set(names)
    assert not torch.equal(zoo.state_dict(0)[names[0]], zoo.state_dict(4)[names[0]])
    assert len(task.collect(folder / "zoo")) == 5


def test_predictions_are_those_of_the_base_network_with_the_tensors_in_it(folder, zoo):
    task = build_task(config_of(folder))
    predictions, labels = task.predict([zoo.state_dict(4)]), task.labels()
    assert predictions.shape == (1, 12) and labels.tolist() == [0] * 6 + [1] * 6
    network = task.build().eval()
    network.load_state_dict({**read_state_dict(folder / "base.safetensors"), **zoo.state_dict(4)})
    with torch.no_grad():
        expected = torch.cat([network(images).argmax(1) for images, _ in task.batches("test")])
    assert torch.equal(predictions[0], expected)
    assert (predictions == labels).double().mean() > 0.7


def test_pdiff_generates_them(folder, zoo):
    stage = {"steps": 5, "learning_rate": 1e-3, "batch_size": 5}
    tree = {
        "run": str(folder / "run"), "zoo": str(zoo.path), "tokens": {"flatten": "flat"},
        "model": {"kind": "pdiff", "autoencoder": stage, "latent": stage}, "generate": {"sampler": "ddim", "steps": 3},
        "evaluate": {"num": 3, "num_baseline": 2, "noise": (0.1,)}, "task": config_of(folder).model_dump(),
    }  # fmt: skip
    config = Config.parse(tree, "test")
    train(config)
    assert evaluate_run(config.run).generated.count == 3


def test_missing_data_and_networks_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"task.data .*nowhere does not hold"):
        build_task(config_of(folder, data=str(tmp_path / "nowhere"))).collect(tmp_path / "zoo")
    with pytest.raises(InputError, match="a timm model"):
        build_task(config_of(folder, network="resnet0")).build()


def test_the_papers_networks_and_data_sets_have_configurations():
    import timm

    experiments = load_sweep(SWEEP)[1]
    assert len(experiments) == 42
    for each in experiments:
        task = each.config.task
        assert isinstance(task, TimmFinetuneConfig) and timm.is_model(task.network)
        assert each.config.run.endswith(each.name)
