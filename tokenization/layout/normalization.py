"""The arithmetic between values and tokens, and its statistics, measured in one streaming pass over a zoo.

A token value is ``y = (f(x) - centre) / scale``. In the mode ``layer`` centre and scale are the mean and the standard
deviation of a tensor over the zoo (the paper's, arXiv 2501.11587 section 3.1); in ``residual`` the centre is each
parameter's mean over the zoo and the scale the root mean square of what remains, one number a layer; in ``none``
``y = x``. ``f`` is the identity but for running variances, where ``f(v) = log(v / (0.95 mean v) + 0.05)``.

A layer that is the same in the whole zoo has the scale 0: its tokens are 0 and it decodes to the zoo's values whatever
the tokens say, so that a generator's noise never reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint, num_not_finite
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.safetensors import TensorSpec, tensor_at
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.layout.placement import BLOCK_VALUES, Layer, Normalization, as_reals
from tokenization.zoo.cache import cached_tensors
from tokenization.zoo.zoo import Zoo

NUMBERS = ("layer.centre", "layer.scale", "layer.variance_mean")
"""Tensors ``[K]`` of a file of statistics."""

VARIANCE_SHARE, VARIANCE_OFFSET = 0.95, 0.05
SMALL = 1 << 22
"""Bytes of a file of statistics up to which it is held in memory: mapping it takes longer than computing with it."""

LARGEST_LOG = 80.0
"""Generated log variances are cut here: e^80 is still finite in float32."""


@dataclass(frozen=True)
class InMemory:
    """Named flat tensors that take little room: nothing is mapped or let go."""

    tensors: Mapping[str, Tensor]

    def flat(self, name: str) -> Tensor:
        """All values of a tensor, 1-D."""
        return self.tensors[name]


TensorSource = Checkpoint | InMemory


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

    def in_runs(self, layer: Layer) -> LayerStatistics:
        """The same with centres ``[num_runs, run_length]`` where each value has its own."""
        if not isinstance(self.centre, Tensor):
            return self
        return replace(self, centre=self.centre.view(layer.num_runs, layer.run_length))

    def normalize(self, values: Tensor, centre: float | Tensor) -> Tensor:
        """Values of any shape in the stored dtype → tokens, with their ``centre``, in float64 unless identity."""
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
    """Of all layers, as in `LayerStatistics`, ``[K]`` float64; the centre is 0 in ``residual``.

    ``means`` has the per-parameter means under ``centre.<layer name>`` (``residual``), else it is None.
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


VERSION = 1
"""Changes when the same zoo is measured differently."""

JOB_VALUES = 1 << 25
"""Values (over all checkpoints) that one thread reads before it lets their pages go."""

MOST_THREADS = 8
"""More would only wait for the disk."""


