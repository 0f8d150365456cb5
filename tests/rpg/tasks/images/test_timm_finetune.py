from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from rpg.config import Config
from rpg.experiments.evaluating import evaluate_run
from rpg.experiments.sweep import load_sweep
from rpg.planning.zoo_summary import find_zoo_summary
from rpg.tasks import TimmFinetuneConfig, build_task
from rpg.tasks.stepwise import last_norms
from rpg.training.loop import train
from tokenization.checkpoint.checkpoint import read_state_dict
from tokenization.errors import InputError

SWEEP = Path(__file__).parents[4] / "configs" / "sweeps" / "pdiff-networks.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of two classes: dark and bright."""
    root = tmp_path_factory.mktemp("finetune")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
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


@pytest.mark.parametrize("network", ["resnet10t", "vit_tiny_patch16_224"])  # of two means, deviations and crops
def test_images_are_prepared_as_timm_does_for_the_network(folder, network):
    task = build_task(config_of(folder, network=network, image_size=48))
    prepared = timm.data.resolve_data_config({}, model=timm.create_model(network)) | {"input_size": (3, 48, 48)}
    path, label = task.dataset("test").samples[0]
    expected = timm.data.create_transform(**prepared)(Image.open(path))
    image, found = task.dataset("test")[0]
    assert found == label and torch.equal(image, expected)
    mean, deviation = (torch.tensor(prepared[name])[:, None, None] for name in ("mean", "std"))
    images = torch.cat([images for images, _ in itertools.islice(task.batches_after(0), 3)])
    assert images.shape == (24, 3, 48, 48)
    assert ((images * deviation + mean) > -1e-5).all() and ((images * deviation + mean) < 1 + 1e-5).all()


def test_training_images_are_altered_alike_in_any_process_and_differently_in_every_epoch(folder):
    first, second = (build_task(config_of(folder, workers=workers)) for workers in (0, 2))
    epochs = [[images for images, _ in itertools.islice(task.batches_after(3 * epoch), 3)] for task, epoch in
              ((first, 0), (second, 0), (first, 1))]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert not torch.equal(torch.cat(epochs[0]).sort(0).values, torch.cat(epochs[2]).sort(0).values)


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


@pytest.mark.slow
def test_pdiff_generates_them(folder, zoo):
    stage = {"steps": 5, "learning_rate": 1e-3, "batch_size": 5}
    tree = {
        "run": str(folder / "run"), "zoo": str(zoo.path), "tokens": {"flatten": "flat"},
        "model": {"kind": "pdiff", "autoencoder": stage, "latent": stage}, "generate": {"sampler": "ddim", "steps": 3},
        "evaluate": {"num": 3, "num_baseline": 2, "noise": (0.1,)}, "task": config_of(folder).model_dump(),
    }  # fmt: skip
    config = Config.parse(tree, "test")
    train(config)
    assert evaluate_run(config.run).kinds["generated"].count == 3


OWN = """
from torch import nn


class Small(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.body(images).flatten(1))


def no_module():
    return 3
"""


def test_a_network_of_ones_own_is_fine_tuned_and_scored(folder, tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    settings = {
        "network_arguments": {"width": 8, "num_classes": 2},
        "base": str(tmp_path / "base.safetensors"),
        "num_norms": 1,
    }
    for network in ("own_networks:Small", "own_networks.py:Small"):
        config = config_of(folder, network=network, learning_rate=3e-2, **settings)
        task = build_task(config)
        collected = task.collect(tmp_path / f"zoo-of-{network}".replace(":", "-"))
        assert set(collected.state_dict(0)) == {"body.1.weight", "body.1.bias"} and len(collected) == 5
        right = (task.predict([collected.state_dict(4)]) == task.labels()).double().mean()
        assert right > 0.7


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ("own_networks:Small", {}, "does not take task.network_arguments .*width"),
        ("own_networks:Small", {"width": 8, "num_classes": 5}, r"gives \(1, 5\) for one image, not 2 logits"),
        ("own_networks:no_module", {}, "makes a int; it has to make a torch module"),
        ("own_networks:Missing", {}, "has no function 'Missing'"),
        ("no_such_module:Small", {}, "task.network: no_such_module cannot be imported"),
    ],
)
def test_mistakes_in_networks_of_ones_own(folder, tmp_path, monkeypatch, network, arguments, message):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    config = config_of(folder, network=network, network_arguments=arguments, base=str(tmp_path / "base"))
    with pytest.raises(InputError, match=message):
        build_task(config).collect(tmp_path / "zoo")


def test_missing_data_and_networks_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"task.data .*nowhere does not hold"):
        build_task(config_of(folder, data=str(tmp_path / "nowhere"))).collect(tmp_path / "zoo")
    with pytest.raises(InputError, match="a timm model"):
        build_task(config_of(folder, network="resnet0")).build()


def test_the_papers_networks_and_data_sets_have_configurations():
    experiments = load_sweep(SWEEP)[1]
    assert len(experiments) == 42
    for each in experiments:
        task = each.config.task
        assert isinstance(task, TimmFinetuneConfig) and timm.is_model(task.network)
        assert each.config.run.endswith(each.name)
        rates = (task.learning_rate, task.finetune_learning_rate, task.weight_decay, task.batch_size)
        assert rates == (5e-4, 3e-2, 5e-4, 128) and task.train_epochs in (0, 10)  # tables 5a and 5b


def test_a_plan_fetches_no_weights(folder, tmp_path):
    """Before there is a zoo, the network's structure alone is asked for."""
    task = config_of(folder, pretrained=True, base=str(tmp_path / "none.safetensors")).model_dump(mode="json")
    config = Config.parse({"run": "run", "zoo": str(tmp_path / "zoo"), "task": task | {"name": "finetune"}}, "test")
    assert find_zoo_summary(config).layout.num_values > 0
