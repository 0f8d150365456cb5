"""Time the way between a zoo of ConvNeXt-L checkpoints (4 x 790 MB) and its tokens; print the padding table."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Figures, Parser, alone, make_zoo, measured, run_command, skeleton, work_folder
from rich.console import Console
from rich.table import Table

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.rows import CheckpointWriter, TokenReader
from tokenization.zoo.zoo import Zoo

PAPER_SIZES = {
    "resnet18": 8192,
    "resnet50": 8192,
    "vit_tiny_patch16_224": 8192,
    "vit_small_patch16_224": 8192,
    "vit_base_patch16_224": 16384,
    "convnext_atto": 8192,
    "convnext_large": 16384,
}
"""The paper's token width D for each of its ImageNet networks."""


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of a call."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def measure(path: Path, options: TokenOptions, num_rows: int, repeats: int) -> dict[str, float]:
    """Fit, read rows, encode, decode and stream to a file."""
    zoo = Zoo.open(path)
    for stale in (zoo.path / "cache").glob("statistics-*"):
        stale.unlink()
    fit_seconds, layout = timed(lambda: TokenLayout.fit(zoo, options))
    megabytes = sum(layer.num_values * layer.dtype.itemsize for layer in layout.layers) / 1e6
    reader = TokenReader(zoo, layout)
    generator = torch.Generator().manual_seed(0)

    def read(_: int) -> float:
        checkpoint = int(torch.randint(len(zoo), (), generator=generator))
        ids = torch.randperm(layout.num_tokens, generator=generator)[:num_rows]
        return timed(lambda: reader.read([checkpoint], ids))[0]

    for warm_up in range(5):
        read(warm_up)
    read_ms = statistics.median(1000 * read(number) for number in range(repeats))
    # The system hands out memory slowly the first time: hence the median of three.
    encode_seconds = statistics.median(timed(lambda: layout.encode(zoo.checkpoint(0)))[0] for _ in range(3))
    tokens = layout.encode(zoo.checkpoint(0))
    decode_seconds = statistics.median(timed(lambda: layout.decode(tokens))[0] for _ in range(3))
    with tempfile.TemporaryDirectory(dir=zoo.path.parent) as folder:

        def stream() -> None:
            with CheckpointWriter(Path(folder) / "out.safetensors", layout) as writer:
                for first in range(0, layout.num_tokens, 512):
                    writer.write(first, tokens[first : first + 512])

        write_seconds, _ = timed(stream)
    return {
        "read_rows_ms_median": read_ms,
        "encode_mb_s": megabytes / encode_seconds,
        "decode_mb_s": megabytes / decode_seconds,
        "write_mb_s": megabytes / write_seconds,
        "fit_seconds": fit_seconds,
    }


def padding_table() -> Table:
    """Share of padding for the paper's networks, each layer with its own tokens and small layers packed."""
    table = Table("network", "values", "D", "tokens", "padding", "tokens packed", "padding packed")
    with tempfile.TemporaryDirectory() as folder:
        for name, size in PAPER_SIZES.items():
            path = Path(folder) / f"{name}.safetensors"
            specs = {key: (value.dtype, tuple(value.shape)) for key, value in skeleton(name).items()}
            TensorFile(path, specs).close()  # a sparse file: only its header counts
            layouts = [
                TokenLayout.without_statistics(Checkpoint.open(path), TokenOptions(size, pack=pack))
                for pack in (False, True)
            ]
            cells = [cell for x in layouts for cell in (f"{x.num_tokens:,}", f"{x.padding_share:.2%}")]
            table.add_row(name, f"{layouts[0].num_values:,}", f"{size:,}", *cells)
            path.unlink()
    return table


def main() -> None:
    parser = Parser(__doc__, figures=True)
    parser.add_argument("--network", default="convnext_large", help="timm name of the target network")
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--rows", type=int, default=512, help="token rows read at a time")
    parser.add_argument("--size", type=int, default=16384, help="token width D")
    parser.add_argument("--normalization", default="residual", choices=["residual", "layer", "none"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--padding", action="store_true", help="print the padding table instead")
    arguments = parser.parse_args()
    if arguments.padding:
        Console().print(padding_table())
        return
    options = TokenOptions(arguments.size, normalization=arguments.normalization)
    with work_folder(arguments.folder) as folder:
        alone(prepare, folder / "zoo", arguments.checkpoints, arguments.network)
        found = measured(measure, folder / "zoo", options, arguments.rows, arguments.repeats)
    Figures(arguments.json).take(arguments.network, **found)


def prepare(path: Path, num_checkpoints: int, name: str) -> None:
    """Make the zoo in a process whose memory does not count."""
    make_zoo(path, num_checkpoints, name)


if __name__ == "__main__":
    run_command(main)
