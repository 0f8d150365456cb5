"""The task ``detection``: networks that say where things are, whole or in part, judged by average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rpg.packages import install_command
from rpg.tasks.images.collection import use_threads
from rpg.tasks.vision.detection_config import DetectionConfig
from rpg.tasks.vision.detection_data import DetectionSet, Instances, Sample, open_split
from rpg.tasks.vision.detection_networks import build_detector
from rpg.tasks.vision.image_batches import batches_to_score, batches_to_train
from rpg.tasks.vision.stepwise import StepwiseTask
from tokenization.errors import InputError

MOST_DETECTIONS = 100
"""Of an image, the ones with the highest scores, that count: COCO's own limit."""


class DetectionTask(StepwiseTask):
    """Collects zoos of detectors and scores state dicts by AP50 and AP."""

    def __init__(self, config: DetectionConfig) -> None:
        super().__init__(config)
        self.config = config
        self._opened: dict[str, DetectionSet] = {}

    def make_network(self) -> nn.Module:
        """The untrained target network. Raises InputError if it cannot be built, or there are no data."""
        pretrained = self.config.pretrained and not Path(self.config.base).is_file()
        return build_detector(self.config, self.dataset("train").num_outputs, pretrained=pretrained)

    def dataset(self, split: str) -> DetectionSet:
        """Images and what is on them. Raises InputError where the folder does not hold them."""
        if split not in self._opened:
            self._opened[split] = open_split(split, self.config.data)
        return self._opened[split]

    def batches_after(self, done: int) -> Iterator[list[Sample]]:
        """The training batches but the first ``done``, without end."""
        return batches_to_train(self.dataset("train"), self.config, done)

    def loss(self, network: nn.Module, batch: list[Sample], step: int) -> Tensor:
        """The sum of the losses that torchvision's detectors give."""
        network.train()  # or they would detect
        if not self.is_whole:
            for module in network.modules():
                if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
                    module.eval()  # what is not fine-tuned stays
        images = [image.to(self.device) for image, _ in batch]
        targets = [{name: value.to(self.device) for name, value in target.items()} for _, target in batch]
        losses: dict[str, Tensor] = network(images, targets)
        return torch.stack(list(losses.values())).sum()

    @torch.inference_mode()
    def figures(self, network: Mapping[str, Tensor], split: str = "test") -> dict[str, float]:
        """AP50 and AP of one network, in 0 … 1.

        Raises:
            InputError: the network does not fit, or an image cannot be read.
        """
        fitted, dataset = self.network_with(network).eval(), self.dataset(split)
        rows: list[Tensor] = []
        with use_threads(self.config.threads):
            for batch in batches_to_score(dataset, self.config):
                for found in fitted([image.to(self.device) for image, _ in batch]):
                    values = {name: value.cpu().double() for name, value in found.items()}
                    rows.append(_rows(dataset.images[len(rows)]["id"], values))
        return average_precision(dataset.instances, torch.cat(rows).numpy())


def _rows(image: int, found: Mapping[str, Tensor]) -> Tensor:
    """Detections of an image as COCO's tools take them: image, left, top, width, height, score, category ``[K, 7]``."""
    boxes, scores, labels = found["boxes"], found["scores"][:, None], found["labels"][:, None]
    return torch.cat([torch.full_like(scores, image), boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels], 1)


def average_precision(instances: Instances, detections: np.ndarray[Any, Any]) -> dict[str, float]:
    """COCO's AP50, at an overlap of one half, and AP, the mean over overlaps from 0.5 to 0.95.

    Args:
        instances: what is there.
        detections: rows of image, left, top, width, height, score, category, ``[N, 7]``; N may be 0.

    Raises:
        InputError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        cure = f"run {install_command('pycocotools')}"
        raise InputError(f"average precision needs pycocotools, which is not installed; {cure}") from None
    if not len(detections):
        return {"AP50": 0.0, "AP": 0.0}
    things = [
        {"iscrowd": 0, "area": thing["bbox"][2] * thing["bbox"][3], **thing, "id": number}
        for number, thing in enumerate(instances["annotations"], 1)  # from 1: 0 stands for unmatched
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints at every step
        truth = COCO()
        truth.dataset = {**instances, "annotations": things}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(detections), "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], ["all"]
        judge.params.maxDets = [MOST_DETECTIONS]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"]  # [overlaps, recalls, categories, 1, 1]; -1 for categories that are not there
    return {"AP50": _mean(precision[0]), "AP": _mean(precision)}


def _mean(precision: np.ndarray[Any, Any]) -> float:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else 0.0
