"""The table of kinds of models: their configurations, networks, trainers and samplers."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias

from pydantic import Field

from rpg.models.kernel_ridge import KernelRidgeConfig, KernelRidgeGenerator
from rpg.models.pdiff import ParameterDiffusion, PDiffConfig
from rpg.models.recurrent_diffusion import RecurrentConfig, RecurrentDiffusion
from tokenization.layouts import Layout

__all__ = ["KINDS", "KernelRidgeConfig", "ModelConfig", "Network", "PDiffConfig", "RecurrentConfig", "build_network"]


class Kind(NamedTuple):
    """Where the parts of a kind are, as ``module:name``; each is imported when it is needed.

    Attributes:
        config: the class of its configuration, whose literal ``kind`` names it.
        network: the class of its networks, which `of_layout` makes.
        trainer, sampler, estimator: what trains them, samples from them, and tells what both take.
    """

    config: str
    network: str
    trainer: str
    sampler: str
    estimator: str


MODELS, SANE = "rpg.models", "rpg.labs.sane"

KINDS = {
    "recurrent": Kind(
        f"{MODELS}.recurrent_diffusion:RecurrentConfig", f"{MODELS}.recurrent_diffusion:RecurrentDiffusion",
        "rpg.training.trainer:Trainer", "rpg.generation.sampler:TokenSampler",
        "rpg.planning.estimators:RecurrentEstimator",
    ),
    "pdiff": Kind(
        f"{MODELS}.pdiff:PDiffConfig", f"{MODELS}.pdiff:ParameterDiffusion", "rpg.training.whole_networks:PDiffTrainer",
        "rpg.generation.whole_networks:LatentSampler", "rpg.planning.estimators:PDiffEstimator",
    ),
    "kernel_ridge": Kind(
        f"{MODELS}.kernel_ridge:KernelRidgeConfig", f"{MODELS}.kernel_ridge:KernelRidgeGenerator",
        "rpg.training.whole_networks:ClosedFormTrainer", "rpg.generation.whole_networks:PosteriorSampler",
        "rpg.planning.estimators:KernelRidgeEstimator",
    ),
    "sane": Kind(
        f"{SANE}.model:SaneConfig", f"{SANE}.model:TokenAutoencoder", f"{SANE}.parts:SaneTrainer",
        f"{SANE}.parts:CodeSampler", f"{SANE}.parts:SaneEstimator",
    ),
}  # fmt: skip
"""Every ``model.kind``: a new one is entered here and nowhere else."""

if TYPE_CHECKING:
    ModelConfig: TypeAlias = RecurrentConfig | PDiffConfig | KernelRidgeConfig
else:
    ModelConfig = Annotated[
        reduce(or_, (resolve_name(each.config) for each in KINDS.values())), Field(discriminator="kind")
    ]
Network: TypeAlias = RecurrentDiffusion | ParameterDiffusion | KernelRidgeGenerator


def part_of(config: ModelConfig, part: str) -> Any:
    """A part of a configuration's kind: ``network``, ``trainer``, ``sampler`` or ``estimator``."""
    return resolve_name(getattr(KINDS[config.kind], part))


def build_network(config: ModelConfig, layout: Layout, num_states: int = 1, condition_size: int = 0) -> Network:
    """The untrained networks that a configuration describes, drawn from torch's global random state.

    A condition has ``condition_size`` values (if it is a text, the sentence encoder's width); 0 without one.
    """
    made: Network = part_of(config, "network").of_layout(config, layout, num_states, condition_size)
    return made
