"""The ``evaluate:`` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rpg.section import Section

TAUS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
"""Distances at which novelty is reported, in units of the zoo's median nearest-neighbour distance."""


Baseline = Literal[
    "noise",
    "run_average",
    "average_of_k",
    "interpolation",
    "coordinate_gaussian",
    "covariance_gaussian",
    "low_rank_gaussian",
    "noise_at_distance",
    "coordinate_gaussian_at_distance",
    "sharpened_gaussian_at_distance",
    "covariance_gaussian_at_distance",
    "low_rank_gaussian_at_distance",
    "run_coordinate_gaussian_at_distance",
    "run_sharpened_gaussian_at_distance",
    "run_covariance_gaussian_at_distance",
    "extrapolation_at_distance",
    "nearest_seen",
    "kernel_ridge",
    "merge_linear",
    "merge_slerp",
    "merge_ties",
    "merge_dare_linear",
    "merge_dare_ties",
    "merge_model_stock",
    "peft_linear",
    "peft_svd",
    "peft_ties",
    "peft_dare_linear",
    "peft_dare_ties",
]
"""Kinds of networks that no generator is needed for; the average of all originals is always there."""


class ControlConfig(Section):
    """How baselines are trained as a control."""

    steps: tuple[int, ...] = Field((48,), min_length=1, description="gradient steps of each network; a control each")
    learning_rate: float = Field(3e-3, gt=0, description="AdamW's, after a warm-up; a cosine to 0 follows")
    batch_size: int = Field(128, ge=1, description="training images a step")


class EvaluateConfig(Section):
    """Scoring of generated networks."""

    num: int = Field(50, ge=1, description="networks to generate and score")
    num_baseline: int = Field(50, ge=2, description="networks to make for each simple baseline")
    noise: tuple[float, ...] = Field((0.01, 0.05, 0.15), description="relative σ of the noise-added baseline")
    split: str = Field("test", description="images to score on; choose between recipes on validation")
    taus: tuple[float, ...] = Field(
        TAUS, description="distances of the novelty curve, in the zoo's median nearest-neighbour distances"
    )
    baselines: tuple[Baseline, ...] | None = Field(
        None, description="kinds of baselines beside the average; null: all that the networks' size allows"
    )
    control: ControlConfig | None = Field(
        None,
        description="baselines at the generated networks' distance, trained on images: for generators that saw any",
    )
    informed: int = Field(
        3000, ge=0, description="sensors: training steps of networks that take the settings as inputs; 0: none"
    )
    fine_tuning: tuple[int, ...] = Field(
        (0, 5, 20, 100, 300, 1000), description="sensors: fine-tuning steps at which starts are compared; empty: not"
    )
    meta_learning: int = Field(300, ge=0, description="sensors: outer steps of Reptile, a start beside them; 0: none")
    linear_head: bool = Field(
        True,
        description="rpg unseen: compare with one body and a head affine in the bits, trained as long",
    )
