"""How images are prepared for a timm network, and altered for its training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rpg.seeding import derive_seed
from rpg.tasks.images.config import ImageNetConfig, TimmFinetuneConfig
from tokenization.errors import InputError


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
