from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rpg.experiments.driver import experiment_of, run_experiment
from rpg.labs.vision.config import DetectionConfig
from rpg.labs.vision.detection import SimplePyramid, average_precision, build_detector
from rpg.labs.vision.detection_data import make_canvases, open_split
from rpg.tasks import build_task
from tests.conftest import small_config
from tests.reports import checked_report
from tokenization.checkpoint.checkpoint import read_state_dict
from tokenization.errors import InputError

SCRIPTS = Path(__file__).parents[4] / "scripts"
SMALL = {
    "min_size": 32, "max_size": 32, "rpn_post_nms_top_n_train": 16, "rpn_post_nms_top_n_test": 16,
    "box_batch_size_per_image": 16,
}  # fmt: skip


def config_of(folder: Path, **changes) -> DetectionConfig:
    settings = {
        "network": "fasterrcnn", "backbone": "test_resnet", "channels": 16, "hidden": 16,
        "anchors": [8, 12, 16, 24, 32], "arguments": SMALL,
        "data": {"kind": "canvases", "size": 32, "sides": [8, 14], "train": 12, "scored": 6},
        "base": str(folder / "base.safetensors"), "train_steps": 2, "steps": 3, "batch_size": 4,
    }  # fmt: skip
    return DetectionConfig.model_validate({**settings, **changes})


PARTS = (("train", "train", 10), ("val", "test", 5))


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A folder in COCO's format: 10 training images of 32×32 pixels, 5 to score on."""
    root = tmp_path_factory.mktemp("coco")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        script = importlib.import_module("archives")
    made = {part: make_canvases(split, num, 32, sides=(8, 14)) for part, split, num in PARTS}
    return script.write_coco(root, made, 32)


def rows_of(things: list[dict], score: float = 0.9) -> np.ndarray:
    return np.array([[each["image_id"], *each["bbox"], score, each["category_id"]] for each in things], dtype=float)


def test_average_precision_of_known_answers():
    truth = open_split("test", config_of(Path()).data).instances
    right = rows_of(truth["annotations"])
    assert average_precision(truth, right) == pytest.approx({"AP50": 1.0, "AP": 1.0})
    assert average_precision(truth, right[:0]) == {"AP50": 0.0, "AP": 0.0}
    wide = right.copy()
    wide[:, 3] *= 1.6  # an overlap of 1 / 1.6, which is above 0.5, 0.55 and 0.6 alone
    assert average_precision(truth, wide) == pytest.approx({"AP50": 1.0, "AP": 0.3})
    wrong = right.copy()
    wrong[:, 6] = wrong[:, 6] % 10 + 1
    assert average_precision(truth, wrong)["AP50"] == 0.0


def test_average_precision_is_what_pycocotools_prints(tmp_path, capsys):
    truth = open_split("test", config_of(Path(), data={"kind": "canvases", "size": 64, "scored": 30}).data).instances
    rng = np.random.default_rng(0)
    guessed = np.repeat(rows_of(truth["annotations"]), 3, 0)
    guessed[:, 1:5] += rng.normal(0, 2.5, (len(guessed), 4))
    guessed[:, 5] = rng.random(len(guessed))
    things = [{**each, "id": n, "iscrowd": 0, "area": 1000.0} for n, each in enumerate(truth["annotations"], 1)]
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "annotations": things}))
    found = average_precision(truth, guessed)
    assert capsys.readouterr().out == ""
    reference = COCO(str(tmp_path / "truth.json"))
    judge = COCOeval(reference, reference.loadRes(guessed), "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    assert [found["AP"], found["AP50"]] == pytest.approx(judge.stats[:2].tolist())
    assert 0.1 < found["AP"] < found["AP50"] < 1


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(InputError, match=r"pip install 'pycocotools>=2\.0\.8'"):
        average_precision({"images": [], "annotations": [], "categories": []}, np.zeros((1, 7)))


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_checkpoints_have_the_names_and_shapes_of_torchvisions_own_network(name, tmp_path):
    config = config_of(tmp_path, network=name, arguments={"min_size": 64})
    with torch.device("meta"):
        own, plain = build_detector(config, 11), torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=11
        )  # fmt: skip
    own_shapes, shapes = ({k: v.shape for k, v in each.state_dict().items()} for each in (own, plain))
    assert own_shapes == shapes and own.transform.min_size == (64,)
    anchors = own.anchor_generator if name.startswith("retina") else own.rpn.anchor_generator
    assert [each[0] for each in anchors.sizes] == [8, 12, 16, 24, 32]