@dataclass
class Moments:
    """Count, mean and sum of squared deviations, merged as in Chan, Golub and LeVeque (1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """The moments of float64 values."""
        mean = float(values.mean())
        deviation = values - mean
        squares = float(torch.dot(deviation, deviation))
        first = float(values[0])
        # The mean of equal values can round away from them, which would give a constant layer a variance.
        if squares <= len(values) * (1e-15 * mean) ** 2 and bool((values == first).all()):
            return cls(len(values), first, 0.0)
        return cls(len(values), mean, squares)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of values together."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta * delta * (self.count * other.count / count)
        return Moments(count, self.mean + delta * (other.count / count), squares)


def fitted_statistics(
    zoo: Zoo,
    indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[Layer],
    normalization: Normalization,
    form: str | None,
) -> Statistics:
    """`fit_statistics` of a zoo's entries ``indices``, from its cache or measured now.

    ``checkpoints`` are those entries in the form, of this key, in which they are cut into tokens.
    """
    specs = statistics_specs(layers, normalization)

    def write(file: TensorFile) -> None:
        def write_means(name: str, first: int, values: Tensor) -> None:
            file.write(name, first, values.to(specs[name][0]))

        fit_statistics(checkpoints, layers, normalization, write_means).write_numbers(file)

    key = [VERSION, zoo.digest(), list(indices), normalization, [layer.name for layer in layers], form]
    return Statistics.read(cached_tensors(zoo, "statistics", key, specs, write), normalization)


def fit_statistics(
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[Layer],
    normalization: Normalization,
    write_means: Callable[[str, int, Tensor], None],
    num_threads: int | None = None,
) -> Statistics:
    """Stream checkpoints of one structure once and measure every layer, whatever the number of threads.

    ``write_means`` takes name, first place and values of a stretch of per-parameter means, on any thread.

    Raises InputError that names file and tensor where a value is NaN or infinite.
    """
    residual = normalization == "residual"
    measure = _measure_residual if residual else _measure_layer
    variance_means = [_variance_mean(checkpoints, layer, normalization) for layer in layers]
    step = max(BLOCK_VALUES, JOB_VALUES // len(checkpoints))
    jobs = [(index, first) for index, layer in enumerate(layers) for first in range(0, layer.num_values, step)]

    def work(job: tuple[int, int]) -> Moments:
        index, first = job
        layer = layers[index]
        flats = [as_reals(checkpoint.flat(layer.name))[first : first + step] for checkpoint in checkpoints]
        transform = LayerStatistics(0.0, 1.0, variance_means[index])
        moments = measure(flats, transform, lambda at, means: write_means(mean_name(layer.name), first + at, means))
        for checkpoint in checkpoints:
            checkpoint.release(layer.name, first, first + step)
        if not math.isfinite(moments.mean) or not math.isfinite(moments.squares):
            _raise_not_finite(checkpoints, layer)
        return moments

    totals = [Moments() for _ in layers]
    with ThreadPoolExecutor(num_threads or min(MOST_THREADS, torch.get_num_threads())) as pool:
        measured = zip(jobs, pool.map(work, jobs), strict=True)
        for (index, _), moments in steps("measuring the zoo", measured, len(jobs)):
            totals[index] = totals[index].merge(moments)
    centre = [0.0 if residual else moments.mean for moments in totals]
    scale = [math.sqrt(moments.squares / moments.count) for moments in totals]
    first, second, third = (torch.tensor(each, dtype=torch.float64) for each in (centre, scale, variance_means))
    return Statistics(normalization, first, second, third)


def _measure_layer(flats: Sequence[Tensor], transform: LayerStatistics, _: Callable[[int, Tensor], None]) -> Moments:
    moments = Moments()
    for block in (block for flat in flats for block in flat.split(BLOCK_VALUES)):
        moments = moments.merge(Moments.of(transform.normalize(block, 0.0)))
    return moments


def _measure_residual(
    flats: Sequence[Tensor], transform: LayerStatistics, write: Callable[[int, Tensor], None]
) -> Moments:
    """Each parameter's mean, and the sum of squared deviations from them all (Welford 1962)."""
    squares = 0.0
    for first in range(0, len(flats[0]), BLOCK_VALUES):
        blocks = (transform.normalize(flat[first : first + BLOCK_VALUES], 0.0) for flat in flats)
        mean = next(blocks)
        for count, values in enumerate(blocks, start=2):
            delta = values - mean
            mean.add_(delta, alpha=1 / count)
            squares += float(torch.dot(delta, values.sub_(mean)))
        if not math.isfinite(squares) or not bool(torch.isfinite(mean).all()):
            return Moments(1, math.nan, math.nan)
        write(first, mean)
    return Moments(len(flats) * len(flats[0]), 0.0, max(squares, 0.0))


def _variance_mean(checkpoints: Sequence[Checkpoint], layer: Layer, normalization: Normalization) -> float:
    """Mean of a running variance over the zoo; 0 for other layers, and for what cannot go through the logarithm."""
    if not layer.name.endswith("running_var"):
        return 0.0
    moments, varies = Moments(), False
    for checkpoint in checkpoints:
        values = checkpoint.flat(layer.name).to(torch.float64)
        if not bool((values >= 0).all()):
            return 0.0
        varies = varies or not torch.equal(values, checkpoints[0].flat(layer.name).to(torch.float64))
        moments = moments.merge(Moments.of(values))
    # Without variation it decodes to what is stored, to which the logarithm would add its rounding.
    varies = varies if normalization == "residual" else moments.squares > 0
    return moments.mean if varies and math.isfinite(moments.mean) else 0.0


def _raise_not_finite(checkpoints: Sequence[Checkpoint], layer: Layer) -> None:
    for checkpoint in checkpoints:
        if num_not_finite(checkpoint.flat(layer.name)):
            what = f"{tensor_at(checkpoint.path, layer.name)} has NaN or infinite values"
            raise InputError(f"{what}; leave the checkpoint out of the zoo")
    what = f"{tensor_at(checkpoints[0].path, layer.name)} has values too large to measure, of 1e150 or more"
    raise InputError(f"{what}; list it in tokens.exclude, or set tokens.normalization to none")
