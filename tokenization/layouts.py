"""Which kind of layout a configuration asks for: tokens of values, or of coefficients along the zoo's directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.compressed.form import CompressedWriter
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout
from tokenization.layout.placement import TokenOptions
from tokenization.layout.reader import TokenReader
from tokenization.layout.rows import CheckpointWriter
from tokenization.spectral.layout import SpectralLayout, SpectralReader, SpectralWriter
from tokenization.zoo.zoo import Zoo

Layout = TokenLayout | SpectralLayout
Reader = TokenReader | SpectralReader
Writer = CheckpointWriter | SpectralWriter | CompressedWriter


def fit_layout(zoo: Zoo, options: TokenOptions, indices: Sequence[int] | None = None) -> Layout:
    """Measure a zoo; `TokenLayout.fit` or, with ``options.rank``, `SpectralLayout.fit`."""
    return (TokenLayout if options.rank is None else SpectralLayout).fit(zoo, options, indices)


def layout_without_statistics(checkpoint: Checkpoint, options: TokenOptions, num_checkpoints: int) -> Layout:
    """The sizes of the layout of a zoo of that many checkpoints like this one."""
    if options.rank is None:
        return TokenLayout.without_statistics(checkpoint, options)
    return SpectralLayout.without_statistics(checkpoint, options, num_checkpoints)


def load_layout(folder: Path | str) -> Layout:
    """Read a layout from a generator's folder. Raises InputError when a file is missing or damaged."""
    layout = TokenLayout.load(folder)
    return layout if layout.options.rank is None else SpectralLayout.load(folder)


def token_reader(zoo: Zoo, layout: Layout) -> Reader:
    """Random access to the zoo's tokens."""
    return SpectralReader(zoo, layout) if isinstance(layout, SpectralLayout) else TokenReader(zoo, layout)


def checkpoint_writer(path: Path | str, layout: Layout, metadata: Mapping[str, str] | None = None) -> Writer:
    """A file that tokens are streamed into."""

    def opened(file: Path | str) -> SpectralWriter | CheckpointWriter:
        kind = SpectralWriter if isinstance(layout, SpectralLayout) else CheckpointWriter
        return kind(file, layout, metadata)  # type: ignore[arg-type]

    return opened(path) if layout.compressed is None else CompressedWriter(path, layout.compressed, opened, metadata)


def with_sparsity(layout: Layout, sparsity: float | None) -> Layout:
    """The layout, that stores pruned weights of another share of zeros; None for the zoo's own.

    Raises InputError if nothing is pruned, or it is not a share.
    """
    if sparsity is None:
        return layout
    if layout.compressed is None:
        raise InputError("this generator's networks are not pruned; leave the sparsity out")
    compressed = layout.compressed.with_sparsity(sparsity)
    if isinstance(layout, SpectralLayout):
        cut = replace(layout.cut, compressed=compressed)
        return SpectralLayout(cut, layout.basis, layout.fitted, layout.indices)
    return replace(layout, compressed=compressed)


def cached_bytes(layout: Layout, num_checkpoints: int) -> int:
    """Bytes that a training run's reader keeps in memory."""
    if isinstance(layout, SpectralLayout):
        return 4 * num_checkpoints * layout.num_tokens * layout.token_size
    return TokenReader.cached_bytes(num_checkpoints, layout)
