"""What a resume needs, whole and by name, so that any number of processes can go on with it, however they shard it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rpg.training.ema import ExponentialMovingAverage
from rpg.training.sharding import Shards

MODEL, AVERAGE, OPTIMIZER = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
Tensors = dict[str, Tensor]


def gather(network: nn.Module, average: ExponentialMovingAverage, shards: Shards, *, keep: bool) -> dict[str, Tensors]:
    """The files of a checkpoint, on the CPU; all processes must call it, as the functions below.

    Args:
        network: the networks.
        average: their averaged weights.
        shards: how both, and the optimizer's state, lie over the processes.
        keep: whether this process wants them; without, it takes part in putting each tensor together, and forgets it.
    """
    optimizer = ((f"{key}.{name}", value) for name, state in shards.gather_states() for key, value in state.items())
    num_updates = {"num_updates": torch.tensor(average.num_updates)}
    return {
        MODEL: gather_model(network, shards, keep=keep),
        AVERAGE: gather_average(average, shards, keep=keep) | num_updates,
        OPTIMIZER: _keep(optimizer, keep),
    }


def gather_model(network: nn.Module, shards: Shards, *, keep: bool) -> Tensors:
    """The networks' whole state dict."""
    names = shards.parameters
    whole = ((name, shards.gather(value, shards.local_shard(value))) for name, value in names.items())
    buffers = ((name, value) for name, value in network.state_dict().items() if name not in names)
    return _keep(whole, keep) | _keep(buffers, keep)


def gather_average(average: ExponentialMovingAverage, shards: Shards, *, keep: bool) -> Tensors:
    """The whole averaged weights."""
    whole = (
        (name, shards.gather(shards.parameters[name], shard) if name in shards.parameters else shard)
        for name, shard in average.shadow.items()
    )
    return _keep(whole, keep)


def _keep(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> Tensors:
    """One after the other, so that no device ever holds more than one that is put together."""
    return {name: value.detach().cpu() for name, value in tensors if keep}


def write(folder: Path, files: dict[str, Tensors]) -> None:
    """Write each file of whole tensors. Raises SafetensorError when the disk is full."""
    for name, tensors in files.items():
        seen: set[int] = set()
        content = {}
        for key, value in tensors.items():
            value = value.contiguous()
            # 8-bit AdamW's tables are one tensor for all parameters, which the format does not allow.
            content[key] = value.clone() if value.numel() and value.data_ptr() in seen else value
            seen.add(value.data_ptr())
        save_file(content, folder / name)


def load_model(folder: Path, network: nn.Module) -> None:
    """Load the networks, which nothing has spread yet."""
    network.load_state_dict(dict(_tensors(folder / MODEL)))


def load_average(folder: Path, average: ExponentialMovingAverage, shards: Shards) -> None:
    """Load the moving average into each process's shards."""
    average.load_state_dict(
        {
            name: shards.cut(shards.parameters[name], value) if name in shards.parameters else value
            for name, value in _tensors(folder / AVERAGE)
        }
    )


def load_optimizer(folder: Path, shards: Shards) -> None:
    """Load the optimizer's state into each process's shards."""
    states: dict[str, dict[str, Tensor]] = {name: {} for name in shards.parameters}
    for name, value in _tensors(folder / OPTIMIZER):
        key, _, parameter = name.partition(".")
        states[parameter][key] = value
    shards.load_states(states)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (a file, not a dict)
            yield name, file.get_tensor(name)
