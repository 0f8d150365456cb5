"""Conditions, encoded as one vector of the model's width; sets of examples by a deep set (arXiv 1703.06114).

A set holds any number of examples, labelled or not, in any order: features of each, averaged by class and over all,
with the largest of each.

B examples or sets, C condition values, H model width; n examples of a set, P values of an example, K classes,
F features."""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from rpg.models.code_prior import CodePriorConfig
from rpg.section import Section

NUM_FEATURES, WIDTH = 64, 256
"""F, and of the layers after pooling."""


def row_size(num_values: int, num_classes: int) -> int:
    """How many numbers stand for an example: its values, its class one-hot (zeros if unknown), and 1."""
    return num_values + num_classes + 1


def example_rows(values: Tensor, classes: Tensor | None, num_classes: int) -> Tensor:
    """Examples with values ``[…, n, P]`` as numbers, ``[…, n, P + K + 1]``.

    Classes ``[…, n]`` (long) are -1 where one is unknown; None where all are.
    """
    known = values.new_zeros(*values.shape[:-1], num_classes)
    if classes is not None:
        known.scatter_(-1, classes.clamp(min=0)[..., None], (classes >= 0)[..., None].to(values))
    return torch.cat([values, known, values.new_ones(*values.shape[:-1], 1)], -1)


class SetEncoder(nn.Module):
    """Sets of examples of ``size`` P + K + 1 as vectors, with ``depth`` hidden layers after they are pooled."""

    def __init__(self, size: int, num_classes: int, width: int, depth: int = 1) -> None:
        super().__init__()
        self.size, self.num_classes, self.width = size, num_classes, width
        num_values = size - num_classes - 1
        inner = 2 * NUM_FEATURES
        # Phrases (without classes) need a deeper network than images, and one without corners: docs/log.md.
        activation = nn.ReLU if num_classes else nn.SiLU
        middle = [] if num_classes else [nn.Linear(inner, inner), activation()]
        self.each = nn.Sequential(
            nn.Linear(num_values, inner), activation(), *middle, nn.Linear(inner, NUM_FEATURES)
        )  # fmt: skip
        num_inputs = (num_classes + 2) * NUM_FEATURES + num_classes + 1
        sizes = [num_inputs, *[WIDTH] * depth]
        layers = [each for pair in itertools.pairwise(sizes) for each in (nn.Linear(*pair), activation())]
        self.all = nn.Sequential(*layers, nn.Linear(sizes[-1], width))

    def forward(self, sets: Tensor) -> Tensor:
        """Vectors ``[B, H]`` of sets ``[B, n · (P + K + 1)]``; rows whose last number is 0 are padding."""
        rows = rearrange(sets, "b (n row) -> b n row", row=self.size)
        values, classes, there = rows.split([self.size - self.num_classes - 1, self.num_classes, 1], -1)
        features = values.new_zeros(*values.shape[:2], NUM_FEATURES)  # [B, n, F]
        known = there[..., 0] > 0
        features[known] = self.each(values[known]).to(features)  # padding costs nothing
        sums = classes.mT.to(features) @ features  # [B, K, F]
        counts = classes.sum(1)  # [B, K]
        by_class = sums / counts.clamp(min=1)[..., None]  # zero where a class is missing
        total = there.sum(1).clamp(min=1)  # [B, 1]
        mean = (features * there).sum(1) / total
        largest = features.masked_fill(there == 0, -torch.inf).amax(1)
        return self.all(torch.cat([by_class.flatten(1), mean, largest, counts.clamp(max=1), 1 / total], -1))


