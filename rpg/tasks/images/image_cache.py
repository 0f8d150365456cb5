"""Images decoded once: a split as it is scored, in a file of bytes that all networks read through a memory map.

A cache belongs to the very files it was made of (names, sizes, times of change) and to how they are prepared; if either
changes, another one is made. It appears under its name when it is whole, and may be deleted at any time.
"""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from rpg.console import progress_bar
from rpg.seeding import derive_seed
from rpg.tasks.images.config import ImageNetConfig, TimmFinetuneConfig
from tokenization.errors import InputError
from tokenization.files import atomic_file, remove_abandoned


def image_transform(network: str, image_size: int, *, training: bool) -> Callable[[Any], Any]:
    """timm's own preparation of images for a network: its interpolation, share of the crop, mean and deviation.

    Args:
        network: its name; without weights of timm's, those of ImageNet stand.
        image_size: height and width in pixels, in place of the network's own.
        training: cut out and mirror at random. Colours stay as they are.

    Returns:
        A function of an RGB image that gives float32 ``[3, image_size, image_size]``.
    """
    import timm  # imported here: slow

    known = None if ":" in network else timm.get_pretrained_cfg(network)
    prepared = timm.data.resolve_data_config({"img_size": image_size}, pretrained_cfg=known.to_dict() if known else {})
    return timm.data.create_transform(**prepared, is_training=training, color_jitter=0.0)


def require_image_size(
    network: torch.nn.Module, task: TimmFinetuneConfig | ImageNetConfig, num_classes: int | None = None
) -> None:
    """See to it that the network takes images of the task's size, ``[1, 3, image_size, image_size]``.

    Raises:
        InputError: it does not, or gives anything but ``num_classes`` logits.
    """
    size, training = task.image_size, network.training
    image = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    try:
        with torch.inference_mode():
            logits = network.eval()(image)
    except (RuntimeError, AssertionError) as error:  # timm's own words, or those of an operation
        known: Any = getattr(network, "default_cfg", None)
        cure = f"its own is {known['input_size'][-1]}" if known else "set it to what the network takes"
        raise InputError(
            f"task.image_size is {size}, which {task.network} does not take "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); {cure}"
        ) from None
    finally:
        network.train(training)
    shape = tuple(getattr(logits, "shape", ()))
    if num_classes is not None and shape != (1, num_classes):
        raise InputError(
            f"task.network {task.network} gives {shape or type(logits).__name__} for one image, not {num_classes} "
            "logits, one for each class of task.data; set its argument in task.network_arguments"
        )


class LaterBatches(torch.utils.data.BatchSampler):
    """The batches of an order but for the first ``skip``."""

    def __init__(self, order: torch.utils.data.Sampler[int], size: int, skip: int) -> None:
        super().__init__(order, size, drop_last=False)
        self.skip = skip

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(super().__iter__(), self.skip, None)


class AddressedImages(torch.utils.data.Dataset[Any]):
    """A data set whose images are altered by random numbers of their own, in whatever order and process they are read.

    timm draws crops from Python's generator and mirrors by torch's; both are left as they were.

    Args:
        dataset: the images; ``dataset[index]`` may draw.
        seed: decides the draws, with ``parts``.
        parts: what else names them, as the number of the epoch.
    """

    def __init__(self, dataset: Any, seed: int, *parts: int | str) -> None:
        self.dataset, self.seed, self.parts = dataset, seed, parts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seed, before = derive_seed(self.seed, "alterations", *self.parts, index), random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            try:
                return self.dataset[index]
            finally:
                random.setstate(before)


class CheckedImages(torch.utils.data.Dataset[Any]):
    """A data set in which an image that cannot be read is what is wrong with it, in words: these cross processes."""

    def __init__(self, dataset: Any, images: Any) -> None:
        self.dataset, self.images = dataset, images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (OSError, SyntaxError, ValueError) as error:  # pillow's for what is truncated or no image
            return str(unreadable(self.images, index, error))


