"""Tasks of timm's networks, or your own, on a folder of images or a data set of torchvision.

``finetune``, p-diff's default (arXiv 2402.13144, section 3.1): train the whole network, or take a pretrained one, then
fine-tune the last two normalisation layers and keep their parameters after each step.

``imagenet``, the paper's zoos (arXiv 2501.11587): take a converged network, fine-tune all of it for one more epoch and
keep 50 checkpoints of that epoch. Nothing is downloaded but timm's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from rpg.devices import in_bf16
from rpg.tasks.collecting import Progress, cosine_decay
from rpg.tasks.images.config import ImageNetConfig, TimmFinetuneConfig
from rpg.tasks.images.image_cache import CachedImages, cached_images, steps_an_epoch
from rpg.tasks.images.networks import answers, check_structure, own_network, timm_network
from rpg.tasks.stepwise import DatasetTask
from tokenization.checkpoint.checkpoint import StateDict, read_state_dict
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


class TimmTask(DatasetTask):
    """Images, networks and scores of both tasks."""

    splits = ("train", "test")
    config: TimmFinetuneConfig | ImageNetConfig

    def __init__(self, config: TimmFinetuneConfig | ImageNetConfig) -> None:
        super().__init__(config)
        self._caches: dict[str, CachedImages | None] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        dataset: Any = self.dataset("train")
        if hasattr(dataset, "classes"):
            return tuple(dataset.classes)
        return tuple(map(str, range(int(max(dataset.labels)) + 1)))  # stl10 names none without its class_names.txt

    def open_split(self, split: str) -> Any:
        """Images and labels of ``train`` or ``test``. Raises InputError where the folder does not hold them."""
        name = getattr(self.config, "dataset", "folder")
        try:
            opened = self._read_split(name, split)
        except (RuntimeError, FileNotFoundError) as error:
            raise InputError(
                f"task.data {self.config.data} does not hold the data set {name} "
                f"({str(error).splitlines()[0]}); name the folder that does"
            ) from None
        train = opened if split == "train" else self.dataset("train")
        found, known = (getattr(each, "classes", ()) for each in (opened, train))
        if found != known:  # classes are numbered in the order of their names
            raise InputError(
                f"task.data {self.config.data} has {len(found)} classes to score on and {len(known)} to train "
                "on, or others; give train and val the same folders"
            )
        return opened

    def _read_split(self, name: str, split: str) -> Any:
        """The data set as torchvision reads it and timm prepares it."""
        from torchvision import datasets, transforms

        train, root = split == "train", self.config.data
        prepare = image_transform(self.config.network, self.config.image_size, training=train)
        transform = transforms.Compose([to_rgb, prepare])
        match name:
            case "folder":
                return datasets.ImageFolder(Path(root) / ("train" if train else "val"), transform)
            case "cifar10":
                return datasets.CIFAR10(root, train, transform)
            case "cifar100":
                return datasets.CIFAR100(root, train, transform)
            case "stl10":
                return datasets.STL10(root, split, transform=transform)
            case "flowers102":
                return datasets.Flowers102(root, split, transform)
            case "pets":
                return datasets.OxfordIIITPet(root, "trainval" if train else "test", transform=transform)
            case "food101":
                return datasets.Food101(root, split, transform)

    def batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All images and labels of a split, on the task's device, decoded once and for all (`image_cache`)."""
        dataset = self.dataset(split)
        if split not in self._caches:
            self._caches[split] = cached_images(
                dataset, Path(self.config.data), known_labels(dataset), self.config.workers
            )
        if (cached := self._caches[split]) is not None:
            yield from cached.batches(self.config.batch_size, self.device)
        else:
            yield from super().batches(split)

    def batch(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        images, labels = default_collate(samples)
        return images.to(self.device), labels.to(self.device)

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return steps_an_epoch(self.dataset("train"), self.config)

    def loss(self, network: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        """Cross entropy of images and labels."""
        return F.cross_entropy(network(batch[0]), batch[1])

    def check_name(self) -> None:
        """Raise InputError unless timm knows the network."""
        import timm

        if not timm.is_model(self.config.network):
            own = ", or write package.module:name of your own" if isinstance(self, TimmFinetuneTask) else ""
            raise InputError(
                f"task.network {self.config.network!r} is not a timm model; choose one of timm.list_models(){own}"
            )

    def placed(self) -> nn.Module:
        """The network where the task computes. Raises InputError if it does not take the images."""
        network = super().placed()
        require_image_size(network, self.config, len(self.classes))
        return network

    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes of each network, int64 [num, images]; 0 where a logit is not finite.

        Raises InputError for a state dict that does not fit, or a missing base checkpoint.
        """
        found = []
        if not self.is_whole:
            self.base()  # its absence is said before anything is built
        with torch.inference_mode():
            for index, state_dict in enumerate(state_dicts):
                network = self.network_with(state_dict, f"network {index}")
                found.append(torch.cat([answers(network(images)).cpu() for images, _ in self.batches(split)]))
        return torch.stack(found) if found else torch.empty(0, 0, dtype=torch.long)

    def labels(self, split: str = "test") -> Tensor:
        """Right classes, int64 [images]."""
        known = known_labels(self.dataset(split))
        return known if known is not None else torch.cat([labels.cpu() for _, labels in self.batches(split)])


class TimmFinetuneTask(TimmTask):
    """Collects zoos of fine-tuned parameters and scores them inside the base network."""

    config: TimmFinetuneConfig

    def make_network(self) -> nn.Module:
        """The network with as many logits as the data set has classes, with timm's weights if so configured.

        Raises InputError if there is no such network, or its weights or arguments do not serve.
        """
        if ":" in self.config.network:
            return own_network(self.config.network, self.config.network_arguments)
        self.check_name()
        options = {"pretrained": self.fetches_weights, "num_classes": len(self.classes)}
        return timm_network(self.config.network, "set task.pretrained to false", **options)

    @property
    def first_steps(self) -> int:
        """Steps of the whole network."""
        return self.config.train_epochs * self.steps_an_epoch

    @property
    def save_every(self) -> int:
        """An epoch."""
        return self.steps_an_epoch

    def rate(self, step: int) -> float:
        """A cosine to 0."""
        return self.config.finetune_learning_rate * cosine_decay(step, self.config.steps)


class ImageNetTask(TimmTask):
    """Collects zoos of whole networks with their training loss, and scores them."""

    config: ImageNetConfig
    resumed = True
    is_whole = True
    first_steps = 0

    def make_network(self) -> nn.Module:
        """The network, untrained. Raises InputError if timm does not know it."""
        self.check_name()
        return timm_network(self.config.network, "name another one", num_classes=self.config.num_classes)

    def base_network(self, tick: Callable[[int], None] = lambda done: None) -> nn.Module:
        """The network that fine-tuning begins with. Raises InputError if its weights cannot be had, or do not fit."""
        network, config = self.placed(), self.config
        if config.weights is not None:
            state_dict: StateDict = read_state_dict(Path(config.weights))
        elif config.pretrained:
            cure = "name a file as task.weights, or set task.pretrained to false"
            made = timm_network(config.network, cure, pretrained=True, num_classes=config.num_classes)
            state_dict = made.state_dict()
        else:
            return network
        check_structure(state_dict, network.state_dict(), f"task.weights: {config.weights or config.network}")
        network.load_state_dict(state_dict)
        return network

    def chosen(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters."""
        return dict(network.named_parameters())

    def rate(self, step: int) -> float:
        """Constant, so that checkpoints stay comparable."""
        return self.config.learning_rate

    def steps(self) -> list[int]:
        """Steps at even distances, the last one among them. Raises InputError for fewer steps than checkpoints."""
        total, count = round(self.config.epochs * self.steps_an_epoch), self.config.checkpoints
        if total < count:
            raise InputError(
                f"task.checkpoints is {count}, but training takes only {total} steps; raise task.epochs or lower it"
            )
        return [round((index + 1) * total / count) for index in range(count)]

    def loss(self, network: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        """Cross entropy, in the configured precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16(self.config.precision, self.device)):
            return super().loss(network, batch, step)

    def metrics(self, stored: StateDict, loss: Tensor | None) -> dict[str, float]:
        """The training loss."""
        return {"training_loss": loss.item()} if loss is not None else {}

    def collect(self, path: Path | str, *, progress: Progress | None = None, limit: int | None = None) -> Zoo:
        """As every stepwise task, after the network's name and the images' classes are checked."""
        self.check_name()
        if (found := len(self.classes)) != self.config.num_classes:
            raise InputError(
                f"task.data {self.config.data} has {found} classes, but task.num_classes is {self.config.num_classes}; "
                f"set it to {found}"
            )
        return super().collect(path, progress=progress, limit=limit)


def image_transform(network: str, image_size: int, *, training: bool) -> Callable[[Any], Any]:
    """timm's own preparation of RGB images for a network, to float32 ``[3, image_size, image_size]``.

    Interpolation, share of the crop, mean and deviation are the network's, or those of ImageNet. In training images are
    cut out and mirrored at random; their colours stay as they are.
    """
    import timm  # imported here: slow

    known = None if ":" in network else timm.get_pretrained_cfg(network)
    prepared = timm.data.resolve_data_config({"img_size": image_size}, pretrained_cfg=known.to_dict() if known else {})
    return timm.data.create_transform(**prepared, is_training=training, color_jitter=0.0)


def require_image_size(network: nn.Module, task: Any, num_classes: int) -> None:
    """Raise InputError unless the network makes ``num_classes`` logits of images of the task's size."""
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
    if shape != (1, num_classes):
        raise InputError(
            f"task.network {task.network} gives {shape or type(logits).__name__} for one image, not {num_classes} "
            "logits, one for each class of task.data; set its argument in task.network_arguments"
        )


def known_labels(dataset: Any) -> Tensor | None:
    """Labels of a data set of torchvision, int64 ``[images]``, where it has them without reading images."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name), dtype=torch.long)
    return None


def to_rgb(image: Any) -> Any:
    """An image of any mode in three channels."""
    return image.convert("RGB")
