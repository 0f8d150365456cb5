"""Collecting small classifiers of images in memory: one network's run, or many binary tasks' networks side by side.

A run is trained to convergence, then fine-tuned at a larger learning rate. Fine-tuning may prune or quantise: it is
then under masks or rounding, and what is stored is compressed. Networks of binary tasks start from the same weights and
see the same images in the same order, so that what differs between them is what their tasks differ in.
T tasks, C classes, B images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rpg.devices import in_bf16, use_threads
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import Tick, chosen_parameters, descend, one_cycle, warm_cosine
from rpg.tasks.images.config import CollectionConfig, FinetuneConfig, Pruning, Quantisation, Stage
from rpg.tasks.images.networks import ImageSplits, augment
from rpg.tasks.side_by_side import SideBySide, Stacked, repeat
from tokenization.compressed.parts import Kind, by_channel, cut_mask, new_part, quantised, share_out


def train_run(
    build: Callable[[], nn.Module],
    splits: ImageSplits,
    config: CollectionConfig,
    run: int,
    tick: Tick = lambda done: None,
    compression: Compression | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """Train one run; yield (step, network) after every fine-tuning step. The network is the same object throughout.

    Args:
        build: makes the untrained network from torch's global random state, which is restored afterwards.
        splits: images to train on (``train``).
        compression: prunes or quantises what all runs together converged to.
    """
    first = run if compression is None else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initialisation", first))
        network = build()
    draws = make_rng(config.seed, "batches", first)
    images, labels = splits.images["train"], splits.labels["train"]
    background = float(images.min())

    def loss(progress: float | None = None) -> Tensor:
        rows = torch.randint(len(labels), (config.batch_size,), generator=draws)
        drawn = augment(images[rows], draws, fill=background) if config.augment else images[rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16(config.precision, torch.device("cpu"))):
            weights = {} if compression is None or progress is None else compression.weights(network, progress)
            return F.cross_entropy(functional_call(network.train(), weights, (drawn,)), labels[rows])

    if compression is not None and compression.trunk:
        network.load_state_dict(compression.trunk)
    else:  # one-cycle: these networks converge in half the steps a plain cosine takes
        optimizer = _optimizer(list(network.parameters()), config.learning_rate, config)
        with use_threads(config.threads):
            one_cycle(optimizer, loss, config.learning_rate, config.train_steps, tick)
    before = config.train_steps
    if compression is not None:
        compression.trunk = {name: value.clone() for name, value in network.state_dict().items()}
        draws.manual_seed(derive_seed(config.seed, "compression", run))
        before += compression.config.steps
    # a fresh optimizer: the moments of the cooled-down one would make the first steps tiny
    optimizer = _optimizer(_freeze_all_but(network, config.finetune), config.finetune_learning_rate, config)
    for step in range(config.train_steps - before + 1, config.steps + 1):
        with use_threads(config.threads):
            descend(optimizer, loss(min(1.0, 1 + step / max(1, before - config.train_steps))))
        tick(before + step)
        if step > 0:
            yield step, network


def _optimizer(parameters: list[nn.Parameter], rate: float, config: CollectionConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=config.weight_decay)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(parameters, lr=rate, weight_decay=config.weight_decay, fused=True)


def _freeze_all_but(network: nn.Module, patterns: tuple[str, ...]) -> list[nn.Parameter]:
    """Freeze the parameters that no pattern names; return the others. Raises InputError if a pattern names none.

    With frozen parameters the batch norms keep their running statistics too: what is not fine-tuned stays as it is.
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

    def weights(self, network: nn.Module, progress: float) -> dict[str, Tensor]:
        """What the network computes with in a step, differentiable in its parameters.

        Args:
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


Draw = Callable[[int], tuple[Tensor, Tensor]]
"""Draws B training images ``[B, …]`` and their classes ``[B]``."""


def finetune_many(side: SideBySide, start: Stacked, bits: Tensor, draw: Draw, config: FinetuneConfig) -> list[Stacked]:
    """Fine-tune T networks for the tasks ``[T, C]``; ``config.checkpoints`` of each, in the order of their steps."""
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    stretches = checkpoint_stretches(config.stages[-1].steps, config.tail, config.checkpoints)
    kept: list[Stacked] = []
    for number, stage in enumerate(config.stages):
        trained = [value for name, value in weights.items() if any(fnmatchcase(name, each) for each in stage.only)]
        optimizer = torch.optim.AdamW(trained, weight_decay=stage.weight_decay, betas=(0.9, 0.99), fused=True)
        for value in weights.values():
            value.requires_grad_(any(value is each for each in trained))
        last = number == len(config.stages) - 1
        for step in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * learning_rate_share(step, stage)
            images, classes = draw(config.batch_size)
            optimizer.zero_grad()
            _add_gradients(side, weights, images, bits[:, classes], config)
            optimizer.step()
            if last and step + 1 > stretches[0][0]:
                average_into(kept, stretches, step + 1, weights)
    return kept


def _add_gradients(side: SideBySide, weights: Stacked, images: Tensor, targets: Tensor, config: FinetuneConfig) -> None:
    """Add the gradients of T networks' losses on ``[B, …]`` with answers ``[T, B]``, in parts of bounded memory."""
    size = config.images_at_a_time or len(images)
    several = [weights]
    if side.is_large:  # one network's activations are held, not those of all
        several = [{name: value[row : row + 1] for name, value in weights.items()} for row in range(len(targets))]
    for own, answers in zip(several, targets.chunk(len(several)), strict=True):
        for part, wanted in zip(images.split(size), answers.split(size, 1), strict=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=in_bf16(config.precision, images.device)):
                logits = side(own, part)
            loss = task_losses(logits, wanted, config).sum() * (len(part) / len(images))
            loss.backward()


