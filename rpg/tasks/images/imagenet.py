"""The task ``imagenet``: the paper's zoos of whole networks, from timm's pretrained weights and a folder of images.

RPG (arXiv 2501.11587) takes a converged network, fine-tunes all of it for one more epoch and keeps 50 checkpoints of
that epoch. The images are yours (ImageNet or any other set of as many classes); nothing is downloaded but the weights,
and not those either where ``weights`` names a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rpg.devices import in_bf16
from rpg.seeding import derive_seed
from rpg.tasks.collecting import Progress, SavedTraining, open_zoo
from rpg.tasks.images.config import ImageNetConfig, TimmFinetuneConfig
from rpg.tasks.images.image_cache import require_image_size
from rpg.tasks.images.images import check_structure
from rpg.tasks.images.timm_finetune import TimmFinetuneTask
from tokenization.checkpoint.checkpoint import read_state_dict
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

TRAINING = "training.safetensors"
"""In a zoo folder: where a collection goes on; gone when the zoo is whole."""


class ImageNetTask:
    """Collects zoos of whole networks and scores them.

    Args:
        config: what and how.
    """

    def __init__(self, config: ImageNetConfig) -> None:
        self.config = config
        common = set(TimmFinetuneConfig.model_fields) & set(ImageNetConfig.model_fields) - {"name"}
        shared = {name: getattr(config, name) for name in common}
        # Reading batches and taking steps is as in the task `finetune`.
        self._tuning = TimmFinetuneTask(TimmFinetuneConfig(**shared))
        self.device = self._tuning.device

    def build(self) -> nn.Module:
        """The target network, untrained, on torch's default device. Raises InputError if timm does not know it."""
        import timm

        self._check_network()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "initialisation"))
            return timm.create_model(self.config.network, num_classes=self.config.num_classes)

    def start(self) -> nn.Module:
        """The network that fine-tuning begins with.

        Raises:
            InputError: its weights cannot be had, or do not fit.
        """
        network = self.build()
        if self.config.weights is not None:
            state_dict: Mapping[str, Tensor] = read_state_dict(Path(self.config.weights))
        elif self.config.pretrained:
            state_dict = self._pretrained()
        else:
            return network
        check_structure(state_dict, network.state_dict(), f"task.weights: {self.config.weights or self.config.network}")
        network.load_state_dict(state_dict)
        return network

    def _pretrained(self) -> Mapping[str, Tensor]:
        import timm

        try:
            made = timm.create_model(self.config.network, pretrained=True, num_classes=self.config.num_classes)
        except (OSError, RuntimeError) as error:  # the hub cannot be reached; timm has no weights of this network
            raise InputError(
                f"the hub gave no weights for task.pretrained ({type(error).__name__}); "
                "name a file as task.weights, or set task.pretrained to false"
            ) from None
        return made.state_dict()

    def steps(self) -> list[int]:
        """The optimizer steps after which a checkpoint is saved, ascending.

        Raises:
            InputError: there are fewer steps than checkpoints.
        """
        per_epoch = math.ceil(len(self._tuning.dataset("train")) / self.config.batch_size)
        total, count = round(self.config.epochs * per_epoch), self.config.checkpoints
        if total < count:
            raise InputError(
                f"task.checkpoints is {count}, but training takes only {total} steps; raise task.epochs or lower it"
            )
        return [round((index + 1) * total / count) for index in range(count)]

    def collect(self, path: Path | str, *, progress: Progress | None = None, limit: int | None = None) -> Zoo:
        """Fine-tune the whole network and save its checkpoints with their training loss.

        A collection that a kill cut short goes on from its last checkpoint, to the same bits.

        Raises:
            InputError: images or weights are not there, or the zoo at ``path`` is another one.
        """
        self._check_network()
        self._check_classes()
        wanted = self.steps()
        zoo = open_zoo(path, self.config)
        saved = {entry.step for entry in zoo.entries}
        if saved >= set(wanted):
            return zoo
        network = self.start().to(self.device).train()
        require_image_size(network, self.config)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        training = SavedTraining(zoo.path / TRAINING, network, optimizer)
        for step, loss in self._train(network, optimizer, training.load()):
            if step in wanted and step not in saved:
                state_dict = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
                zoo.append(state_dict, run=0, step=step, metrics={"training_loss": loss})
            if progress is not None:
                progress(step, wanted[-1])
            if step == wanted[-1]:
                training.remove()
                break
            if step in wanted:
                training.save(step)
            if limit is not None and len(zoo) >= limit:
                break
        return zoo

    def _train(self, network: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> Iterator[tuple[int, float]]:
        """Take the steps after ``done``: each one's number and loss."""
        batches, seed = self._tuning.batches_after(done), self.config.seed
        for step, (images, labels) in enumerate(batches, done + 1):
            torch.manual_seed(derive_seed(seed, "finetune", step))  # of networks with dropout
            with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16(self.config.precision, self.device)):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield step, loss.item()

    def _check_network(self) -> None:
        import timm

        if not timm.is_model(self.config.network):
            raise InputError(
                f"task.network {self.config.network!r} is not a timm model; choose one of timm.list_models()"
            )

    def _check_classes(self) -> None:
        found = len(self._tuning.classes)
        if found != self.config.num_classes:
            raise InputError(
                f"task.data {self.config.data} has {found} classes, but task.num_classes is {self.config.num_classes}; "
                f"set it to {found}"
            )

    @torch.inference_mode()
    def predict(self, state_dicts: Iterable[Mapping[str, Tensor]], split: str = "test") -> Tensor:
        """Predicted classes of each network, int64 [num, images]; 0 where a logit is not finite.

        Raises:
            InputError: a state dict does not fit the network; names the tensor.
        """
        network = self.build().eval().to(self.device)
        require_image_size(network, self.config)
        expected = network.state_dict()
        answers = []
        for index, state_dict in enumerate(state_dicts):
            check_structure(state_dict, expected, f"network {index}")
            network.load_state_dict(state_dict)
            rows = [network(images) for images, _ in self._tuning.batches(split)]
            answers.append(torch.cat([x.argmax(1).where(x.isfinite().all(1), 0).cpu() for x in rows]))
        return torch.stack(answers) if answers else torch.empty(0, 0, dtype=torch.long)

    def labels(self, split: str = "test") -> Tensor:
        """Right classes, int64 [images]."""
        return self._tuning.labels(split)
