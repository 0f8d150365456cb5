"""CIFAR-10 groupings, on a small archive that the test writes in CIFAR's own format."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from rpg.config import Config
from rpg.seeding import derive_seed
from rpg.tasks import collecting
from rpg.tasks.images.cifar10 import Cifar10SubsetsTask, _flip_and_crop
from rpg.tasks.images.config import Cifar10FinetuneConfig, Cifar10SubsetsConfig, ProbeConfig, Stage
from tokenization.errors import InputError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Forty training and twenty test images, whose brightness tells their class."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(num):
        labels = [index % 10 for index in range(num)]
        images = np.repeat(np.array(labels, dtype=np.uint8)[:, None] * 25, 3072, axis=1)
        return {"data": images, "labels": labels, "batch_label": "", "filenames": [""] * num}

    names = list(Cifar10SubsetsTask.class_names)
    meta = write("batches.meta", {"label_names": names, "num_cases_per_batch": 40, "num_vis": 3072})
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch(40))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(20))])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path / "data"


def config_of(root, **changes):
    return Cifar10SubsetsConfig(
        root=str(root), pretrained=False, image_size=32, num_validation=10, group=2, validation=2, eval_batch=7,
        probe=ProbeConfig(steps=2, batch_size=4),
        finetune=Cifar10FinetuneConfig(
            stages=(Stage(steps=2, only=("head.*",)), Stage(steps=3, learning_rate=1e-4)),
            batch_size=4, loss="focal", checkpoints=2, tail=0.5,
        ),
        unseen={"kind": "random", "num": 2}, **changes,
    )  # fmt: skip


def test_collecting_head_first_then_everything(root, tmp_path, monkeypatch):
    task = Cifar10SubsetsTask(config_of(root))
    bits = task.bits()[:2]
    monkeypatch.setattr(Cifar10SubsetsTask, "bits", lambda self: bits)
    monkeypatch.setattr(Cifar10SubsetsTask, "splits", lambda self: ["train", "unseen"])
    zoo = task.collect(tmp_path / "zoo", processes=1)
    assert [(entry.run, entry.step, entry.split) for entry in zoo.entries] == [
        (0, 1, "train"), (0, 2, "train"), (1, 1, "unseen"), (1, 2, "unseen"),
    ]  # fmt: skip
    state = zoo.state_dict(0)
    assert set(state) == set(task.build().state_dict()) and state["head.weight"].shape == (2, 192)
    answers = task.predict([state], "test")
    assert answers.shape == (1, 20)
    accuracy = (task.predict([state], "validation") == task.targets(bits[:1], "validation")).double().mean().item()
    assert accuracy == pytest.approx(zoo.entries[0].metrics["validation_accuracy"], abs=0.101)
    assert task.base_probabilities(zoo).shape == (20, 10)


def test_a_gpu_gets_one_process(root, tmp_path, monkeypatch):
    task, asked = Cifar10SubsetsTask(config_of(root)), []
    monkeypatch.setattr(Cifar10SubsetsTask, "train_base", lambda self: {"weight": torch.zeros(1)})
    monkeypatch.setattr(collecting, "share", lambda work, processes, done: asked.append(processes))
    for device in ("cuda", "cpu"):
        task.device = torch.device(device)
        task.collect(tmp_path / "zoo", processes=16)
    assert asked == [1, 16]


def test_of_the_base_only_the_head_is_trained(root):
    task = Cifar10SubsetsTask(config_of(root))
    base, again = task.train_base(), task.train_base()
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(task.config.seed, "base"))
        start = task.network(10).state_dict()
    changed = {name for name, value in base.items() if not torch.equal(value, start[name])}
    assert changed == {"head.weight", "head.bias"} and torch.equal(base["head.weight"], again["head.weight"])


def test_images_and_splits(root):
    task = Cifar10SubsetsTask(config_of(root))
    assert len(task.classes("train")) == 30 and len(task.classes("validation")) == 10
    assert task.classes("test").tolist() == [index % 10 for index in range(20)]
    images = task.images("test")
    assert images.shape == (20, 3, 32, 32)
    torch.testing.assert_close(images[7].mean(), torch.tensor((7 * 25 / 255 - 0.5) / 0.5))
    torch.testing.assert_close(torch.cat(list(task.batches("test"))), images)
    drawn, classes = task.draw(6, torch.Generator().manual_seed(0), augmented=False)
    torch.testing.assert_close(drawn.mean((1, 2, 3)), (classes * 25 / 255 - 0.5) / 0.5)


def test_crops_are_windows_of_the_padded_image():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    cut = _flip_and_crop(images, torch.Generator().manual_seed(0))
    assert cut.shape == images.shape
    padded = torch.nn.functional.pad(images, (4,) * 4)
    mirrored = torch.nn.functional.pad(images.flip(-1), (4,) * 4)
    windows = [
        each[..., top : top + 8, left : left + 8]
        for each in (padded, mirrored)
        for top in range(9)
        for left in range(9)
    ]
    assert all(any(torch.equal(cut[i], window[i]) for window in windows) for i in range(2))


@pytest.mark.parametrize(
    "changes, words", [({"root": "nowhere"}, "task.root nowhere"), ({"network": "no_such_net"}, "task.network")]
)
def test_what_is_missing_is_one_line(root, changes, words):
    task = Cifar10SubsetsTask(config_of(root).model_copy(update=changes))
    with pytest.raises(InputError, match=words) as caught:
        task.images("test")
        task.build()
    assert "\n" not in str(caught.value)


def test_without_images_no_zoo_is_left(root, tmp_path):
    task = Cifar10SubsetsTask(config_of(root).model_copy(update={"root": "nowhere"}))
    with pytest.raises(InputError, match="nowhere"):
        task.collect(tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()


def test_the_papers_recipe_is_the_default():
    task = Config.load("configs/cifar10_unseen.yaml").task
    head, everything = task.finetune.stages
    assert (head.only, head.learning_rate) == (("head.*",), 1e-2)
    assert (everything.learning_rate, everything.weight_decay) == (1e-4, 0.1)
    assert (task.finetune.loss, task.finetune.checkpoints) == ("focal", 5)
    assert (task.finetune.batch_size, task.network) == (500, "vit_tiny_patch16_224")
    other = Config.load("configs/cifar10_unseen.yaml", ["task.finetune.images_at_a_time=50"]).task
    assert other.finetune == task.finetune.model_copy(update={"images_at_a_time": 50})  # one field changes no other
