"""The task ``finetune``: a timm network or your own on your data; its last norm layers are fine-tuned and saved.

p-diff's default (arXiv 2402.13144, section 3.1): train the whole network, or take a pretrained one, then fine-tune the
last two normalisation layers and keep their parameters after each step. The zoo holds the fine-tuned parameters alone;
everything else is in one base checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from rpg.devices import task_device
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import Progress, SavedTraining, chosen_parameters, cosine_decay, open_zoo, train_step
from rpg.tasks.images.config import TimmFinetuneConfig
from rpg.tasks.images.image_cache import (
    AddressedImages,
    CachedImages,
    CheckedImages,
    LaterBatches,
    batch_of,
    cached_images,
    image_transform,
    require_image_size,
)
from rpg.tasks.images.networks import own_network
from tokenization.checkpoint.checkpoint import read_state_dict, save_checkpoint
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


def last_norms(network: nn.Module, num: int) -> tuple[str, ...]:
    """Names of the parameters of the last ``num`` normalisation layers, in the order in which they are registered."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    norms = [
        name for name, module in network.named_modules() if isinstance(module, kinds) and module.weight is not None
    ]
    return tuple(f"{name}.{kind}" for name in norms[-num:] for kind in ("weight", "bias"))


class TimmFinetuneTask:
    """Collects zoos of fine-tuned parameters and scores them inside the base network."""

    def __init__(self, config: TimmFinetuneConfig) -> None:
        self.config = config
        self.device = task_device(config.device)
        self._datasets: dict[str, Any] = {}
        self._caches: dict[str, CachedImages | None] = {}

    def build(self) -> nn.Module:
        """The target network with as many logits as the data set has classes, with timm's weights if so configured.

        Raises:
            InputError: there is no such network, its weights cannot be had, or it does not take its arguments.
        """
        return self._build(self.config.pretrained)

    def _build(self, pretrained: bool) -> nn.Module:
        import timm

        classes, own = len(self.classes), ":" in self.config.network
        if not own and not timm.is_model(self.config.network):
            raise InputError(
                f"task.network {self.config.network!r} is not a timm model; choose one of timm.list_models(), or write "
                "package.module:name of your own"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "initialisation"))
            if own:
                return own_network(self.config.network, self.config.network_arguments)
            try:
                return timm.create_model(self.config.network, pretrained=pretrained, num_classes=classes)
            except (OSError, RuntimeError) as error:  # the hub cannot be reached; timm has no weights of this network
                raise InputError(
                    f"the hub gave no weights for task.pretrained ({type(error).__name__}); set it to false"
                ) from None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        dataset: Any = self.dataset("train")
        if hasattr(dataset, "classes"):
            return tuple(dataset.classes)
        return tuple(map(str, range(int(max(dataset.labels)) + 1)))  # stl10 names none without its class_names.txt

    def dataset(self, split: str) -> Any:
        """Images and labels of ``train`` or ``test``. Raises InputError where the folder does not hold them."""
        if split not in ("train", "test"):
            raise InputError(f"there is no split {split!r}; choose one of train, test")
        if split not in self._datasets:
            try:
                opened = self.open_split(split)
            except (RuntimeError, FileNotFoundError) as error:
                raise InputError(
                    f"task.data {self.config.data} does not hold the data set {self.config.dataset} "
                    f"({str(error).splitlines()[0]}); name the folder that does"
                ) from None
            self._datasets[split] = opened
            found, known = (getattr(each, "classes", ()) for each in (opened, self.dataset("train")))
            if found != known:  # classes are numbered in the order of their names
                raise InputError(
                    f"task.data {self.config.data} has {len(found)} classes to score on and {len(known)} to train "
                    "on, or others; give train and val the same folders"
                )
        return self._datasets[split]

    def open_split(self, split: str) -> Any:
        """Images and labels of ``train`` or ``test``, as torchvision reads them and timm prepares them."""
        from torchvision import datasets, transforms

        train, root = split == "train", self.config.data
        prepare = image_transform(self.config.network, self.config.image_size, training=train)
        transform = transforms.Compose([to_rgb, prepare])
        match self.config.dataset:
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

    def batches(self, split: str, *parts: int | str, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels on the task's device; seed and ``parts`` decide order and alterations of ``train``.

        The first ``skip`` batches of ``train`` are left out, and their images not read.
        Images that are scored are decoded once and for all (`rpg.tasks.images.image_cache`).
        """
        train, dataset = split == "train", self.dataset(split)
        if not train and (cached := self._cached(split)) is not None:
            yield from cached.batches(self.config.batch_size, self.device)
            return
        rng = make_rng(self.config.seed, "batches", *parts) if train else None
        order = RandomSampler(dataset, generator=rng) if train else SequentialSampler(dataset)
        read = AddressedImages(dataset, self.config.seed, *parts) if train else dataset
        loader: Any = DataLoader(
            CheckedImages(read, dataset),
            batch_sampler=LaterBatches(order, self.config.batch_size, skip),
            num_workers=self.config.workers,
            collate_fn=batch_of,
            generator=rng,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise InputError(batch)
            images, labels = batch
            yield images.to(self.device), labels.to(self.device)

    def batches_after(self, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of all epochs but the first ``done`` ones, without end."""
        first, skip = divmod(done, math.ceil(len(self.dataset("train")) / self.config.batch_size))
        yield from self.batches("train", first, skip=skip)
        for epoch in itertools.count(first + 1):
            yield from self.batches("train", epoch)

    def _cached(self, split: str) -> CachedImages | None:
        if split not in self._caches:
            dataset, root = self.dataset(split), Path(self.config.data)
            self._caches[split] = cached_images(dataset, root, known_labels(dataset), self.config.workers)
        return self._caches[split]

    def collect(self, path: Path | str, *, progress: Progress | None = None, limit: int | None = None) -> Zoo:
        """Train the base network if there is none yet, fine-tune it, save the fine-tuned parameters of each step.

        Raises:
            InputError: the data set is not there, or the zoo at ``path`` is another one.
        """
        self.dataset("train")
        zoo = open_zoo(path, self.config)
        saved = {entry.step for entry in zoo.entries}
        if saved >= set(range(1, self.config.steps + 1)):
            return zoo
        network = self._base_network()
        parameters = self.part(network)
        network.requires_grad_(False)
        torch.nn.ParameterList(parameters.values()).requires_grad_(True)
        network.eval()  # what is not fine-tuned stays, running statistics included
        optimizer = self._optimizer(parameters.values())
        for step in self._train_steps(network, optimizer, self.config.steps, self.config.finetune_learning_rate):
            if step not in saved:
                zoo.append({n: p.detach().cpu().clone() for n, p in parameters.items()}, run=0, step=step)
            if progress is not None:
                progress(step, self.config.steps)
            if limit is not None and len(zoo) >= limit:
                break
        return zoo

    def part(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that are fine-tuned, which a checkpoint holds. Raises InputError if a pattern matches none."""
        return chosen_parameters(network, self.config.finetune or last_norms(network, self.config.num_norms))

    def _base_network(self) -> nn.Module:
        """The whole network before fine-tuning: read from ``base``, or trained and written there.

        Training that a kill cut short goes on from the end of its last epoch, to the same bits.
        """
        path, epochs = Path(self.config.base), self.config.train_epochs
        network = self._build(self.config.pretrained and not path.is_file()).to(self.device)
        require_image_size(network, self.config, len(self.classes))
        if path.is_file():
            network.load_state_dict(read_state_dict(path))
            return network
        if epochs:
            optimizer = self._optimizer(network.parameters())
            training = SavedTraining(path.with_suffix(".training.safetensors"), network, optimizer)
            per_epoch = math.ceil(len(self.dataset("train")) / self.config.batch_size)
            network.train()
            steps = self._train_steps(
                network, optimizer, epochs * per_epoch, self.config.learning_rate, training.load()
            )
            for step in steps:
                if step % per_epoch == 0 and step < epochs * per_epoch:
                    training.save(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {name: value.cpu() for name, value in network.state_dict().items()})
        if epochs:
            training.remove()
        return network

    def _optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1.0, weight_decay=self.config.weight_decay)

    def _train_steps(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, learning_rate: float, done: int = 0
    ) -> Iterator[int]:
        """The optimizer steps after ``done``, with a cosine to 0; yield the number of each after it."""
        for step, (images, labels) in zip(range(done, num_steps), self.batches_after(done), strict=False):
            rate = learning_rate * cosine_decay(step, num_steps)
            train_step(optimizer, partial(_loss, network, images, labels), rate, self.config.seed, step)
            yield step + 1

    @torch.inference_mode()
    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes of the base network with each state dict's tensors in it, int64 [num, images].

        Raises:
            InputError: there is no base checkpoint, or a tensor does not fit.
        """
        network = self._build(pretrained=False).to(self.device).eval()
        require_image_size(network, self.config, len(self.classes))
        network.load_state_dict(read_state_dict(Path(self.config.base)))
        base, networks = network.state_dict(), []
        for state_dict in state_dicts:
            for name, value in state_dict.items():
                if name not in base or base[name].shape != value.shape:
                    raise InputError(
                        f"tensor {name!r} of shape {tuple(value.shape)} is not one of the target network; "
                        "score networks of this task"
                    )
            networks.append({name: value.to(self.device) for name, value in state_dict.items()})
        answers: list[list[Tensor]] = [[] for _ in networks]
        for images, _ in self.batches(split):
            for rows, weights in zip(answers, networks, strict=True):
                logits = torch.func.functional_call(network, weights, (images,))  # the rest is the base's
                rows.append(logits.argmax(1).where(logits.isfinite().all(1), 0).cpu())
        return torch.stack([torch.cat(rows) for rows in answers]) if answers else torch.empty(0, 0, dtype=torch.long)

    def labels(self, split: str = "test") -> Tensor:
        """Right classes, int64 [images]."""
        known = known_labels(self.dataset(split))
        return known if known is not None else torch.cat([labels.cpu() for _, labels in self.batches(split)])


def _loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)


def known_labels(dataset: Any) -> Tensor | None:
    """Labels of a data set of torchvision, int64 ``[images]``, where it has them without reading images."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name), dtype=torch.long)
    return None


def to_rgb(image: Any) -> Any:
    """An image of any mode in three channels."""
    return image.convert("RGB")