class ConditionConfig(Section):
    """What the generator is conditioned on."""

    kind: Literal["none", "binary", "class", "vector", "text", "metric", "examples"] = Field(
        "none",
        description="none; binary vector; class index; real vector; text (an embedding vector); a metric of the zoo's "
        "manifest; examples of what the network is to do, which the zoo's task shows",
    )
    encoder: str | None = Field(
        None,
        description="of text: wordllama (static embeddings, in its package), or a sentence encoder for transformers by "
        "name or local path; its vectors are kept",
    )
    phrases: int = Field(
        0, ge=0, description="of text: descriptions of so many phrases at most, which the zoo's task makes afresh in "
        "every step and which are encoded one by one; 0: the zoo's own texts, encoded whole"
    )  # fmt: skip
    features: int = Field(
        0, ge=0, description="of phrases: how many numbers networks see of the zoo's settings; descriptions are read "
        "as these. Of examples: as many, which the encoder is taught to tell from them, beside what it finds by itself"
    )  # fmt: skip
    depth: int = Field(
        1, ge=1, description="of examples and phrases: hidden layers after what is known of single ones is pooled"
    )  # fmt: skip
    read: bool = Field(
        False, description="of examples with features: networks see these alone, and are taught by the true ones; from "
        "few tasks that errs less"
    )  # fmt: skip
    name: str | None = Field(None, description="of a metric: its name in the manifest, e.g. loss")
    scale: Literal["log", "linear"] = Field("log", description="of a metric: which of its differences count the same")
    counts: tuple[int, ...] = Field(
        (), description="of examples: how many a training set has, one of these at random; where they are enough "
        "for all classes, classes take turns"
    )  # fmt: skip
    classes: int = Field(0, ge=0, description="of examples: how many classes they may be of")
    labelled: float = Field(0.5, ge=0, le=1, description="of examples: share of training sets whose classes are told")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of training examples that see no condition (guidance)")
    withhold: float = Field(
        0.0, ge=0, lt=1, description="share of a binary condition's bits that a training example is not told; "
        "train.behaviour passes over the images of their classes"
    )  # fmt: skip
    inject: Literal["both", "backbone", "last_tokens", "prior"] = Field(
        "both",
        description="backbone input and denoiser; backbone input only; only the last tokens' backbone input; only the "
        "prior over codes, so that a code says all of a network",
    )
    last_tokens: int = Field(8, ge=1, description="with inject last_tokens: how many tokens see the condition")

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> ConditionConfig:
        if self.phrases and (self.kind != "text" or not self.features):
            raise ValueError("phrases needs kind: text and features")
        if self.read and (self.kind != "examples" or not self.features):
            raise ValueError("read needs kind: examples and features")
        if self.withhold and self.kind != "binary":
            raise ValueError("withhold needs kind: binary")
        if (self.kind == "metric") != (self.name is not None):
            raise ValueError("kind: metric needs a name, and no other kind has one")
        if (self.kind == "examples") != bool(self.counts) or min(self.counts, default=1) < 1:
            raise ValueError("kind: examples needs counts of at least 1, and no other kind has them")
        return self


