"""Time the way between a zoo of ConvNeXt-L checkpoints (4 x 790 MB) and its tokens; print the padding table."""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timm
import torch
from _common import Parser, run_command, write_figures
from rich.console import Console
from rich.table import Table

from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.tensor_file import TensorFile
from tokenization.errors import InputError
from tokenization.layout.layout import TokenLayout, TokenOptions
from tokenization.layout.reader import TokenReader
from tokenization.layout.writer import CheckpointWriter
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


def skeleton(name: str) -> dict[str, torch.Tensor]:
    """The state dict of a timm network without values."""
    with torch.device("meta"):
        return timm.create_model(name).state_dict()


def make_zoo(path: Path, num_checkpoints: int, name: str, dtype: torch.dtype = torch.float32) -> Zoo:
    """Random checkpoints of one run: a common start and small steps away from it, as fine-tuning leaves."""
    if (path / "zoo.json").exists():
        zoo = Zoo.open(path)
        if len(zoo) == num_checkpoints:
            return zoo
        raise InputError(f"{path} is a zoo of {len(zoo)}, not of {num_checkpoints} checkpoints; choose another folder")
    zoo = Zoo.create(path)
    generator = torch.Generator().manual_seed(0)
    start = {
        key: torch.empty(value.shape).normal_(0, 0.02, generator=generator) for key, value in skeleton(name).items()
    }
    for step in range(num_checkpoints):
        for value in start.values():
            value.mul_(0.999).add_(torch.randn(min(value.numel(), 4096), generator=generator).mean(), alpha=1e-3)
            value.view(-1)[::7].add_(torch.randn(-(-value.numel() // 7), generator=generator), alpha=1e-4)
        zoo.append({key: value.to(dtype) for key, value in start.items()}, run=0, step=step)
    return zoo


def peak_gib() -> float:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def measure(zoo: Zoo, options: TokenOptions, num_rows: int, repeats: int) -> dict[str, float]:
    """Fit, read rows, encode, decode and stream to a file."""
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
        "peak_rss_gib": peak_gib(),
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
    parser.add_argument("--folder", type=Path, help="where the zoo is, or is made and kept; a temporary one otherwise")
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
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "zoo"
        # Made in another process, so that its memory does not count.
        with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(prepare, (folder, arguments.checkpoints, arguments.network))
        options = TokenOptions(arguments.size, normalization=arguments.normalization)
        figures = measure(Zoo.open(folder), options, arguments.rows, arguments.repeats)
    for name, value in figures.items():
        print(f"{name:22} {value:10.2f}")
    write_figures(arguments.json, figures)


def prepare(path: Path, num_checkpoints: int, name: str) -> None:
    make_zoo(path, num_checkpoints, name)


if __name__ == "__main__":
    run_command(main)
