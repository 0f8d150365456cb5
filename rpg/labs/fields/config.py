"""Configuration of neural fields. Nothing here computes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rpg.section import Section


class FieldsConfig(Section):
    """Images or shapes, the network that is fitted to each, and how."""

    constants: ClassVar = {"truncation": 0.3, "frequency": 3.0, "alteration": 2.0, "own_classes": True}
    name: Literal["fields"] = "fields"
    dimensions: Literal[2, 3] = Field(2, description="2: images; 3: solid shapes")
    data: str = Field(
        "digits", description="digits, shapes (3-D), or a folder: FOLDER/CLASS/*.png, grey or RGB, or *.ply, .obj, .stl"
    )
    image_size: int = Field(
        8, ge=2, description="points along each edge of the grid of a folder's images, or of shapes"
    )
    num_shapes: int = Field(600, ge=48, description="of shapes: how many there are, in six classes")
    held_out: float = Field(0.25, gt=0, lt=1, description="share of shapes or a folder's files nothing is learned from")
    validation: float = Field(0.15, gt=0, lt=1, description="share of the other ones that is kept for choices")
    hidden: int = Field(32, ge=2, description="units of each of the two hidden layers; even")
    first_frequency: float = Field(15.0, gt=0, description="factor in the first layer's sines")
    output_scale: float = Field(
        10.0, gt=0, description="of the last layer's start: the larger, the less the layers before it have to move"
    )
    steps: int = Field(2, ge=1, description="Gauss-Newton steps of a fit")
    damping: float = Field(0.1, gt=0, description="of each step: weight of the distance from the start")
    altered: int = Field(8, ge=0, description="moved, turned and stretched copies of each datum to learn from")
    seed: int = Field(0, ge=0, description="decides the start, the splits of a folder and the alterations")

    @field_validator("hidden")
    @classmethod
    def _even(cls, hidden: int) -> int:
        if hidden % 2:
            raise ValueError("it must be even, as half of the units repeat the others with the opposite sign")
        return hidden

    @model_validator(mode="after")
    def _data_have_their_dimensions(self) -> FieldsConfig:
        wanted = {"digits": 2, "shapes": 3}.get(self.data, self.dimensions)
        if self.dimensions != wanted:
            raise ValueError(f"data: {self.data} needs dimensions: {wanted}")
        return self
