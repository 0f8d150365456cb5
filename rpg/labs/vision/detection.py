"""The task ``detection``: object detectors, whole or in part, scored by average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from inspect import signature
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from rpg.devices import use_threads
from rpg.labs.vision.config import DetectionConfig
from rpg.labs.vision.detection_data import DetectionSet, Instances, Sample, open_split
from rpg.packages import install_command
from rpg.tasks.stepwise import DatasetTask
from tokenization.errors import InputError

ASPECTS = (0.5, 1.0, 2.0)
POOLED = 7  # height and width of a region's features


def build_detector(config: DetectionConfig, num_outputs: int, *, pretrained: bool = False) -> nn.Module:
    """A network of torchvision's detection interface, drawn from torch's global random state.

    In training it takes images and targets and returns losses by name, in evaluation detections.

    The first of its outputs is the background; only the backbone is pretrained. Raises InputError if there is no such
    network, backbone or argument, or the weights cannot be had.
    """
    kind = RetinaNet if config.network.startswith("retinanet") else FasterRCNN
    known = [name for name, each in signature(kind).parameters.items() if isinstance(each.default, int | float)]
    for name in config.arguments:
        if name not in known:  # torchvision itself would ignore it
            raise InputError(
                f"task.arguments has {name!r}, no number that {kind.__name__} takes; known: {', '.join(known)}"
            )
    try:
        network = _build(config, num_outputs, pretrained)
    except (OSError, RuntimeError) as error:  # the hub cannot be reached; timm has no weights of this backbone
        if not pretrained:
            raise
        raise InputError(
            f"the hub gave no weights for task.pretrained ({type(error).__name__}); set it to false"
        ) from None
    if config.pretrained and config.network != "fasterrcnn" and not config.network.endswith("_v2"):
        # torchvision does so only with weights; all checkpoints need the same structure
        freeze_batch_norm_2d(network.backbone)
    if config.anchors:
        holder = network if hasattr(network, "anchor_generator") else network.rpn  # RetinaNet, Faster R-CNN
        holder.anchor_generator = _scaled(holder.anchor_generator, config.anchors)
    return network


def _build(config: DetectionConfig, num_outputs: int, pretrained: bool) -> Any:
    if config.network == "fasterrcnn":
        return _on_timm(config, num_outputs, pretrained)
    weights = "DEFAULT" if pretrained else None
    return torchvision.models.get_model(
        config.network, weights=None, weights_backbone=weights, num_classes=num_outputs, **config.arguments
    )


def _scaled(generator: AnchorGenerator, sides: tuple[int, ...]) -> AnchorGenerator:
    """The same anchors with the smallest of each level rescaled to the given side in pixels."""
    if len(sides) != len(generator.sizes):
        raise InputError(
            f"task.anchors has {len(sides)} sides; the network has {len(generator.sizes)} levels: one each"
        )
    sizes = tuple(
        tuple(side * size // known[0] for size in known) for side, known in zip(sides, generator.sizes, strict=True)
    )
    return AnchorGenerator(sizes, generator.aspect_ratios)


def _on_timm(config: DetectionConfig, num_outputs: int, pretrained: bool) -> FasterRCNN:
    if not timm.is_model(config.backbone):
        raise InputError(f"task.backbone {config.backbone!r} is not a timm model; choose one of timm.list_models()")
    plain = is_model_in_modules(config.backbone, ["vision_transformer"])
    backbone = (SimplePyramid if plain else ConvolutionPyramid)(config.backbone, config.channels, pretrained)
    sizes = tuple((32 * 2**level,) for level in range(backbone.levels + 1))
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, (ASPECTS,) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign([str(level) for level in range(backbone.levels)], POOLED, sampling_ratio=2),
        box_head=FastRCNNConvFCHead(
            (config.channels, POOLED, POOLED), [config.channels] * config.convolutions, [config.hidden], LayerNorm2d
        ),
        box_predictor=FastRCNNPredictor(config.hidden, num_outputs),
        **config.arguments,
    )


class ConvolutionPyramid(nn.Module):
    """A feature pyramid (arXiv 1612.03144) of F channels on a convolutional network of timm from stride 4 on."""

    def __init__(self, name: str, channels: int, pretrained: bool) -> None:
        super().__init__()
        every: Any = timm.create_model(name, features_only=True)
        kept = [index for index, stride in enumerate(every.feature_info.reduction()) if stride >= 4]
        body: Any = timm.create_model(name, features_only=True, out_indices=kept, pretrained=pretrained)
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels, LastLevelMaxPool(), LayerNorm2d)
        self.levels, self.out_channels = len(kept), channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[B, 3, H, W]`` → maps ``[B, F, H / stride, W / stride]`` by level: 0, 1, …, pool."""
        return self.fpn({str(level): features for level, features in enumerate(self.body(images))})


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): all levels from the last map alone.

    Unlike there, every block of timm's plain vision transformer ``name`` attends globally. Levels have F channels, and
    strides of the patch size times ¼, ½, 1 and 2.
    """

    levels = 4

    def __init__(self, name: str, channels: int, pretrained: bool = False) -> None:
        super().__init__()
        body: Any = timm.create_model(
            name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, pretrained=pretrained
        )
        self.body, width = body, body.num_features
        scales = (
            nn.Sequential(_doubled(width), LayerNorm2d(width // 2), nn.GELU(), _doubled(width // 2)),
            _doubled(width),
            nn.Identity(),
            nn.MaxPool2d(2),
        )
        self.scales = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width // divided, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, divided in zip(scales, (4, 2, 1, 1), strict=True)
        )
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[B, 3, H, W]`` → maps ``[B, F, H / stride, W / stride]`` by level: 0, 1, 2, 3, pool."""
        (last,) = self.body.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)  # [B, C, …]
        maps = {str(level): scale(last) for level, scale in enumerate(self.scales)}
        return {**maps, "pool": maps["3"][:, :, ::2, ::2]}