class ConditionEncoder(nn.Module):
    """A condition ``[B, C]`` as an embedding ``[B, H]``; a dropped one becomes a learned null embedding.

    Where a text is a set of phrases, or examples are to be read, it is first read as ``features`` numbers, and these
    are taken, too. Of other examples the first ``features`` numbers of an embedding are what tasks are told by.

    Args:
        config: of any kind but ``none``.
        size: C; for ``class`` the number of classes (and the condition itself is ``[B, 1]``), for ``text`` the width
            of the sentence encoder, for ``examples`` what `row_size` says (and the condition is ``[B, n · size]``).

    Attributes:
        told: of examples with F: those numbers of the last batch, ``[B, F]``; None otherwise.
    """

    told: Tensor | None

    def __init__(self, config: ConditionConfig, size: int, width: int) -> None:
        super().__init__()
        self.kind = kind = config.kind
        self.null = nn.Parameter(torch.randn(width) * 0.02)
        self.network: nn.Module
        told, classes, depth = kind == "examples" and not config.read, config.classes, config.depth
        self.features, self.told = config.features if told else 0, None
        self.reader: SetEncoder | None = None
        if config.features and not told:
            self.reader = SetEncoder(size, classes, config.features, depth)
        size = size if self.reader is None else config.features
        if kind == "class":
            self.network = nn.Embedding(size, width)
        elif told:
            self.network = SetEncoder(size, classes, width, depth)
        else:
            self.network = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed ``condition`` ``[B, C]``; rows where ``dropped`` ``[B]`` is true get the null embedding."""
        if self.reader is not None and condition.shape[1] != self.reader.width:
            condition = self.reader(condition)  # [B, F]
        if self.kind in ("class", "binary"):
            condition = condition[:, 0].long() if self.kind == "class" else condition * 2 - 1  # bits as ±1
        embedded = self.network(condition)  # [B, H]
        self.told = embedded[:, : self.features] if self.features else None
        if dropped is not None:
            embedded = torch.where(dropped[:, None], self.null.to(embedded.dtype), embedded)
        return embedded


def are_new(kind: str) -> bool:
    """Whether networks are requested for unseen conditions, as with bits or vectors; classes are those of the zoo."""
    return kind != "class"


def regression_inputs(kind: str, conditions: Tensor, size: int) -> Tensor:
    """Conditions ``[B, C]`` as numbers to regress on, ``[B, size]`` float64: bits as ±1, classes one-hot."""
    if kind == "class":
        return nn.functional.one_hot(conditions[:, 0].long(), size).to(torch.float64)
    return conditions.to(torch.float64) * 2 - 1 if kind == "binary" else conditions.to(torch.float64)


class InitialConfig(Section):
    """Training pairs: a checkpoint, and one of the same run, no later, as its start."""

    first: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of examples whose start is their run's first checkpoint; else any earlier one",
    )
    own: float = Field(
        0.0, ge=0, le=1, description="share of a batch whose starts are replaced by networks that the generator makes "
        "of them at that step of its training, so that it can go on from its own networks"
    )  # fmt: skip


class StateConfig(Section):
    """The permutation state: which training run, or which checkpoint, the weights came from."""

    of: Literal["none", "run", "checkpoint", "code", "task"] = Field(
        "run",
        description="what has a learned embedding of its own; code: no embedding, but the whole checkpoint's whitened "
        "leading principal components, which tokens are a linear function of, and diffusion makes the rest; task: what "
        "the zoo says of its task, for a prior that is given something else, such as examples",
    )
    width: int | None = Field(
        64, ge=1, description="width of the embedding; null: the backbone's, to which it is added without a linear map"
    )
    initial: Literal["random", "constant"] = Field(
        "random", description="untrained embeddings: normal numbers, or 1 / width everywhere, the same for all"
    )
    shown: bool = Field(
        False, description="of code: components of what fields show on the grid of their data, in place of weights, so "
        "that a prior works in the metric in which they are compared"
    )  # fmt: skip
    neighbours: int | None = Field(
        None, ge=2, description="of code, where the condition is a class: generate.state: density draws from the "
        "Gaussians of so many checkpoints of the class that are nearest to one another"
    )  # fmt: skip
    noise: float = Field(
        0.0, ge=0, description="noise added to the embedding in training, relative to the table's own spread"
    )
    linear: bool = Field(False, description="of code or task: networks see a linear map of it, not an MLP")
    prior: CodePriorConfig | None = Field(
        None, description="of code or task: a diffusion over them, given the condition, for generate.state: prior"
    )

    @model_validator(mode="after")
    def _only_codes_have_a_prior(self) -> StateConfig:
        if self.prior is not None and self.of not in ("code", "task"):
            raise ValueError("prior needs of: code or task")
        if (self.shown or self.neighbours) and self.of != "code":
            raise ValueError("shown and neighbours need of: code")
        if self.prior is not None and self.prior.start and self.neighbours is None:
            raise ValueError("prior.start needs neighbours")
        if self.linear and self.of not in ("code", "task"):
            raise ValueError("linear needs of: code or task")
        if self.of in ("code", "task") and self.width is None:
            raise ValueError(f"of: {self.of} needs a width, how many numbers it has")
        return self


class PlainModel(Section):
    """A model without permutation states and initial weights; what it makes of a checkpoint depends on no other."""

    initial: ClassVar[None] = None
    state: ClassVar = StateConfig(of="none")
    normalises_batches: ClassVar[bool] = False


LONGEST_PERIOD = 10_000.0
"""The slowest wave repeats after about this many times 2 pi."""


def sinusoid_1d(index: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of the numbers ``index`` ``[L]`` at frequencies from 1 down to nearly 1 / 10,000.

    Returns:
        ``[L, width]`` float32, computed in float64: a float32 product is off by whole radians at large indices. Where
        ``width`` is odd the last cosine is left out.

    Raises:
        ValueError: ``width`` is below 1 or ``index`` is not 1-D.
    """
    if width < 1 or index.dim() != 1:
        raise ValueError(f"width {width} must be at least 1, and the index {list(index.shape)} of shape [L]")
    num_frequencies = (width + 1) // 2
    steps = torch.arange(num_frequencies, dtype=torch.float64, device=index.device)
    angles = index.to(torch.float64)[:, None] * LONGEST_PERIOD ** (-steps / num_frequencies)  # [L, width / 2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].to(torch.float32)


def sinusoid_2d(positions: Tensor, width: int) -> Tensor:
    """Half of the width for the layer, half for the token in the layer (which gets the odd place, if there is one).

    Positions (layer, token in the layer) ``[L, 2]`` → ``[L, width]`` float32.

    Raises:
        ValueError: ``width`` is below 2 or ``positions`` is not ``[L, 2]``.
    """
    if width < 2 or positions.dim() != 2 or positions.shape[1] != 2:
        raise ValueError(f"width {width} must be at least 2, and the positions {list(positions.shape)} of shape [L, 2]")
    layer_width = width // 2
    by_axis = [sinusoid_1d(positions[:, 0], layer_width), sinusoid_1d(positions[:, 1], width - layer_width)]
    return torch.cat(by_axis, dim=1)


def position_embedding(kind: str, positions: Tensor, width: int) -> tuple[bool, Tensor]:
    """Whether the embedding is learned, and its (initial) value ``[L, H]``."""
    if kind == "2d":
        return False, sinusoid_2d(positions, width)
    if kind == "layer":
        return False, sinusoid_1d(positions[:, 0], width)
    if kind == "1d":
        return False, sinusoid_1d(torch.arange(len(positions)), width)
    if kind == "learned":
        return True, torch.randn(len(positions), width) * 0.02
    return False, torch.zeros(len(positions), width)
