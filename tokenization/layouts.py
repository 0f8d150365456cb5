"""Which kind of layout a configuration asks for: tokens of values, or of coefficients along the zoo's directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.layout.layout import TokenLayout
from tokenization.layout.placement import TokenOptions
from tokenization.layout.reader import TokenReader
from tokenization.layout.writer import CheckpointWriter
from tokenization.spectral.layout import SpectralLayout
from tokenization.spectral.streams import SpectralReader, SpectralWriter
from tokenization.zoo.zoo import Zoo

Layout = TokenLayout | SpectralLayout
Reader = TokenReader | SpectralReader
Writer = CheckpointWriter | SpectralWriter


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
    if isinstance(layout, SpectralLayout):
        return SpectralWriter(path, layout, metadata)
    return CheckpointWriter(path, layout, metadata)


def cached_bytes(layout: Layout, num_checkpoints: int) -> int:
    """Bytes that a training run's reader keeps in memory."""
    if isinstance(layout, SpectralLayout):
        return 4 * num_checkpoints * layout.num_tokens * layout.token_size
    return TokenReader.cached_bytes(num_checkpoints, layout)