def _doubled(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)


MOST_DETECTIONS = 100
"""Detections per image that are scored, those with the highest scores: COCO's own limit."""


class DetectionTask(DatasetTask):
    """Collects zoos of detectors and scores state dicts by AP50 and AP."""

    config: DetectionConfig

    def make_network(self) -> nn.Module:
        """The untrained target network. Raises InputError if it cannot be built, or data are missing."""
        return build_detector(self.config, self.dataset("train").num_outputs, pretrained=self.fetches_weights)

    def open_split(self, split: str) -> DetectionSet:
        """Images and their boxes. Raises InputError if the folder lacks them."""
        return open_split(split, self.config.data)

    def batch(self, samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images and targets."""
        images = [image.to(self.device) for image, _ in samples]
        return images, [{name: value.to(self.device) for name, value in target.items()} for _, target in samples]

    def loss(self, network: nn.Module, batch: tuple[list[Tensor], list[dict[str, Tensor]]], step: int) -> Tensor:
        """The sum of the losses of torchvision's detectors."""
        network.train()  # in evaluation they return detections
        if not self.is_whole:
            for module in network.modules():
                if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
                    module.eval()  # parameters that are not fine-tuned keep their statistics
        losses: dict[str, Tensor] = network(*batch)
        return torch.stack(list(losses.values())).sum()

    @torch.inference_mode()
    def own_metrics(self, network: Mapping[str, Tensor], split: str = "test") -> dict[str, float]:
        """AP50 and AP of one network, in 0 … 1. Raises InputError for a misfit, or an image that cannot be read."""
        fitted, dataset = self.network_with(network).eval(), self.dataset(split)
        rows: list[Tensor] = []
        with use_threads(self.config.threads):
            for images, _ in self.batches(split):
                for found in fitted(images):
                    values = {name: value.cpu().double() for name, value in found.items()}
                    rows.append(_rows(dataset.images[len(rows)]["id"], values))
        return average_precision(dataset.instances, torch.cat(rows).numpy())


def _rows(image: int, found: Mapping[str, Tensor]) -> Tensor:
    """Detections of an image in COCO's format: image, left, top, width, height, score, category ``[K, 7]``."""
    boxes, scores, labels = found["boxes"], found["scores"][:, None], found["labels"][:, None]
    return torch.cat([torch.full_like(scores, image), boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels], 1)


def average_precision(instances: Instances, detections: np.ndarray[Any, Any]) -> dict[str, float]:
    """COCO's AP50 (IoU 0.5) and AP (mean over IoU 0.5 to 0.95). Raises InputError if pycocotools is not installed.

    Detections are rows of image, left, top, width, height, score, category, ``[N, 7]``; N may be 0.
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
        for number, thing in enumerate(instances["annotations"], 1)  # from 1, since 0 means unmatched
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints at each step
        truth = COCO()
        truth.dataset = {**instances, "annotations": things}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(detections), "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], ["all"]
        judge.params.maxDets = [MOST_DETECTIONS]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"]  # [overlaps, recalls, categories, 1, 1]; -1 for absent categories
    return {"AP50": _mean(precision[0]), "AP": _mean(precision)}


def _mean(precision: np.ndarray[Any, Any]) -> float:
    there = precision[precision > -1]
    return float(there.mean()) if there.size else 0.0
