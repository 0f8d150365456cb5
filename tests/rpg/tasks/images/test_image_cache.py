"""Images that are decoded once: the same values, made anew when the files change, whole or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rpg.tasks import ImageNetConfig, TimmFinetuneConfig, build_task
from rpg.tasks.images import image_cache
from rpg.tasks.images.image_cache import FOLDER
from tokenization.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images of two classes, none of the size that the network takes, one of them grey."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label, count in (("a", 3), ("b", 2)):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for index in range(count):
                shape = (40 + index, 57) if index == 1 else (40 + index, 57, 3)
                Image.fromarray(random.integers(0, 255, shape).astype("uint8")).save(
                    tmp_path / "data" / split / label / f"{index}.jpg"
                )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "data"


def task_of(folder: Path, name: str = "imagenet", **changes):
    common = {
        "network": "resnet10t",
        "pretrained": False,
        "data": str(folder),
        "image_size": 32,
        "batch_size": 2,
        "device": "cpu",
    }
    made = (
        ImageNetConfig(**{**common, "num_classes": 2, **changes})
        if name == "imagenet"
        else TimmFinetuneConfig(**common)
    )
    return build_task(made)


def values(task) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*task.batches("test"), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("name", ["imagenet", "finetune"])
def test_the_values_are_those_of_decoding(folder: Path, name: str) -> None:
    task = task_of(folder, name)
    images, labels = values(task)
    direct = [task.dataset("test")[index] for index in range(5)]
    assert torch.equal(images, torch.stack([image for image, _ in direct])) and images.dtype == torch.float32
    assert labels.tolist() == [label for _, label in direct] == task.labels("test").tolist()
    assert [path.suffix for path in sorted((folder / FOLDER).iterdir())] == [".lock", ".npy"]


def test_it_is_made_once_and_read_by_later_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = values(task_of(folder))
    monkeypatch.setattr(image_cache, "_write", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(values(task_of(folder))[0], first)
    shutil.rmtree(folder / FOLDER)
    with pytest.raises(pytest.fail.Exception):
        values(task_of(folder))


def test_a_change_of_files_or_preparation_makes_another(folder: Path) -> None:
    values(task_of(folder))
    values(task_of(folder, image_size=40))
    changed = folder / "val" / "a" / "0.jpg"
    Image.fromarray(np.zeros((50, 50, 3), "uint8")).save(changed)
    os.utime(changed, (1, 1))
    assert values(task_of(folder))[0][0].std() < 0.2
    assert len(list((folder / FOLDER).glob("*.npy"))) == 3


def test_workers_decode_the_same(folder: Path) -> None:
    first, _ = values(task_of(folder))
    shutil.rmtree(folder / FOLDER)
    assert torch.equal(values(task_of(folder, workers=2))[0], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_and_nothing_is_left(folder: Path, workers: int) -> None:
    broken = folder / "val" / "b" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(InputError, match=r"b/1\.jpg cannot be read") as caught:
        values(task_of(folder, workers=workers))
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in (folder / FOLDER).iterdir()] == [".lock"]


def test_where_the_images_may_not_be_written_beside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / FOLDER).write_text("in the way")
    first, _ = values(task_of(folder))
    assert len(list((tmp_path / "home" / "rpg" / "images").glob("*.npy"))) == 1
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    shutil.rmtree(tmp_path / "home")
    assert torch.equal(values(task_of(folder))[0], first)  # without room they are read anew each time
    assert not list(tmp_path.rglob("*.npy"))


def test_preparations_that_are_not_known_are_left_alone(folder: Path) -> None:
    task = task_of(folder)
    task.dataset("test").transform = lambda image: torch.zeros(3, 32, 32)
    assert not values(task)[0].any() and not (folder / FOLDER).exists()


def test_training_images_are_read_as_before(folder: Path) -> None:
    next(task_of(folder).batches_after(0))
    assert not (folder / FOLDER).exists()


def test_predictions_go_through_it(folder: Path) -> None:
    config = ImageNetConfig(
        network="resnet10t",
        pretrained=False,
        data=str(folder),
        image_size=32,
        batch_size=2,
        num_classes=2,
        device="cpu",
    )
    task = build_task(config)
    network = task.build().eval()
    images = torch.stack([task.dataset("test")[index][0] for index in range(5)])
    with torch.no_grad():
        expected = torch.cat([network(part).argmax(1) for part in images.split(2)])
    assert torch.equal(task.predict([network.state_dict()])[0], expected)
    assert len(list((folder / FOLDER).glob("*.npy"))) == 1
