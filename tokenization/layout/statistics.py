"""Measure a zoo: the statistics of every layer in one streaming pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.progress import steps
from tokenization.checkpoint.safetensors import tensor_at
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.layout.normalization import LayerStatistics, Statistics, mean_name, statistics_specs
from tokenization.layout.placement import BLOCK_VALUES, Layer, Normalization, as_reals
from tokenization.zoo.cache import cached_tensors
from tokenization.zoo.zoo import Zoo

VERSION = 1
"""Changes when the same zoo is measured differently."""

VARIANCE_SUFFIX = "running_var"

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


WriteMeans = Callable[[str, int, Tensor], None]
"""Takes (name, first value, values) of a stretch of per-parameter means."""


def fitted_statistics(
    zoo: Zoo,
    indices: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[Layer],
    normalization: Normalization,
    form: str | None,
) -> Statistics:
    """The statistics of a zoo, from its cache or measured now.

    Args:
        zoo: whose cache.
        indices: its entries to measure.
        checkpoints: those entries as they are cut into tokens.
        layers: the tokenised tensors.
        normalization: the mode.
        form: key of the canonical form that the checkpoints are in, if any.

    Raises:
        InputError: a value is NaN or infinite; names file and tensor.
    """
    specs = statistics_specs(layers, normalization)

    def write(file: TensorFile) -> None:
        def write_means(name: str, first: int, values: Tensor) -> None:
            file.write(name, first, values.to(specs[name][0]))

        numbers = fit_statistics(checkpoints, layers, normalization, write_means)
        Statistics(normalization, *numbers).write_numbers(file)

    key = [VERSION, zoo.digest(), list(indices), normalization, [layer.name for layer in layers], form]
    return Statistics.read(cached_tensors(zoo, "statistics", key, specs, write), normalization)


def fit_statistics(
    checkpoints: Sequence[Checkpoint],
    layers: Sequence[Layer],
    normalization: Normalization,
    write_means: WriteMeans,
    num_threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stream the zoo once and measure every layer. The result does not depend on the number of threads.

    Args:
        checkpoints: of one structure.
        write_means: receives the per-parameter means (``residual`` only), from several threads.

    Returns:
        centre, scale and variance_mean, ``[K]`` float64 each.

    Raises:
        InputError: a value is NaN or infinite; names file and tensor.
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
    return tuple(torch.tensor(numbers, dtype=torch.float64) for numbers in (centre, scale, variance_means))  # type: ignore[return-value]


def _blocks(num_values: int) -> Iterator[slice]:
    for first in range(0, num_values, BLOCK_VALUES):
        yield slice(first, first + BLOCK_VALUES)


def _measure_layer(flats: Sequence[Tensor], transform: LayerStatistics, _: Callable[[int, Tensor], None]) -> Moments:
    moments = Moments()
    for flat in flats:
        for block in _blocks(len(flat)):
            moments = moments.merge(Moments.of(transform.normalize(flat[block], 0.0)))
    return moments


def _measure_residual(
    flats: Sequence[Tensor], transform: LayerStatistics, write: Callable[[int, Tensor], None]
) -> Moments:
    """Each parameter's mean, and the sum of squared deviations from them all (Welford 1962)."""
    squares = 0.0
    for block in _blocks(len(flats[0])):
        mean: Tensor | None = None
        for count, flat in enumerate(flats, start=1):
            values = transform.normalize(flat[block], 0.0)
            if mean is None:
                mean = values
                continue
            delta = values - mean
            mean.add_(delta, alpha=1 / count)
            squares += float(torch.dot(delta, values.sub_(mean)))
        assert mean is not None
        if not math.isfinite(squares) or not bool(torch.isfinite(mean).all()):
            return Moments(1, math.nan, math.nan)
        write(block.start, mean)
    return Moments(len(flats) * len(flats[0]), 0.0, max(squares, 0.0))


def _variance_mean(checkpoints: Sequence[Checkpoint], layer: Layer, normalization: Normalization) -> float:
    """Mean of a running variance over the zoo; 0 for other layers, and for what cannot go through the logarithm."""
    if not layer.name.endswith(VARIANCE_SUFFIX):
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
        flat = as_reals(checkpoint.flat(layer.name))
        for block in _blocks(len(flat)):
            num_bad = int((~torch.isfinite(flat[block])).sum())
            if num_bad:
                what = f"{tensor_at(checkpoint.path, layer.name)} has NaN or infinite values"
                raise InputError(f"{what}; leave the checkpoint out of the zoo")
    what = f"{tensor_at(checkpoints[0].path, layer.name)} has values too large to measure, of 1e150 or more"
    raise InputError(f"{what}; list it in tokens.exclude, or set tokens.normalization to none")