def test_batch_norms_are_frozen_where_weights_were_fetched_and_load_into_plain_ones(tmp_path):
    config = config_of(tmp_path, network="fasterrcnn_resnet50_fpn", arguments={}, pretrained=True)
    with torch.device("meta"):
        own = build_detector(config, 11)
        plain = torchvision.models.get_model("fasterrcnn_resnet50_fpn", weights_backbone=None, num_classes=11)
    names = [name for name in plain.state_dict() if not name.endswith("num_batches_tracked")]
    assert list(own.state_dict()) == names and len(names) < len(plain.state_dict())
    assert not any("bn1" in name for name, _ in own.named_parameters())
    plain.load_state_dict(dict(own.state_dict()), assign=True)


def test_the_simple_pyramid_has_four_scales_of_images_of_any_size():
    pyramid = SimplePyramid("test_vit", 8)
    maps = pyramid(torch.rand(1, 3, 64, 96))
    assert {name: tuple(each.shape[1:]) for name, each in maps.items()} == {
        "0": (8, 16, 24), "1": (8, 8, 12), "2": (8, 4, 6), "3": (8, 2, 3), "pool": (8, 1, 2)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet1"}, "is not a timm model"),
        (
            {"arguments": {"min_sise": 3}},
            "task.arguments has 'min_sise', no number that FasterRCNN takes; known: min_size",
        ),
        ({"anchors": [8, 16]}, "task.anchors has 2 sides; the network has 5 levels"),
        ({"finetune": ["nothing.*"]}, "matches no parameter"),
    ],
)
def test_an_impossible_network_is_one_line(changes, message, tmp_path):
    task = build_task(config_of(tmp_path, **changes))
    with pytest.raises(InputError, match=message) as caught:
        task.chosen(task.build())
    assert "\n" not in str(caught.value)


def test_a_whole_vit_det_is_collected_loads_plainly_and_is_scored(tmp_path):
    task = build_task(config_of(tmp_path, backbone="test_vit"))
    zoo = task.collect(tmp_path / "zoo")
    assert [entry.step for entry in zoo.entries] == [1, 2, 3]
    network = task.build()
    network.load_state_dict(zoo.state_dict(2))
    before, after = read_state_dict(tmp_path / "base.safetensors"), zoo.state_dict(0)
    assert {name for name in after if not torch.equal(before[name], after[name])} >= {
        "backbone.body.blocks.0.attn.qkv.weight", "backbone.scales.0.0.0.weight",
        "roi_heads.box_predictor.bbox_pred.bias"
    }  # fmt: skip
    figures = task.own_metrics(zoo.state_dict(2), "validation")
    assert list(figures) == ["AP50", "AP"] and all(0 <= value <= 1 for value in figures.values())
    assert task.own_metrics(zoo.state_dict(2), "validation") == figures
    broken = {name: value * float("nan") for name, value in zoo.state_dict(0).items()}
    assert task.own_metrics(broken, "validation") == {"AP50": 0.0, "AP": 0.0}


def test_a_part_is_fine_tuned_and_scored_in_the_base_network_whose_statistics_stay(tmp_path):
    task = build_task(config_of(tmp_path, finetune=["roi_heads.box_predictor.*"]))
    zoo = task.collect(tmp_path / "zoo")
    part, base = zoo.state_dict(2), read_state_dict(tmp_path / "base.safetensors")
    assert set(part) == {
        f"roi_heads.box_predictor.{a}.{b}" for a in ("cls_score", "bbox_pred") for b in ("weight", "bias")
    }
    whole = {**base, **part}
    rows = [task.own_metrics(each) for each in (part, whole)]
    assert rows[0] == rows[1]
    network = task.base_network()
    before = {name: value.clone() for name, value in network.named_buffers()}
    network.requires_grad_(True)
    task.loss(network, next(task.batches_after(0)), 0).backward()
    assert before and all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    with pytest.raises(InputError, match="has no tensor"):
        task.own_metrics({"x": torch.zeros(1)})


def test_each_image_is_judged_by_its_own_detections_however_many_are_looked_at_together(tmp_path):
    class Oracle(torch.nn.Module):
        def forward(self, images):
            return [{**known[image.sum().item()], "scores": torch.ones(99)[: len(known[image.sum().item()]["boxes"])]}
                    for image in images]  # fmt: skip

    task = build_task(config_of(tmp_path, batch_size=4))
    known = {image.sum().item(): target for image, target in (task.dataset("test")[i] for i in range(6))}
    task.network_with = lambda tensors: Oracle()
    assert task.own_metrics({}) == pytest.approx({"AP50": 1.0, "AP": 1.0})


