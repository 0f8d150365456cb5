"""The configuration of an experiment: sections for training, generation and evaluation, in one strict YAML tree."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from rpg.models import ModelConfig, RecurrentConfig
from rpg.section import (
    Section,
    default_config,
    exists,
    migrate,
    read_mapping,
    require_known,
    validated,
    with_model_kind,
)
from rpg.tasks.config import TaskConfig
from tokenization.errors import InputError
from tokenization.layout.layout import TokenOptions


class BehaviourConfig(Section):
    """The behaviour loss; weight 0 keeps its fraction of the batch at the last time and asks no behaviour of it."""

    weight: float = Field(1.0, ge=0, description="weight beside the weight-space loss")
    images: int = Field(128, ge=1, description="training images a step")
    target: Literal["labels", "base", "original", "both"] = Field(
        "labels",
        description="right answers: the images' labels, the base network's class probabilities, or those of the very "
        "checkpoint that is learned, so that what it does differently from others of its task is learned, too; both: "
        "the mean of base and checkpoint. With a metric: labels asks for its value, original for the checkpoint's "
        "answers, both for the sum",
    )
    tasks: Literal["zoo", "fresh"] = Field(
        "zoo", description="the tasks of the batch, or fresh ones in every step, of a family that draws them"
    )
    networks: int = Field(32, ge=1, description="with fresh tasks: networks a step")
    noise: float = Field(
        0.0, ge=0, description="standard deviation of noise on images, of sensors: networks that bear it are found "
        "between the tasks of a small zoo, too; of a metric, where the checkpoint's answers are asked for"
    )  # fmt: skip
    temperature: float = Field(
        1.0, gt=0, description="of groupings, what the log-odds of right answers are divided by: below 1 they are surer"
    )  # fmt: skip
    fraction: float = Field(0.5, gt=0, le=1, description="fraction of the batch whose tokens are all at the last time")


class NewStatesConfig(Section):
    """The loss of networks of new permutation states, which no checkpoint has."""

    weight: float = Field(1.0, gt=0, description="of the cross-entropy")
    spread: float = Field(1.0, ge=0, description="of the penalty on networks nearer one another than their temperature")
    temperature: float = Field(4.0, ge=1, description="widest states, in the spread of the learned ones; from 1 on")
    networks: int = Field(8, ge=2, description="networks a step")
    images: int = Field(128, ge=1, description="training images a step")
    start: float = Field(0.5, ge=0, lt=1, description="fraction of the steps before it sets in")


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="checkpoints a step, over all processes")
    splits: tuple[str, ...] = Field(("train",), min_length=1, description="splits of the zoo that are trained on")
    imitation: float = Field(
        1.0, ge=0, description="weight of the weight-space loss; 0: networks are taught by what they do alone, and no "
        "checkpoint is read"
    )  # fmt: skip
    networks: str | None = Field(
        None, description="run whose networks are taken and stay as they are: only what reads examples or words as "
        "settings is trained (model.condition.read, or phrases)"
    )  # fmt: skip
    tokens: int | None = Field(None, ge=1, description="tokens sampled of each checkpoint a step; all when null")
    learning_rate: float = Field(3e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up; a cosine to 0 follows")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    gradient_accumulation: int = Field(1, ge=1, description="parts a step's batch is cut into, to save memory")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: moments of 8 bits (bitsandbytes)")
    compile: Literal["inductor", "aot_eager", "eager"] | None = Field(
        None, description="backend of torch.compile for the networks; inductor: a slow start, then faster steps"
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the weight average that is saved")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is faster so")
    save_every: int = Field(500, ge=1, description="steps between resumable checkpoints")
    keep: int = Field(2, ge=1, description="how many resumable checkpoints stay on disk")
    behaviour: BehaviourConfig | None = Field(None, description="score predicted networks by what they answer")
    new_states: NewStatesConfig | None = Field(
        None, description="score networks of permutation states that no checkpoint has"
    )
    log_with: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        ("tensorboard",),
        description="where losses go beside metrics.jsonl; wandb: Weights & Biases, if wandb is installed",
    )
    log_every: int = Field(10, ge=1, description="steps between logged losses")

    @property
    def draws_tasks(self) -> bool:
        """Whether fresh tasks are drawn in every step."""
        return self.behaviour is not None and self.behaviour.tasks == "fresh"

    @model_validator(mode="after")
    def _something_teaches(self) -> TrainConfig:
        if not self.imitation and (self.behaviour is None or not self.behaviour.weight or self.new_states is not None):
            raise ValueError("imitation: 0 leaves nothing to learn from; give behaviour a weight, without new_states")
        if self.networks is not None and self.imitation:
            raise ValueError("networks of another run learn nothing more; set imitation to 0")
        return self


class GenerateConfig(Section):
    """Sampling."""

    sampler: str | None = Field(None, description="euler or heun (flow); ddpm, ddim or dpm-solver++ (ddpm)")
    steps: int = Field(4, ge=1, description="sampling steps")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's share of fresh noise")
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1 is none")
    state: Literal["stored", "density", "gaussian", "prior"] = Field(
        "stored",
        description="permutation state: a training run's own; a fresh one from a kernel density of them all, or from a "
        "Gaussian; or from the diffusion over codes (model.state.prior)",
    )
    temperature: float = Field(
        1.0,
        ge=0,
        description="spread of fresh states, of kernel ridge's draws or of SANE's kernels, in that of the zoo",
    )
    tile_tokens: int = Field(512, ge=1, description="tokens computed together; part of what decides the bytes")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the networks")


TAUS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
"""Distances at which novelty is reported, in units of the zoo's median nearest-neighbour distance."""


