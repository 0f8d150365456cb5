"""A run of small classifiers on images in memory: trained to convergence, then fine-tuned at a larger learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from rpg.devices import in_bf16
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import chosen_parameters, use_threads
from rpg.tasks.images.compression import Compression
from rpg.tasks.images.config import CollectionConfig
from rpg.tasks.images.images import ImageSplits, augment


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
