"""Images from the disk: files by class, batches in an order that resumes anywhere, and splits decoded once into a file.

All networks read that file through a memory map. It belongs to the very files it was made of (names, sizes, times of
change) and to how they are prepared; if either changes, another one is made. It appears under its name when it is
whole, and may be deleted at any time."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from rpg.console import progress_bar
from rpg.seeding import derive_seed, make_rng
from tokenization.errors import InputError
from tokenization.files import atomic_file, remove_abandoned

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def class_files(root: Path, kind: str, suffixes: set[str]) -> tuple[list[Path], list[int], list[str]]:
    """The files of a folder that has a folder for every class, the class of each file, and the classes' names.

    Raises InputError if it holds none; ``kind`` names the ``suffixes`` in the message.
    """
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    files = [
        (f, i) for i, c in enumerate(classes) for f in sorted((root / c).iterdir()) if f.suffix.lower() in suffixes
    ]
    if not files:
        raise InputError(
            f"{root} holds no {kind} files; task.data names a folder with a folder of such files for every class "
            f"({', '.join(sorted(suffixes))})"
        )
    return [file for file, _ in files], [label for _, label in files], classes


def read_images(paths: list[Path], image_size: int) -> Tensor:
    """Image files in 0 … 1, ``[n, C, image_size, image_size]``: of one channel if all are grey, else of three."""
    size = (image_size, image_size)
    opened = [Image.open(file) for file in paths]
    grey = all(each.mode in ("1", "L", "I;16", "LA") for each in opened)
    images = []
    for each in opened:
        pixels = np.array(each.convert("L" if grey else "RGB").resize(size, Image.Resampling.BICUBIC))
        images.append(torch.from_numpy(pixels).view(*size, -1).permute(2, 0, 1).float() / 255)
    return torch.stack(images)


def batches_to_score(dataset: Any, config: Any) -> Iterator[list[Any]]:
    """All samples in their order, as many at a time and by as many workers as a task's configuration says.

    Raises InputError where one cannot be read.
    """
    yield from _checked(dataset, dataset.__getitem__, SequentialSampler(dataset), config)


def steps_an_epoch(dataset: Any, config: Any) -> int:
    """Full batches of a data set; a smaller data set is one batch."""
    return max(1, len(dataset) // config.batch_size)


def batches_to_train(dataset: Any, config: Any, done: int = 0) -> Iterator[list[Any]]:
    """Full batches, without end, but for the first ``done`` ones; their samples are not read.

    A batch of one image would be too few for a batch norm of global features. Raises InputError for what is unreadable.
    """
    per_epoch = steps_an_epoch(dataset, config)
    first, skip = divmod(done, per_epoch)
    for epoch in itertools.count(first):
        order = RandomSampler(dataset, generator=make_rng(config.seed, "batches", epoch))
        altered = partial(_addressed, dataset, config.seed, epoch)
        yield from itertools.islice(_checked(dataset, altered, order, config, skip), per_epoch - skip)
        skip = 0


def _checked(dataset: Any, read: Callable[[int], Any], order: Any, config: Any, skip: int = 0) -> Iterator[list[Any]]:
    # without a generator of its own each loader would take a number of torch's global state
    batches, rng = BatchSampler(order, config.batch_size, drop_last=False), make_rng(config.seed, "workers")
    return _loaded(CheckedSamples(dataset, read), config.workers, batch_sampler=list(batches)[skip:], generator=rng)


def _loaded(samples: Dataset[Any], workers: int, **options: Any) -> Iterator[list[Any]]:
    loader: Any = DataLoader(samples, num_workers=workers, collate_fn=list, **options)
    for batch in loader:
        for sample in batch:
            if isinstance(sample, str):
                raise InputError(sample)
        yield batch


def _addressed(dataset: Any, seed: int, epoch: int, index: int) -> Any:
    """A sample that draws by seed, epoch and index, whatever the order or process.

    timm draws crops from Python's generator and mirrors by torch's; both are left as they were.
    """
    seed, before = derive_seed(seed, "alterations", epoch, index), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            return dataset[index]
        finally:
            random.setstate(before)


class CheckedSamples(Dataset[Any]):
    """What ``read`` makes of each index; where that fails the error message, since words cross processes."""

    def __init__(self, dataset: Any, read: Callable[[int], Any]) -> None:
        self.dataset, self.read = dataset, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(index)
        except (OSError, SyntaxError, ValueError) as error:  # pillow's for what is truncated or no image
            return str(unreadable(self.dataset, index, error))


def unreadable(dataset: Any, index: int, error: Exception) -> InputError:
    """What to raise for an image of a data set of torchvision that cannot be read."""
    samples = getattr(dataset, "samples", None)
    name = samples[index][0] if samples is not None else f"image {index} of {type(dataset).__name__}"
    return InputError(f"{name} cannot be read ({str(error).splitlines()[0]}); replace it or take it out")


FOLDER = ".rpg-cache"
VERSION = 1


class CachedImages:
    """Prepared images of a split, all of one size.

    Args:
        images: uint8 ``[n, 3, height, width]``, in a memory map.
        labels: int64 ``[n]``.
        mean, std: what remains to be taken off and divided by, of values in 0 … 1.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as the network takes them, float32, and labels: the very values that decoding gives."""
        mean, std = self.mean.to(device), self.std.to(device)
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield images.to(device).float().div(255).sub_(mean).div_(std), labels.to(device)


def cached_images(dataset: Any, root: Path, labels: Tensor | None, workers: int) -> CachedImages | None:
    """The images of a data set of torchvision with timm's preparation, decoded once by ``workers`` processes.

    None if the preparation or the labels are unknown, or the disk is full: images are then decoded each time. Raises
    InputError for an image that cannot be read.
    """
    from torchvision.datasets.vision import StandardTransform  # imported here: slow
    from torchvision.transforms import Compose

    steps = _steps_of(dataset.transform)
    prepared = _split_steps(steps)
    if prepared is None or labels is None or len(labels) != len(dataset) or not len(dataset):
        return None
    geometric, mean, std = prepared
    source = copy.copy(dataset)
    source.transform = Compose(geometric)
    source.transforms = StandardTransform(source.transform, None)
    try:
        shape = (len(dataset), *_pixels(source[0][0]).shape)
    except OSError as error:
        raise unreadable(dataset, 0, error) from None
    key = _key(dataset, root, steps)
    folder = _folder(root, int(np.prod(shape)), f"{key}.npy")
    if folder is None:
        return None
    path = folder / f"{key}.npy"
    writable = os.access(folder, os.W_OK)
    with FileLock(folder / f"{key}.lock") if writable else contextlib.nullcontext():
        if not path.is_file():
            remove_abandoned(folder)
            _write(path, source, shape, workers)
    return CachedImages(torch.from_numpy(np.load(path, mmap_mode="c")), labels, mean, std)


def _decoded(dataset: Any, shape: tuple[int, ...], index: int) -> Any:
    """The bytes of an image, or what is wrong with their number."""
    pixels = _pixels(dataset[index][0])
    return pixels if pixels.shape == shape else f"image {index} has the shape {pixels.shape}, not {shape}"


def _write(path: Path, dataset: Any, shape: tuple[int, ...], workers: int) -> None:
    samples = CheckedSamples(dataset, partial(_decoded, dataset, shape[1:]))
    done, started = 0, time.perf_counter()
    with atomic_file(path) as temporary, progress_bar("decoding images") as advance, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for batch in _loaded(samples, workers, batch_size=64):
            file.writelines(pixels.tobytes() for pixels in batch)
            done += len(batch)
            advance(done, shape[0], note=f"{done / (time.perf_counter() - started):,.0f} images/s")


def _pixels(image: Any) -> np.ndarray:
    """A prepared image as bytes, ``[3, height, width]``."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def _steps_of(transform: Any) -> list[Any]:
    """The steps of a preparation, nested ones one after the other."""
    steps = getattr(transform, "transforms", None)
    return [transform] if steps is None else [step for each in steps for step in _steps_of(each)]