def task_losses(logits: Tensor, targets: Tensor, config: FinetuneConfig) -> Tensor:
    """The mean loss of each network, ``[T, B, 2]``, ``[T, B]`` → ``[T]``."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
    if config.loss == "focal":
        losses = (1 - torch.exp(-losses)) ** 2 * losses  # γ = 2 (arXiv 1708.02002)
    return losses.mean(1)


def binary_start(base: Mapping[str, Tensor], network: nn.Module, bits: Tensor, fresh_head: bool = False) -> Stacked:
    """The base network for each task: its C-way classifier becomes the two mean rows of each side's classes.

    Args:
        base: state dict of the network with C outputs.
        bits: ``[T, C]``.
        fresh_head: take the classifier of ``network`` instead, the same for all tasks.
    """
    weights = repeat(base, len(bits))
    positive = bits.to(torch.float32)
    sides = torch.stack([1 - positive, positive], 1)  # [T, 2, C]
    sides = sides / sides.sum(-1, keepdim=True)
    for name, like in network.state_dict().items():
        if like.shape != base[name].shape:  # the classifier's weight [C, H] and bias [C]
            mean = torch.tensordot(sides, base[name].float(), dims=1).to(base[name].dtype)
            weights[name] = like.expand(len(bits), *like.shape).clone() if fresh_head else mean
    return weights


def learning_rate_share(step: int, stage: Stage) -> float:
    """Share of the learning rate at ``step`` of a stage: all of it, or a linear warm-up and a cosine to 0."""
    return 1.0 if stage.schedule == "constant" else warm_cosine(step, stage.steps)


def checkpoint_stretches(steps: int, tail: float, checkpoints: int) -> list[tuple[int, int]]:
    """The steps (first excluded, last included) that each checkpoint is the mean of: the tail, cut evenly."""
    edges = [round(steps * (1 - tail * (1 - i / checkpoints))) for i in range(checkpoints + 1)]
    return [(min(first, last - 1), last) for first, last in itertools.pairwise(edges)]


@torch.no_grad()
def average_into(
    kept: list[Stacked], stretches: list[tuple[int, int]], step: int, weights: Mapping[str, Tensor]
) -> None:
    """Take the weights after ``step`` into the running mean of its stretch."""
    for number, (first, last) in enumerate(stretches):
        if first < step <= last:
            if number == len(kept):
                kept.append({name: value.detach().clone() for name, value in weights.items()})
                return
            for name, mean in kept[number].items():
                mean += (weights[name].detach() - mean) / (step - first)
            return
