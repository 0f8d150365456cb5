"""Configuration of the sensors: how they may be mounted, the images they see and the networks that fit on them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rpg.section import Section


class GeneralistConfig(Section):
    """How the one network for all sensors is trained, from which every specialist starts."""

    steps: int = Field(6000, ge=1)
    sensors: int = Field(32, ge=1, description="sensors a step, drawn afresh")
    images: int = Field(32, ge=1, description="images a step that each of them sees")
    learning_rate: float = Field(1e-2, gt=0, description="peak of Adam's one-cycle schedule")


class SpecialistConfig(Section):
    """How a network is trained for one sensor, side by side with others."""

    steps: int = Field(600, ge=1)
    images: int = Field(64, ge=1, description="images a step")
    learning_rate: float = Field(1e-2, gt=0, description="peak of Adam's one-cycle schedule")


class SensorsConfig(Section):
    """Images seen by sensors that are turned, scaled, shifted and perhaps inverted, and a network for each sensor."""

    name: Literal["sensors"] = "sensors"
    data: str = Field(
        "digits",
        description="digits; cifar10; or a folder, FOLDER/CLASS/*.png or FOLDER/train/CLASS and FOLDER/val/CLASS",
    )
    root: str = Field("data/cifar10", description="of cifar10: folder that holds cifar-10-batches-py")
    image_size: int = Field(8, ge=2, description="height and width in pixels; of digits 8")
    network: str = Field("mlp", description="mlp: one hidden layer; or a timm network without dropout and batch norm")
    hidden: int = Field(8, ge=1, description="hidden units of mlp")
    network_arguments: dict[str, Any] = Field({}, description="keyword arguments of a timm network")
    seed: int = Field(0, ge=0, description="decides the sensors, initial weights and the order of images")
    seen: int = Field(300, ge=2, description="sensors with a network in the zoo to learn from")
    validation: int = Field(20, ge=1, description="sensors to make choices by")
    unseen: int = Field(40, ge=1, description="sensors to report on")
    angle: tuple[float, float] = Field((0.0, 360.0), description="degrees by which sensors are turned; 360 is a circle")
    scale: tuple[float, float] = Field((0.8, 1.2), description="how large they show things")
    shift: float = Field(0.25, ge=0, description="furthest shift to each side, in half frames")
    inverted: bool = Field(True, description="half of them show light as dark")
    generalist: GeneralistConfig = GeneralistConfig()
    specialist: SpecialistConfig = SpecialistConfig()
    group: int = Field(100, ge=1, description="specialists trained side by side in one process")

    @model_validator(mode="after")
    def _ranges_ascend(self) -> SensorsConfig:
        for name in ("angle", "scale"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name} is {[low, high]}; write the lower value first")
        if self.scale[0] <= 0:
            raise ValueError("scale starts at 0 or below; write a number above 0")
        return self
