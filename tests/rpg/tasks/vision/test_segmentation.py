from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rpg.labs.vision.segmentation import IGNORED, build_segmenter, logits_of, open_split
from rpg.tasks import build_task, stepwise
from rpg.tasks.collecting import SavedTraining
from tokenization.checkpoint.checkpoint import read_state_dict
from tokenization.errors import InputError

SCRIPTS = Path(__file__).parents[4] / "scripts"


def task_of(folder: Path, **changes):
    settings = {
        "name": "segmentation", "canvases": 32, "image_size": 32, "batch_size": 8, "train_steps": 3, "steps": 4,
        "hold_out": 2, "base": str(folder / "base.safetensors"),
    }  # fmt: skip
    return build_task({**settings, **changes})


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """56 images in each of the layouts, as the script writes them."""
    folder = tmp_path_factory.mktemp("archives")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import archives as script

        for layout in ("ade20k", "voc"):
            arguments = ["", layout, str(folder / layout), "--train", "40", "--test", "16", "--size", "48"]
            patch.setattr(sys, "argv", arguments)
            script.main()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A task and its zoo of whole networks."""
    folder = tmp_path_factory.mktemp("whole")
    task = task_of(folder)
    return task, task.collect(folder / "zoo"), folder


def test_the_zoo_holds_whole_networks_that_plain_pytorch_loads(whole):
    task, zoo, folder = whole
    assert [(entry.step, entry.split) for entry in zoo.entries] == [
        (1, "train"), (2, "held_out"), (3, "train"), (4, "held_out"),
    ]  # fmt: skip
    task.build().load_state_dict(zoo.state_dict(3))
    base, last = read_state_dict(folder / "base.safetensors"), zoo.state_dict(3)
    assert set(base) == set(last) and all(not torch.equal(value, last[name]) for name, value in base.items())
    assert len(task.collect(folder / "zoo")) == 4


def test_figures_are_those_of_the_confusion_matrix(whole):
    task, zoo, _ = whole
    figures = task.own_metrics(zoo.state_dict(3), "validation")
    network = task.build().eval()
    network.load_state_dict(zoo.state_dict(3))
    confusion = torch.zeros(11, 11)
    with torch.no_grad():
        for image, classes in map(task.dataset("validation").__getitem__, range(8)):
            logits = torch.nn.functional.interpolate(network(image[None]), classes.shape, mode="bilinear")
            confusion += torch.bincount(11 * classes.flatten().long() + logits.argmax(1).flatten(), minlength=121).view(
                11, 11
            )
    both, either = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    assert figures["miou"] == pytest.approx((both / either)[either > 0].mean().item(), abs=1e-6)
    assert figures["pixel_accuracy"] == pytest.approx((both.sum() / confusion.sum()).item(), abs=1e-6)
    broken = {name: torch.full_like(value, torch.nan) for name, value in zoo.state_dict(3).items()}
    background = sum((task.dataset("validation")[index][1] == 0).float().mean().item() for index in range(8)) / 8
    assert task.own_metrics(broken, "validation")["pixel_accuracy"] == pytest.approx(background)


def test_a_part_is_scored_inside_the_base(tmp_path, whole):
    part = task_of(tmp_path, finetune=(), base=str(whole[2] / "base.safetensors"), steps=2, finetune_learning_rate=0.1)
    zoo = part.collect(tmp_path / "zoo")
    names = part.chosen(part.build())
    assert len(names) == 4 and set(zoo.state_dict(1)) == set(names)
    complete = {**read_state_dict(whole[2] / "base.safetensors"), **zoo.state_dict(1)}
    assert part.own_metrics(zoo.state_dict(1)) == whole[0].own_metrics(complete)
    with pytest.raises(InputError, match=r"no tensor .*norm|no tensor 'up"):
        part.own_metrics({})
    with pytest.raises(InputError, match="matches no parameter"):
        task_of(tmp_path, finetune=("head.bias", "hood.*")).collect(tmp_path / "other")


def test_training_of_the_base_that_was_killed_goes_on_to_the_same_bits(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(stepwise, "SAVE_EVERY", 1)
    real, steps = SavedTraining.save, []

    def dying(self: SavedTraining, step: int) -> None:
        real(self, step)
        steps.append(step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SavedTraining, "save", dying)
        task_of(tmp_path).collect(tmp_path / "zoo")
    assert steps == [1, 2] and not (tmp_path / "base.safetensors").exists()
    zoo = task_of(tmp_path).collect(tmp_path / "zoo", limit=2)
    assert len(zoo) == 2 and not [*tmp_path.glob("*.training.safetensors")]
    zoo = task_of(tmp_path).collect(tmp_path / "zoo")
    for index in range(4):
        expected, found = whole[1].state_dict(index), zoo.state_dict(index)
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_checkpoints_may_be_moving_averages(tmp_path, whole):
    """w̄ₜ = a w̄ₜ₋₁ + (1 - a) wₜ, from the base on."""
    zoo = task_of(tmp_path, base=str(whole[2] / "base.safetensors"), average=0.75, steps=2).collect(tmp_path / "zoo")
    base, weights = read_state_dict(whole[2] / "base.safetensors"), [whole[1].state_dict(index) for index in (0, 1)]
    for name, found in zoo.state_dict(1).items():
        first = 0.75 * base[name] + 0.25 * weights[0][name]
        torch.testing.assert_close(found, 0.75 * first + 0.25 * weights[1][name])


@pytest.mark.parametrize("name", ["unet-mini", "segformer-mini", "deeplabv3_mobilenet_v3_large"])
def test_networks_give_logits_of_every_class(name):
    with torch.no_grad():
        logits = logits_of(build_segmenter(name, 7).eval(), torch.zeros(1, 3, 32, 32))
    assert logits.shape[:2] == (1, 7) and max(logits.shape[2:]) <= 32
    with pytest.raises(InputError, match=r"segformer-b9.*choose one of"):
        build_segmenter("segformer-b9", 7)


def test_the_small_segformer_of_the_paper_has_its_size():
    with torch.device("meta"):
        num = sum(each.numel() for each in build_segmenter("segformer-b0", 150).parameters())
    assert num == pytest.approx(3.8e6, rel=0.02)  # arXiv 2105.15203, table 1


@pytest.mark.parametrize("layout", ["ade20k", "voc"])
def test_archives_in_their_own_layouts_are_trained_and_scored_on(archives, tmp_path, layout):
    task = task_of(tmp_path, dataset=layout, data=str(archives / layout), validation=0.2, train_steps=6, steps=2)
    sizes = {split: len(task.dataset(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 32, "validation": 8, "test": 16}
    zoo = task.collect(tmp_path / "zoo")
    figures = task.own_metrics(zoo.state_dict(1))
    assert list(figures) == ["miou", "pixel_accuracy"] and all(0 <= value <= 1 for value in figures.values())
    image, classes = task.dataset("test")[3]
    assert image.shape == (3, 32, 32) and classes.shape == (48, 64)  # maps to score on keep their size
    seen = set(torch.cat([task.dataset("test")[index][1].flatten() for index in range(16)]).tolist())
    assert seen <= ({*range(10), IGNORED} if layout == "ade20k" else {*range(11), IGNORED}) and IGNORED in seen
    first, again = (next(task.batches_after(0)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and first[1][0].shape == (32, 32)


def test_faults_of_a_folder_are_one_line(archives, tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        for part in ("training", "validation"):
            (root / kind / part).mkdir(parents=True)
            source = archives / "ade20k" / "ADEChallengeData2016" / kind / part
            for file in sorted(source.glob(f"*.{ending}"))[:4]:
                (root / kind / part / file.name).write_bytes(file.read_bytes())
    task = task_of(tmp_path, dataset="ade20k", data=str(root), validation=0.0, batch_size=2)
    maps = sorted((root / "annotations" / "validation").iterdir())

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            list(task.batches("test"))
        assert "\n" not in str(caught.value)

    Image.new("L", (64, 48), 151).save(maps[0])
    refused(r"ADE_val_00000001\.jpg .*map .* has a class 150 of 150")
    Image.new("RGB", (64, 48)).save(maps[0])
    refused(r"its mode is RGB")
    Image.new("L", (48, 64)).save(maps[0])
    refused(r"its map is \(48, 64\)|its map is \(64, 48\)")
    maps[0].write_bytes(maps[0].read_bytes()[:40])
    refused(r"map ADE_val_00000001\.png")
    maps[0].unlink()
    with pytest.raises(InputError, match=r"has no map .*ADE_val_00000001\.png"):
        open_split("test", task.config)
    for missing in ({"dataset": "voc"}, {"dataset": "ade20k"}):
        with pytest.raises(InputError, match=r"task\.data"):
            open_split("test", task_of(tmp_path, data=str(tmp_path / "none"), **missing).config)
    with pytest.raises(InputError, match="no image for the split validation"):
        open_split("validation", task.config)
    with pytest.raises(InputError, match="there is no split 'val'"):
        task.dataset("val")
