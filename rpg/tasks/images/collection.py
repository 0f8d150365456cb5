"""Collecting a zoo the way RPG and p-diff do: train to convergence, then save after every fine-tuning step.

p-diff (arXiv 2402.13144, section 3.1 and appendix A.1) and RPG (arXiv 2501.11587) both train a network to
convergence, fine-tune it further with a larger learning rate, and keep the checkpoint of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from rpg.devices import in_bf16
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import DTYPES, Progress, chosen_parameters, convert_floats, single_threaded, use_threads
from rpg.tasks.images.compression import Compression
from rpg.tasks.images.config import CollectionConfig
from rpg.tasks.images.images import ImageSplits, accuracy_of, augment
from tokenization.zoo.zoo import Zoo


@single_threaded()
def collect_runs(
    zoo: Zoo,
    build: Callable[[], nn.Module],
    splits: ImageSplits,
    config: CollectionConfig,
    *,
    progress: Progress | None = None,
    limit: int | None = None,
    compression: Compression | None = None,
) -> None:
    """Append every checkpoint that ``zoo`` still lacks.

    A run is decided by ``config.seed`` and its number alone. One that a kill cut short is therefore trained again
    from its start, and only the checkpoints that are missing are appended.

    Args:
        zoo: where checkpoints go; entries hold ``run``, ``step`` (1 … ``config.steps``), split and
            ``validation_accuracy``.
        build: makes the untrained network from torch's global random state.
        splits: images; ``train`` is trained on and ``validation`` measured.
        config: the recipe.
        progress: called after every optimizer step.
        limit: stop once the zoo holds this many checkpoints.
    """
    saved = {(entry.run, entry.step) for entry in zoo.entries}
    run_length = config.train_steps + config.steps + (compression.steps if compression else 0)
    total = config.runs * run_length

    for run in range(config.runs):
        missing = {step for step in range(1, config.steps + 1) if (run, step) not in saved}
        if not missing:
            continue
        if limit is not None and len(zoo) >= limit:
            return

        def tick(done: int, before: int = run * run_length) -> None:
            if progress is not None:
                progress(before + done, total)

        for step, network in train_run(build, splits, config, run, tick, compression):
            if step in missing:
                stored = convert_floats(network.state_dict(), DTYPES[config.dtype])
                stored = compression.store(stored) if compression else stored
                with use_threads(config.threads):
                    accuracy = accuracy_of(network, stored, splits, "validation")
                split = "held_out" if config.hold_out and step % config.hold_out == 0 else "train"
                zoo.append(stored, run=run, step=step, split=split, metrics={"validation_accuracy": accuracy})
            if limit is not None and len(zoo) >= limit:
                return
    if progress is not None:  # runs that were complete have not ticked
        progress(total, total)


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
