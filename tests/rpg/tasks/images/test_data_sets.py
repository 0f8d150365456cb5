"""p-diff's data sets as torchvision reads them: small archives in the sets' own formats, which the test writes."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from rpg.tasks import TimmFinetuneConfig, build_task

NUM = {"train": 6, "test": 4}
NAMES = ("Abyssinian", "american_bulldog", "basset_hound")
Patch = Callable[[Any, str, Any], None]


def pixels(number: int, size: int) -> np.ndarray:
    """Image ``number`` as random bytes ``[3, size, size]``, of class ``number % 3``."""
    return np.random.default_rng(number).integers(0, 256, (3, size, size), dtype=np.uint8)


def picture(path: Path, number: int) -> str:
    """Write an image as a JPEG; its name without ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number, 40).transpose(1, 2, 0)).save(path)
    return path.stem


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, patch: Patch, kind: Any, folder: str, files: dict[str, str], key: str, names: str) -> None:
    place = root / folder
    place.mkdir()
    for split, file in files.items():
        images = np.stack([pixels(number, 32).reshape(-1) for number in range(NUM[split])])
        content = {"data": images, key: [number % 3 for number in range(NUM[split])]}
        (place / file).write_bytes(pickle.dumps(content, protocol=2))
        patch(kind, f"{split}_list", [[file, digest(place / file)]])
    meta = place / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({names: list(NAMES)}, protocol=2))
    patch(kind, "meta", {**kind.meta, "md5": digest(meta)})


def write_cifar10(root: Path, patch: Patch) -> None:
    files = {"train": "data_batch_1", "test": "test_batch"}
    write_cifar(root, patch, datasets.CIFAR10, "cifar-10-batches-py", files, "labels", "label_names")


def write_cifar100(root: Path, patch: Patch) -> None:
    files = {"train": "train", "test": "test"}
    write_cifar(root, patch, datasets.CIFAR100, "cifar-100-python", files, "fine_labels", "fine_label_names")


def write_stl10(root: Path, patch: Patch) -> None:
    """Bytes column by column, labels from 1 on."""
    folder = root / "stl10_binary"
    folder.mkdir()
    for split, num in NUM.items():
        (folder / f"{split}_X.bin").write_bytes(
            b"".join(pixels(n, 96).transpose(0, 2, 1).tobytes() for n in range(num))
        )
        (folder / f"{split}_y.bin").write_bytes(bytes(n % 3 + 1 for n in range(num)))
        patch(datasets.STL10, f"{split}_list", [[f.name, digest(f)] for f in sorted(folder.glob(f"{split}_?.bin"))])
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")


def write_flowers102(root: Path, patch: Patch) -> None:
    """Images counted from 1, their labels and splits in MATLAB's format."""
    from scipy.io import savemat

    folder, total = root / "flowers-102", sum(NUM.values())
    order = [*range(NUM["train"]), *range(NUM["test"])]
    for number, image in enumerate(order, 1):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", image)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[image % 3 + 1 for image in order]], dtype=np.uint8)})
    ids = np.arange(1, total + 1)[None]
    splits = {"trnid": ids[:, : NUM["train"]], "valid": ids[:, :1], "tstid": ids[:, NUM["train"] :]}
    savemat(folder / "setid.mat", splits)
    files = {"label": folder / "imagelabels.mat", "setid": folder / "setid.mat"}
    known = datasets.Flowers102._file_dict | {key: (file.name, digest(file)) for key, file in files.items()}
    patch(datasets.Flowers102, "_file_dict", known)


def write_pets(root: Path, patch: Patch) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, file in (("train", "trainval"), ("test", "test")):
        lines = []
        for number in range(NUM[split]):
            name = picture(folder / "images" / f"{NAMES[number % 3]}_{split}{number}.jpg", number)
            lines.append(f"{name} {number % 3 + 1} {2 if number % 3 else 1} 1\n")
        (folder / "annotations" / f"{file}.txt").write_text("".join(lines))


def write_food101(root: Path, patch: Patch) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, num in NUM.items():
        listed: dict[str, list[str]] = {name: [] for name in NAMES}
        for number in range(num):
            name = NAMES[number % 3]
            listed[name].append(f"{name}/" + picture(folder / "images" / name / f"{split}{number}.jpg", number))
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))


WRITERS = {
    "cifar10": write_cifar10, "cifar100": write_cifar100, "stl10": write_stl10, "flowers102": write_flowers102,
    "pets": write_pets, "food101": write_food101,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_network_is_fine_tuned_and_scored_on_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    WRITERS[name](root, lambda where, what, value: monkeypatch.setattr(where, what, value))
    task: Any = build_task(TimmFinetuneConfig(
        network="test_resnet", pretrained=False, dataset=name, data=str(root), image_size=32, batch_size=4,
        base=str(tmp_path / "base.safetensors"), train_epochs=1, steps=2,
    ))  # fmt: skip
    zoo = task.collect(tmp_path / "zoo")
    assert [entry.step for entry in zoo.entries] == [1, 2]
    assert task.labels("train").tolist() == [0, 1, 2, 0, 1, 2] or name == "food101"
    assert sorted(task.labels().tolist()) == [0, 0, 1, 2]
    assert len(task.classes) >= 3 and task.build().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, len(task.classes))
    assert task.predict([zoo.state_dict(1)]).shape == (1, 4)
    shown = next(iter(task.batches("test")))[0]
    assert shown.shape == (4, 3, 32, 32) and len({float(image.sum()) for image in shown}) == 4
