"""The arithmetic between values and tokens.

A token value is ``y = (f(x) - centre) / scale``. In the mode ``layer`` centre and scale are the mean and the standard
deviation of a tensor over the zoo (the paper's, arXiv 2501.11587 section 3.1); in ``residual`` the centre is each
parameter's mean over the zoo and the scale the root mean square of what remains, one number a layer; in ``none``
``y = x``. ``f`` is the identity but for running variances, where ``f(v) = log(v / (0.95 mean v) + 0.05)``.

A layer that is the same in the whole zoo has the scale 0: its tokens are 0 and it decodes to the zoo's values whatever
the tokens say, so that a generator's noise never reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorFile, TensorSpec
from tokenization.layout.placement import Layer, Normalization

NUMBERS = ("layer.centre", "layer.scale", "layer.variance_mean")
"""Tensors ``[K]`` of a file of statistics."""

VARIANCE_SHARE, VARIANCE_OFFSET = 0.95, 0.05
SMALL = 1 << 22
"""Bytes of a file of statistics up to which it is held in memory: mapping it takes longer than computing with it."""

LARGEST_LOG = 80.0
"""Generated log variances are cut here: e^80 is still finite in float32."""


class TensorSource(Protocol):
    """Named flat tensors; a `Checkpoint` is one, and reads them from its memory map."""

    def flat(self, name: str) -> Tensor:
        """All values of a tensor, 1-D."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A `TensorSource` of tensors that take little room: nothing is mapped or let go."""

    tensors: Mapping[str, Tensor]

    def flat(self, name: str) -> Tensor:
        """All values of a tensor, 1-D."""
        return self.tensors[name]


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's way between values and tokens.

    Attributes:
        centre: a number, or one for each value, ``[num_values]`` (``residual``).
        scale: 0 for a layer without variation.
        variance_mean: the layer's mean where it goes through the logarithm, else 0.
        identity: values are copied as they are.
    """

    centre: float | Tensor
    scale: float
    variance_mean: float = 0.0
    identity: bool = False

    def centre_at(self, where: Any) -> float | Tensor:
        """The centres of the values at ``where``, an index into the flattened layer."""
        return self.centre[where] if isinstance(self.centre, Tensor) else self.centre

    def centre_window(self, num_runs: int, run_length: int) -> Callable[[Any], float | Tensor]:
        """A function from an index into the layer as ``[num_runs, run_length]`` to the centres there."""
        centre = self.centre
        if not isinstance(centre, Tensor):
            return lambda where: centre
        window = centre.view(num_runs, run_length)
        return lambda where: window[where]

    def normalize(self, values: Tensor, centre: float | Tensor) -> Tensor:
        """Values in the stored dtype → tokens, elementwise; float64 unless identity.

        Args:
            values: any shape.
            centre: ``self.centre``, or the part of it that belongs to ``values``, in their shape.
        """
        if self.identity:
            return values
        tokens = values.to(torch.float64, copy=True)
        if self.variance_mean:
            tokens.clamp_(min=0).mul_(1 / (VARIANCE_SHARE * self.variance_mean)).add_(VARIANCE_OFFSET).log_()
        return tokens.sub_(centre).mul_(1 / self.scale if self.scale else 0.0)

    def denormalize(self, tokens: Tensor, centre: float | Tensor) -> Tensor:
        """Tokens → values, the inverse of ``normalize``; float64 unless identity. Variances are cut at 0.

        What is too small beside the centre for the tokens' dtype to tell from 0 becomes 0: zeros stay zeros.
        """
        if self.identity:
            return tokens
        values = self.denormalize_as(tokens.to(torch.float64), centre)
        if not self.scale:
            return values
        resolution = max(torch.finfo(tokens.dtype).eps * 0.500001, 2.0**-51)
        if self.variance_mean:
            return torch.hardshrink(values, 16 * resolution * VARIANCE_OFFSET * self.variance_mean)
        if isinstance(centre, Tensor):
            return values.masked_fill_(values.abs() <= centre.abs() * resolution, 0)
        return torch.hardshrink(values, resolution * abs(centre))

    def denormalize_as(self, tokens: Tensor, centre: float | Tensor) -> Tensor:
        """``denormalize`` in the tokens' own dtype, differentiable."""
        if self.identity:
            return tokens
        # A generator's NaN or infinity must not reach a layer that never varies.
        values = tokens * self.scale + centre if self.scale else torch.zeros_like(tokens) + centre
        if self.variance_mean:
            values = values.clamp(max=LARGEST_LOG).exp() - VARIANCE_OFFSET
            values = (values * (VARIANCE_SHARE * self.variance_mean)).clamp(min=0)
        return values


@dataclass(frozen=True)
class Statistics:
    """The statistics of all layers.

    Attributes:
        normalization: the mode.
        centre, scale, variance_mean: as in `LayerStatistics`, ``[K]`` float64; the centre is 0 in ``residual``.
        means: per-parameter means under ``centre.<layer name>`` (``residual``), else None.
    """

    normalization: Normalization
    centre: Tensor
    scale: Tensor
    variance_mean: Tensor
    means: TensorSource | None = None

    @classmethod
    def identity(cls, num_layers: int) -> Statistics:
        """Those of the mode ``none``."""
        zeros = torch.zeros(num_layers, dtype=torch.float64)
        return cls("none", zeros, torch.ones_like(zeros), zeros)

    @classmethod
    def read(cls, source: TensorSource, normalization: Normalization) -> Statistics:
        """Those in a file of the tensors that `statistics_specs` names; many per-parameter means stay in it."""
        centre, scale, variance_mean = (source.flat(name).clone() for name in NUMBERS)
        if isinstance(source, Checkpoint) and sum(source.sizes.values()) <= SMALL:
            source = InMemory({name: source.flat(name).clone() for name in source.tensors})
        return cls(normalization, centre, scale, variance_mean, source if normalization == "residual" else None)

    def write_numbers(self, file: TensorFile) -> None:
        """Put all but the per-parameter means into a file."""
        for name, numbers in zip(NUMBERS, (self.centre, self.scale, self.variance_mean), strict=True):
            file.write(name, 0, numbers)

    def layer(self, index: int, name: str) -> LayerStatistics:
        """One layer's statistics; per-parameter means stay where they are."""
        if self.normalization == "none":
            return LayerStatistics(0.0, 1.0, identity=True)
        centre = float(self.centre[index]) if self.means is None else self.means.flat(mean_name(name))
        return LayerStatistics(centre, float(self.scale[index]), float(self.variance_mean[index]))

    def release(self, layer_name: str) -> None:
        """Let go of the pages that a layer's per-parameter means take."""
        if isinstance(self.means, Checkpoint):
            self.means.release(mean_name(layer_name))


def mean_name(layer_name: str) -> str:
    """Under which name a layer's per-parameter means are stored."""
    return f"centre.{layer_name}"


def statistics_specs(layers: Sequence[Layer], normalization: Normalization) -> dict[str, TensorSpec]:
    """Dtype and shape of the tensors that hold the statistics of K layers, by name: ``[K]``, and the layers' own."""
    specs: dict[str, TensorSpec] = {name: (torch.float64, (len(layers),)) for name in NUMBERS}
    for layer in layers if normalization == "residual" else ():
        # Wide enough that rounding the means costs nothing that matters.
        wide = torch.float64 if layer.real_dtype == torch.float64 else torch.float32
        specs[mean_name(layer.name)] = (wide, layer.real_shape)
    return specs
