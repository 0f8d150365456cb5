"""A run of small classifiers on images in memory: trained to convergence, then fine-tuned at a larger learning rate.

Fine-tuning may prune or quantise: it is then under masks or rounding, and what is stored is compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rpg.devices import in_bf16
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import chosen_parameters, use_threads
from rpg.tasks.images.config import CollectionConfig, Pruning, Quantisation
from rpg.tasks.images.images import ImageSplits, augment
from tokenization.checkpoint.masks import cut_mask, share_out
from tokenization.compressed.parts import Kind, by_channel, new_part, quantised


def train_run(
    build: Callable[[], nn.Module],
    splits: ImageSplits,
    config: CollectionConfig,
    run: int,
    tick: Callable[[int], None] = lambda done: None,
    compression: Compression | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """Train one run; yield (step, network) after every fine-tuning step. The network is the same object throughout.

    Args:
        build: makes the untrained network from torch's global random state, which is restored afterwards.
        splits: images to train on (``train``).
        config: the recipe.
        run: number of the run.
        tick: called after every optimizer step with the number done.
        compression: prunes or quantises what all runs together converged to.
    """
    first = run if compression is None else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initialisation", first))
        network = build()
    draws = make_rng(config.seed, "batches", first)
    images, labels = splits.images["train"], splits.labels["train"]
    background = float(images.min())

    @use_threads(config.threads)
    def update(optimizer: torch.optim.Optimizer, progress: float | None = None) -> None:
        rows = torch.randint(len(labels), (config.batch_size,), generator=draws)
        drawn = augment(images[rows], draws, fill=background) if config.augment else images[rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(config.precision, torch.device("cpu"))):
            weights = {} if compression is None or progress is None else compression.weights(network, progress)
            loss = F.cross_entropy(functional_call(network.train(), weights, (drawn,)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if compression is not None and compression.trunk:
        network.load_state_dict(compression.trunk)
    else:
        _converge(network, update, config, tick)
    before = config.train_steps
    if compression is not None:
        compression.trunk = {name: value.clone() for name, value in network.state_dict().items()}
        draws.manual_seed(derive_seed(config.seed, "compression", run))
        before += compression.steps
    # a fresh optimizer: the moments of the cooled-down one would make the first steps tiny
    optimizer = _optimizer(_freeze_all_but(network, config.finetune), config.finetune_learning_rate, config)
    for step in range(config.train_steps - before + 1, config.steps + 1):
        update(optimizer, min(1.0, 1 + step / max(1, before - config.train_steps)))
        tick(before + step)
        if step > 0:
            yield step, network


def _converge(
    network: nn.Module, update: Callable[..., None], config: CollectionConfig, tick: Callable[[int], None]
) -> None:
    # one-cycle: these networks converge in half the steps a plain cosine takes
    optimizer = _optimizer(list(network.parameters()), config.learning_rate, config)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.train_steps + 1)
    for step in range(1, config.train_steps + 1):
        update(optimizer)
        schedule.step()
        tick(step)


def _optimizer(parameters: list[nn.Parameter], rate: float, config: CollectionConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=config.weight_decay)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(parameters, lr=rate, weight_decay=config.weight_decay, fused=True)


def _freeze_all_but(network: nn.Module, patterns: tuple[str, ...]) -> list[nn.Parameter]:
    """Freeze the parameters that no pattern names; return the others.

    With frozen parameters the batch norms keep their running statistics too: what is not fine-tuned stays as it is.

    Raises:
        InputError: a pattern names no parameter.
    """
    named, chosen = dict(network.named_parameters()), chosen_parameters(network, patterns)
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    if len(chosen) < len(named):
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0
    return list(chosen.values())


MASKS: dict[str, Kind] = {"csr": "csr", "stored": "mask", "implied": "zeros"}
"""How a pruned weight is stored, by the configuration's name for it."""


class Compression:
    """Prunes or quantises the weights of a network, those of two or more dimensions.

    Pruned weights go by magnitude, to a share that rises cubically (Zhu and Gupta, arXiv 1710.01878), and may come
    back, as the gradient reaches them too (dynamic network surgery, Guo et al., arXiv 1608.04493): the mask goes on
    changing while checkpoints are saved. Small layers keep more (Erdős–Rényi densities, Mocanu et al., arXiv
    1707.04780). Weights are quantised to symmetric codes, one scale a channel, and the gradient passes the rounding as
    it is.

    Attributes:
        trunk: the dense network that every run begins with, once there is one.
    """

    def __init__(self, config: Pruning | Quantisation) -> None:
        self.config = config
        self.trunk: dict[str, Tensor] = {}

    @property
    def steps(self) -> int:
        """Training steps before the first checkpoint."""
        return self.config.steps

    def weights(self, network: nn.Module, progress: float) -> dict[str, Tensor]:
        """What the network computes with in a step, differentiable in its parameters.

        Args:
            network: holds the dense weights that are trained.
            progress: of the steps that compress, 0 … 1; 1 is the whole compression.
        """
        named = {name: each for name, each in network.named_parameters() if each.ndim > 1}
        effective = self._effective({name: each.detach() for name, each in named.items()}, progress)
        return {name: each + (effective[name] - each.detach()) for name, each in named.items()}

    def _effective(self, weights: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        if isinstance(self.config, Pruning):
            masks = self._masks(weights, self.config.sparsity * (1 - (1 - progress) ** 3))
            return {name: weight * masks[name] for name, weight in weights.items()}
        pairs = {name: quantised(weight, self.config.bits) for name, weight in weights.items()}
        return {name: codes * by_channel(scale, codes) for name, (codes, scale) in pairs.items()}

    def store(self, network: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of dense weights, compressed: what the checkpoint holds."""
        weights = {name: each for name, each in network.items() if each.ndim > 1}
        if isinstance(self.config, Pruning):
            kind, masks = MASKS[self.config.masks], self._masks(weights, self.config.sparsity)
            made = {n: new_part(kind, n, w, int(masks[n].sum())).masked(w, masks[n]) for n, w in weights.items()}
        else:
            kind, bits = ("int8" if self.config.bits == 8 else "int4"), self.config.bits
            codes = {name: quantised(weight, bits) for name, weight in weights.items()}
            made = {n: new_part(kind, n, w).restore(codes[n][0], codes[n][1].log()) for n, w in weights.items()}
        return {n: t for name, each in network.items() for n, t in made.get(name, {name: each}).items()}

    def _masks(self, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """The largest weights of each layer, so many that ``sparsity`` of them all are zero."""
        sizes = [each.numel() for each in weights.values()]
        total = sum(sizes) - round(sparsity * sum(sizes))
        counts = share_out(total, [float(sum(each.shape)) for each in weights.values()], sizes)
        return {
            name: cut_mask(each.abs(), 1 - count / each.numel())
            for (name, each), count in zip(weights.items(), counts, strict=True)
        }
