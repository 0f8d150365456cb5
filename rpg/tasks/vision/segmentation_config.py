"""Configuration of the task ``segmentation``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rpg.tasks.vision.stepwise_config import StepwiseConfig


class SegmentationConfig(StepwiseConfig):
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