def test_canvases_and_a_coco_folder_of_them_are_the_same_data(coco, tmp_path):
    canvases = open_split("test", config_of(tmp_path).data)
    folder = open_split("test", config_of(tmp_path, data={"kind": "coco", "root": str(coco)}).data)
    assert len(folder) == 5 and folder.num_outputs == canvases.num_outputs == 11
    for (image, target), (stored, expected) in zip((folder[i] for i in range(5)), canvases, strict=False):
        assert torch.equal(target["boxes"], expected["boxes"]) and torch.equal(target["labels"], expected["labels"])
        assert (image - stored).abs().mean() < 0.03


def test_training_images_are_mirrored_with_their_boxes(coco, tmp_path):
    data = {"kind": "coco", "root": str(coco), "validation": 3}
    train, validation = (open_split(split, config_of(tmp_path, data=data).data) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (7, 3)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = train[0]
        widths = target["boxes"][:, 2] - target["boxes"][:, 0]
        assert (widths > 0).all()
        left, top, right, bottom = target["boxes"][0].int().tolist()
        inside = image[:, top:bottom, left:right]
        assert inside.mean() > image.mean()
        seen.add((left, round(float(inside.sum()), 2)))
    assert len({left for left, _ in seen}) == 2 and len({total for _, total in seen}) == 1


def test_crowds_and_boxes_without_area_are_no_targets(coco, tmp_path):
    root = copytree(coco, tmp_path / "data")
    path = root / "annotations" / "instances_train2017.json"
    tree = json.loads(path.read_text())
    count = len(tree["annotations"])
    thing = tree["annotations"][0]
    tree["annotations"] += [{**thing, "iscrowd": 1}, {**thing, "bbox": [1, 1, 0, 5]}]
    tree["images"].append({**tree["images"][0], "id": 7})  # nothing is on it
    path.write_text(json.dumps(tree))
    train = open_split("train", config_of(tmp_path, data={"kind": "coco", "root": str(root)}).data)
    assert len(train) == 10 and sum(len(target["labels"]) for _, target in train) == count


def _set(*path):
    *keys, value = path

    def change(tree: dict) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("annotations", 1, "bbox", [1, 2, 3]), "annotations.1.bbox: List should have at least 4 items"),
        (_set("annotations", 0, "bbox", [1, "a", 3, 4]), "annotations.0.bbox.1"),
        (_set("annotations", 0, "category_id", 77), r"annotations.0.category_id is 77, which the file does not list"),
        (_set("annotations", 0, "image_id", 1), "annotations.0.image_id is 1"),
        (_set("categories", 0, "id", 0), "categories.0.id"),
        (_set("categories", []), "categories"),
        (_set("images", 3), "images"),
    ],
)
def test_malformed_annotations_are_one_line(change, message, coco, tmp_path):
    tree = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    change(tree)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=message) as caught:
        open_split("test", config_of(tmp_path, data={"kind": "coco", "root": str(tmp_path)}).data)
    assert "\n" not in str(caught.value) and "instances_val2017.json" in str(caught.value)


def test_files_that_are_missing_or_broken_are_one_line(coco, tmp_path):
    with pytest.raises(InputError, match="there is no file .*instances_train2017.json"):
        build_task(config_of(tmp_path, data={"kind": "coco", "root": str(tmp_path)})).build()
    root = copytree(coco, tmp_path / "data")
    (root / "annotations" / "instances_val2017.json").write_text("{")
    data = {"kind": "coco", "root": str(root)}
    with pytest.raises(InputError, match="Invalid JSON"):
        open_split("test", config_of(tmp_path, data=data).data)
    with pytest.raises(InputError, match="task.data.validation keeps 0 of 10"):
        open_split("validation", config_of(tmp_path, data=data).data)
    (root / "train2017" / "000000000103.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="000000000103.jpg cannot be read"):
        build_task(config_of(tmp_path, data=data)).collect(tmp_path / "zoo")


@pytest.mark.slow
def test_a_run_is_evaluated_by_its_average_precision(tmp_path):
    task = config_of(tmp_path).model_dump(mode="json") | {"name": "detection"}
    config = small_config(tmp_path, task=task, train={"steps": 2}, evaluate={"num": 2, "baselines": []})
    run_experiment(config, experiment_of(config))
    report = checked_report(config.run, "networks")
    assert report.first == "AP50" and [report.kinds[name].count for name in ("original", "generated")] == [3, 2]