def _split_steps(steps: Sequence[Any]) -> tuple[list[Any], list[float], list[float]] | None:
    """The geometric steps, and the mean and deviation of the normalisation; None for any other preparation."""
    names = [type(step).__name__ for step in steps]
    if names[-2:] not in (["MaybeToTensor", "Normalize"], ["ToTensor", "Normalize"]):
        return None
    if any(name.startswith("Random") or name in ("ColorJitter", "MaybePILToTensor") for name in names):
        return None
    last = steps[-1]
    return list(steps[:-2]), [float(each) for each in last.mean], [float(each) for each in last.std]


def _key(dataset: Any, root: Path, steps: Sequence[Any]) -> str:
    """A name that changes with the files, the data set's own description and the preparation."""
    samples = getattr(dataset, "samples", None)
    paths = [Path(path) for path, _ in samples] if samples else sorted(root.rglob("*"))
    files = []
    for path in paths:
        if path.is_file() and FOLDER not in path.parts:
            status = path.stat()
            files.append([os.path.relpath(path, root), status.st_size, status.st_mtime_ns])
    # a function by its name, as its address changes
    shown = [None if step is None else getattr(step, "__qualname__", None) or repr(step) for step in steps]
    split = [str(getattr(dataset, name, "")) for name in ("split", "_split", "train")]
    content = json.dumps([VERSION, type(dataset).__name__, split, len(dataset), shown, files])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _folder(root: Path, num_bytes: int, name: str) -> Path | None:
    """The folder that holds the cache or has room for it: beside the images, else in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (root / FOLDER, home / "rpg" / "images"):
        if (folder / name).is_file():
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1.05 * num_bytes:
            return folder
    return None
