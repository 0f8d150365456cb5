"""Configuration of vision tasks. Nothing here computes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rpg.section import Section
from rpg.tasks.images.config import DIGITS_SIZE, FinetunedConfig


class VisionConfig(FinetunedConfig):
    """How the base network is trained, and what its fine-tuning keeps."""

    train_steps: int = Field(1000, ge=1, description="steps to the base network, where there is no file of it")
    finetune_learning_rate: float = Field(5e-4, gt=0, description="constant learning rate of the fine-tuning steps")
    threads: int = Field(1, ge=1, description="threads of training steps and scores on a CPU; bits depend on it")


class CanvasesData(Section):
    """Digits placed on canvases; nothing is read from the disk."""

    kind: Literal["canvases"] = "canvases"
    size: int = Field(64, ge=32, description="height and width of a canvas")
    most: int = Field(3, ge=1, description="digits on a canvas at most, as far as there is room")
    sides: tuple[int, int] = Field((16, 28), description="smallest and largest height of a digit's square")
    train: int = Field(1000, ge=1, description="canvases to train on")
    scored: int = Field(200, ge=1, description="canvases of validation, and of test")
    seed: int = Field(0, ge=0, description="decides what is on them")

    @model_validator(mode="after")
    def _digits_fit(self) -> CanvasesData:
        if not DIGITS_SIZE <= self.sides[0] <= self.sides[1] <= self.size:
            raise ValueError(f"sides are {self.sides}; give two sizes from {DIGITS_SIZE} to size {self.size}")
        return self


class CocoData(Section):
    """A folder in COCO's own format; it is never downloaded."""

    constants: ClassVar = {"flip": True}
    kind: Literal["coco"] = "coco"
    root: str = Field("data/coco", description="folder with annotations/instances_*.json, train2017/ and val2017/")
    train: str = Field("train2017", description="folder of the training images, and the end of their annotations' name")
    test: str = Field("val2017", description="the same of the images of split test")
    validation: int = Field(0, ge=0, description="so many training images, the last ones, are kept to make choices by")
    scored: int | None = Field(
        None, ge=1, description="networks are scored on so many of a split's images; null: on all"
    )


DetectionNetwork = Literal[
    "fasterrcnn", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2",
]  # fmt: skip


class DetectionConfig(VisionConfig):
    """A network that says where things are, and the images it is trained on."""

    name: Literal["detection"] = "detection"
    network: DetectionNetwork = Field(
        "fasterrcnn_resnet50_fpn",
        description="a model of torchvision; fasterrcnn: its Faster R-CNN on task.backbone",
    )
    backbone: str = Field(
        "vit_base_patch16_224", description="of fasterrcnn: a timm model; plain ViTs get the simple pyramid of ViTDet"
    )
    channels: int = Field(256, ge=1, description="of fasterrcnn: channels of the feature pyramid")
    convolutions: int = Field(4, ge=0, description="of fasterrcnn: convolutions of the box head")
    hidden: int = Field(1024, ge=1, description="of fasterrcnn: width of the box head")
    anchors: tuple[int, ...] = Field(
        (), description="side in pixels of the smallest anchors, one a level; empty: as torchvision has them"
    )
    arguments: dict[str, int | float] = Field(
        {}, description="other arguments of torchvision's: min_size, rpn_post_nms_top_n_test, …"
    )
    pretrained: bool = Field(
        False,
        description="start from ImageNet weights of the backbone, fetched if task.base does not exist; its batch norms "
        "are then frozen, as torchvision does",
    )
    data: Annotated[CanvasesData | CocoData, Field(discriminator="kind")] = CanvasesData()
    workers: int = Field(0, ge=0, description="processes that read images")


class SegmentationConfig(VisionConfig):
    """A network that tells the class of each pixel, and the images it is trained on."""

    name: Literal["segmentation"] = "segmentation"
    network: str = Field(
        "unet-mini",
        description="unet-mini, segformer-mini, segformer-b0 … b5, or a segmentation network of torchvision "
        "(deeplabv3_resnet50, …)",
    )
    dataset: Literal["canvases", "ade20k", "voc"] = Field(
        "canvases",
        description="canvases: scikit-learn's digits placed on canvases; ade20k: DATA/images/{training,validation} and "
        "DATA/annotations; voc: DATA/VOCdevkit/VOC2012",
    )
    data: str = Field("data", description="folder of the data set; it is never downloaded")
    canvases: int = Field(1024, ge=2, description="training canvases; a quarter as many to validate and to test on")
    image_size: int = Field(64, ge=16, description="height and width that images are brought to")
    validation: float = Field(
        0.1, ge=0, lt=1, description="share of a folder's training images that is kept to make choices by"
    )
    workers: int = Field(0, ge=0, description="processes that read images")


class DiffusionUnetConfig(VisionConfig):
    """A diffusion model of the digits, and how its samples are drawn and judged."""

    name: Literal["diffusion_unet"] = "diffusion_unet"
    channels: tuple[int, ...] = Field(
        (32, 64, 64), min_length=1, max_length=4, description="of the U-Net's levels, each half as large as the last"
    )
    layers: int = Field(1, ge=1, description="residual blocks a level")
    groups: int = Field(8, ge=1, description="of the group norms; divides all channels")
    timesteps: int = Field(1000, ge=2, description="noise levels T that the network learns")
    samples: int = Field(250, ge=8, description="images that are drawn, and held-out digits they are compared with")
    sample_steps: int = Field(10, ge=1, description="DDIM steps in which they are drawn, from the same noise each time")