Baseline = Literal[
    "noise", "run_average", "average_of_k", "interpolation", "coordinate_gaussian", "covariance_gaussian",
    "low_rank_gaussian", "noise_at_distance", "coordinate_gaussian_at_distance", "sharpened_gaussian_at_distance",
    "covariance_gaussian_at_distance", "low_rank_gaussian_at_distance", "run_coordinate_gaussian_at_distance",
    "run_sharpened_gaussian_at_distance", "run_covariance_gaussian_at_distance", "extrapolation_at_distance",
    "nearest_seen", "kernel_ridge", "merge_linear", "merge_slerp", "merge_ties", "merge_dare_linear",
    "merge_dare_ties", "merge_model_stock", "peft_linear", "peft_svd", "peft_ties", "peft_dare_linear",
    "peft_dare_ties",
]  # fmt: skip
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


def _known_options(values: Any) -> Any:
    return require_known(values, [field.name for field in fields(TokenOptions)])


class Config(Section):
    """An experiment."""

    seed: int = Field(0, ge=0)
    run: str = Field("runs/run", description="the run folder")
    zoo: str = Field("runs/zoo", description="the zoo folder")
    task: TaskConfig | None = Field(
        None, description="what collects and scores checkpoints; null for a zoo of your own"
    )
    tokens: Annotated[TokenOptions, BeforeValidator(_known_options)] = TokenOptions()
    model: ModelConfig = RecurrentConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _joint_denoiser_takes_all_tokens(self) -> Config:
        if isinstance(self.model, RecurrentConfig) and self.model.denoiser.kind == "joint" and self.train.tokens:
            raise ValueError("train.tokens must be null with model.denoiser.kind joint, which looks at all tokens")
        return self

    @classmethod
    def load(cls, path: Path | str, overrides: list[str] | None = None) -> Config:
        """Read a YAML file; ``overrides`` are ``section.field=value`` with YAML values.

        A file may name another as ``extends: other.yaml`` (relative to itself) and say only what differs. Of several,
        ``extends: [first.yaml, second.yaml]``, later ones win. A ``configs/…`` that is not there is the package's own.

        Raises:
            InputError: the file is missing or not YAML, a key is unknown, or a value is impossible.
        """
        path = Path(path)
        if path.parts[:1] == ("configs",) and not exists(path):
            own = default_config(str(Path(*path.parts[1:])))
            path = own if exists(own) else path
        tree = with_model_kind(_read_tree(path))
        for override in overrides or []:
            _apply(tree, override)
        return cls.parse(tree, str(path))

    @classmethod
    def defaults(cls, overrides: list[str] | None = None) -> Config:
        """The defaults with ``overrides`` as in ``load``. Raises InputError for an unknown key or impossible value."""
        return cls.parse(overridden({}, overrides or []), "--set")

    @classmethod
    def parse(cls, tree: dict[str, Any], where: str) -> Config:
        """Validate a tree of plain values; ``where`` names it in errors."""
        return validated(cls, with_model_kind(migrate(tree)), where)

    def save(self, path: Path | str) -> None:
        """Write every value, defaults included, as YAML."""
        Path(path).write_text(yaml.safe_dump(self.plain(), sort_keys=False))

    def plain(self) -> dict[str, Any]:
        """The tree as plain values (JSON types)."""
        return self.model_dump(mode="json")


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path} extends itself; remove one of the extends lines")
    tree = read_mapping(path, "a YAML configuration (see configs/ for examples)")
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise InputError(f"{path}: extends is {parents!r}; name one file or a list of files, relative to this one.")
    base: dict[str, Any] = {}
    for parent in parents:
        base = _merge(base, _read_tree(path.parent / parent, (*seen, path.resolve())))
    return _merge(base, migrate(tree))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``; a section whose ``kind`` (or ``name``) changes starts afresh."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            tag = "kind" if "kind" in old else "name"  # a metric has both: its name is no kind
            same_kind = value.get(tag, old.get(tag)) == old.get(tag)
            merged[key] = _merge(old, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def overridden(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a configuration's tree with ``section.field=value`` put in. Raises InputError for what is no change."""
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        _apply(changed, override)
    return changed


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(
            f"--set {override!r} is no change; write section.field=value, for example --set train.steps=100"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {key} has {text!r}, which is no YAML value; correct it") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    change: Any = value
    for part in reversed(key.strip().split(".")):
        change = {part: change}
    tree.update(_merge(tree, migrate(change)))