def batch_of(samples: list[Any]) -> Any:
    """A batch of samples, or what is wrong with the first of them that cannot be read."""
    wrong = [sample for sample in samples if isinstance(sample, str)]
    return wrong[0] if wrong else torch.utils.data.default_collate(samples)


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
    """The images of a data set, decoded once.

    Args:
        dataset: of torchvision, with timm's preparation as its ``transform``.
        root: the folder of the files.
        labels: int64 ``[n]``.
        workers: processes that decode.

    Returns:
        None where the preparation or the labels are not known, or the disk has no room: images are then read anew.

    Raises:
        InputError: an image cannot be read; names it.
    """
    steps = _steps_of(dataset.transform)
    prepared = _split_steps(steps)
    if prepared is None or labels is None or len(labels) != len(dataset) or not len(dataset):
        return None
    geometric, mean, std = prepared
    source = copy.copy(dataset)
    _set_transform(source, geometric)
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


class _Pixels(torch.utils.data.Dataset[Any]):
    """The decoded bytes of each image, or what is wrong with it in words, which crosses processes as it is."""

    def __init__(self, dataset: Any, shape: tuple[int, ...]) -> None:
        self.dataset, self.shape = dataset, shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            pixels = _pixels(self.dataset[index][0])
        except (OSError, SyntaxError, ValueError) as error:  # pillow's for what is truncated or no image
            return str(unreadable(self.dataset, index, error))
        return pixels if pixels.shape == self.shape else f"image {index} has the shape {pixels.shape}, not {self.shape}"


def _write(path: Path, dataset: Any, shape: tuple[int, ...], workers: int) -> None:
    loader: Iterable[list[Any]] = torch.utils.data.DataLoader(
        _Pixels(dataset, shape[1:]), 64, num_workers=workers, collate_fn=list
    )
    done, started = 0, time.perf_counter()
    with atomic_file(path) as temporary, progress_bar("decoding images") as advance, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for batch in loader:
            for pixels in batch:
                if isinstance(pixels, str):
                    raise InputError(pixels)
                file.write(pixels.tobytes())
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
    """What is done to the image, and the mean and deviation that follow; None if there is anything else."""
    names = [type(step).__name__ for step in steps]
    if names[-2:] not in (["MaybeToTensor", "Normalize"], ["ToTensor", "Normalize"]):
        return None
    if any(name.startswith("Random") or name in ("ColorJitter", "MaybePILToTensor") for name in names):
        return None
    last = steps[-1]
    return list(steps[:-2]), [float(each) for each in last.mean], [float(each) for each in last.std]


def _set_transform(dataset: Any, steps: Sequence[Any]) -> None:
    from torchvision.datasets.vision import StandardTransform
    from torchvision.transforms import Compose

    dataset.transform = Compose(list(steps))
    dataset.transforms = StandardTransform(dataset.transform, None)


def _key(dataset: Any, root: Path, steps: Sequence[Any]) -> str:
    """A name that changes with the files, the data set's own description and the preparation."""
    samples = getattr(dataset, "samples", None)
    paths = [Path(path) for path, _ in samples] if samples else sorted(root.rglob("*"))
    files = []
    for path in paths:
        if path.is_file() and FOLDER not in path.parts:
            status = path.stat()
            files.append([os.path.relpath(path, root), status.st_size, status.st_mtime_ns])
    shown = [step if isinstance(step, type(None)) else _shown(step) for step in steps]
    split = [str(getattr(dataset, name, "")) for name in ("split", "_split", "train")]
    content = json.dumps([VERSION, type(dataset).__name__, split, len(dataset), shown, files])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def _shown(step: Any) -> str:
    """A step in words; a function by its name, as its address changes."""
    return getattr(step, "__qualname__", None) or repr(step)


def _folder(root: Path, num_bytes: int, name: str) -> Path | None:
    """Where the cache is, or has room: beside the images, else in the user's cache."""
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
