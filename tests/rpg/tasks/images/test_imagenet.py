"""Zoos of whole timm networks from a folder of images, which the tests make."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rpg.tasks import ImageNetConfig, build_task, task_of
from rpg.tasks.collecting import SavedTraining
from rpg.tasks.stepwise import TRAINING
from tokenization.checkpoint.checkpoint import save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of three classes by folder, as ImageNet lies on disk: red, green and blue ones."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for channel in range(3):
            (root / split / f"n{channel}").mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 60, (40, 50, 3))
                pixels[..., channel] += 150
                Image.fromarray(pixels.astype("uint8")).save(root / split / f"n{channel}" / f"{index}.jpg")
    return root


def config_of(folder: Path, **changes) -> ImageNetConfig:
    settings = {
        "network": "resnet10t", "pretrained": False, "data": str(folder), "num_classes": 3, "image_size": 32,
        "checkpoints": 4, "epochs": 4, "batch_size": 8, "learning_rate": 2e-3,
    }  # fmt: skip
    return ImageNetConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def zoo(folder, tmp_path_factory):
    return build_task(config_of(folder)).collect(tmp_path_factory.mktemp("zoo"))


def test_the_zoo_holds_whole_networks_at_even_steps(folder, zoo):
    task = build_task(config_of(folder))
    assert [entry.step for entry in zoo.entries] == [3, 6, 9, 12]  # 24 images are three batches an epoch
    for index in range(4):
        task.build().load_state_dict(zoo.state_dict(index), strict=True)
    first, last = zoo.state_dict(0), zoo.state_dict(3)
    assert all(not torch.equal(first[name], last[name]) for name, value in first.items() if value.numel() > 1)
    assert zoo.entries[3].metrics["training_loss"] < zoo.entries[0].metrics["training_loss"]


@pytest.mark.parametrize("saves", [1, 2])
def test_a_killed_collection_goes_on_from_its_last_checkpoint_to_the_same_bits(
    folder, zoo, tmp_path, monkeypatch, saves
):
    """Killed before its last state is saved, or after: the first checkpoint is step 3, the second step 6."""
    real, saved = SavedTraining.save, []

    def dying(self, step):
        saved.append(step)
        if len(saved) == 2 and saves == 1:
            raise KeyboardInterrupt
        real(self, step)
        if len(saved) == saves:
            raise KeyboardInterrupt

    task = build_task(config_of(folder))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SavedTraining, "save", dying)
        task.collect(tmp_path / "zoo")
    assert (tmp_path / "zoo" / TRAINING).is_file()
    read = []
    dataset = task.dataset("train")
    load = dataset.loader
    monkeypatch.setattr(dataset, "loader", lambda path: read.append(path) or load(path))
    again = task.collect(tmp_path / "zoo")
    assert [entry.sha256 for entry in again.entries] == [entry.sha256 for entry in zoo.entries]
    assert len(read) == 8 * (12 - 3 * saves)  # of what had been trained on no image is read again
    assert not (tmp_path / "zoo" / TRAINING).exists() and len(task.collect(tmp_path / "zoo")) == 4


def test_a_wrong_image_size_is_one_line(folder, tmp_path):
    task = build_task(config_of(folder, network="test_vit", image_size=100))
    with pytest.raises(
        InputError, match=r"task.image_size is 100, which test_vit does not take .*its own is 160"
    ) as caught:
        task.collect(tmp_path / "zoo")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="task.image_size is 100"):
        task.predict([{}])


def test_classes_must_be_the_same_in_both_folders(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "n1")
    with pytest.raises(InputError, match="2 classes to score on and 3 to train on"):
        build_task(config_of(tmp_path / "data")).labels()


def test_predictions_are_those_of_the_network_and_its_training_shows(folder, zoo):
    task = task_of(zoo)
    labels = task.labels()
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    state_dict = zoo.state_dict(3)
    predictions = task.predict([state_dict, {name: torch.nan * v for name, v in state_dict.items()}])
    network = task.build().eval()
    network.load_state_dict(state_dict)
    images = torch.stack([image for image, _ in task.dataset("test")])
    with torch.no_grad():
        assert torch.equal(predictions[0], network(images).argmax(1))
    assert not predictions[1].any() and images.shape == (12, 3, 32, 32)
    with pytest.raises(InputError, match="network 0"):
        task.predict([{}])


def test_fine_tuning_starts_from_a_file(folder, tmp_path):
    network = build_task(config_of(folder, seed=5)).build()
    save_checkpoint(tmp_path / "start.safetensors", network.state_dict())
    started = build_task(config_of(folder, weights=str(tmp_path / "start.safetensors"))).base_network()
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in started.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"network": "resnet11"}, "a timm model"),
        ({"num_classes": 4}, "num_classes"),
        ({"checkpoints": 13}, "task.checkpoints"),
        ({"data": "nowhere"}, "task.data"),
        ({"weights": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_what_is_missing_is_named_in_one_line(folder, tmp_path, changes, expected):
    with pytest.raises(InputError, match=expected) as caught:
        build_task(config_of(folder, **changes)).collect(tmp_path / "zoo")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("harm", "workers"), [("vanishes", 0), pytest.param("is no image", 2, marks=pytest.mark.slow)])
def test_an_image_that_is_lost_is_named_and_the_zoo_goes_on(folder, zoo, tmp_path, harm, workers):
    """After the first checkpoint; workers change no bit."""
    data, path = tmp_path / "data", tmp_path / "data" / "train" / "n1" / "5.jpg"
    shutil.copytree(folder, data, copy_function=shutil.copy2)
    whole = path.read_bytes()

    def lose(done: int, total: int) -> None:
        if done == 4:
            path.unlink() if harm == "vanishes" else path.write_bytes(b"text")

    task = build_task(config_of(data, workers=workers))
    with pytest.raises(InputError, match=r"n1/5\.jpg cannot be read \(.*\); replace it or take it out") as caught:
        task.collect(tmp_path / "zoo", progress=lose)
    assert "\n" not in str(caught.value) and 1 <= len(Zoo.open(tmp_path / "zoo")) < 4
    path.write_bytes(whole)
    again = build_task(config_of(data, workers=workers)).collect(tmp_path / "zoo")
    assert [entry.sha256 for entry in again.entries] == [entry.sha256 for entry in zoo.entries]


def test_an_image_that_is_lost_before_scoring_is_named(folder, zoo, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "val" / "n2" / "1.jpg").write_bytes(b"text")
    with pytest.raises(InputError, match=r"n2/1\.jpg cannot be read"):
        build_task(config_of(tmp_path / "data")).predict([zoo.state_dict(0)])
