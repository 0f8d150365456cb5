"""Resumable checkpoints: whole tensors by name, so that any number of processes can resume, however they shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rpg.training.optim import ExponentialMovingAverage

States = Mapping[str, Mapping[str, Tensor]]  # whole optimizer state of each named parameter, by key


def is_spread(tensor: Any) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`, whose module takes long to load and is seldom needed."""
    return hasattr(tensor, "full_tensor")


class Shards:
    """PyTorch's own ways: one process and DDP hold whole tensors, FSDP2 DTensors cut along their first dimension."""

    def __init__(self, network: nn.Module, optimizer: Any) -> None:
        self.parameters = dict(network.named_parameters())
        self.optimizer = optimizer

    def local_shard(self, parameter: Tensor) -> Tensor:
        """This process's part of a parameter, in fp32; it follows the parameter until the next step."""
        return parameter.detach()

    def gather(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """The whole of what the processes hold shards of, shaped as ``parameter``; all of them must call it."""
        return shard.full_tensor() if is_spread(shard) else shard  # type: ignore[attr-defined]

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor that is shaped as ``parameter``; all processes must call it."""
        if not is_spread(parameter):
            return whole
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]

    def gather_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The optimizer's whole state, parameter by parameter; all processes must go through it.

        Numbers become 0-d int64 tensors.
        """
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            yield name, {key: self.gather(parameter, torch.as_tensor(value)) for key, value in state.items()}

    def load_states(self, states: States) -> None:
        """Take the optimizer's whole state back; parameters that have none yet stay so."""
        content = self.optimizer.state_dict()
        names = {parameter: name for name, parameter in self.parameters.items()}
        order = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        content["state"] = {
            index: {key: self._cut_state(self.parameters[name], value) for key, value in states[name].items()}
            for index, name in enumerate(order)
            if states.get(name)
        }
        self.optimizer.load_state_dict(content)

    def _cut_state(self, parameter: Tensor, value: Tensor) -> Tensor | int:
        if not value.ndim:
            return int(value) if value.dtype == torch.int64 else value
        if is_spread(parameter) or value.shape != parameter.shape:
            return self.cut(parameter, value)
        # The fused optimizers go through memory in order: moments must lie as their parameter does, channels last.
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


class ZeROShards(Shards):
    """DeepSpeed ZeRO 1 to 3 in fp32: AdamW's moments in flat partitions, at stage 3 the parameters too."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, network: nn.Module, optimizer: Any) -> None:
        super().__init__(network, optimizer)
        self.spread = hasattr(next(iter(self.parameters.values())), "ds_id")

    def local_shard(self, parameter: Tensor) -> Tensor:
        """The parameter, at stage 3 its partition: ``[ceil(values / processes)]``, the last one padded."""
        if not self.spread:
            return parameter.detach()
        from deepspeed.utils import safe_get_local_fp32_param

        return safe_get_local_fp32_param(parameter).detach()

    def gather(self, parameter: Any, shard: Tensor) -> Tensor:
        """The whole tensor, from all partitions."""
        if not self.spread:
            return shard
        parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, shard.contiguous())
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This process's partition of a whole tensor."""
        if not self.spread:
            return whole
        size = len(self.local_shard(parameter))
        part = whole.flatten()[torch.distributed.get_rank() * size :][:size]
        return torch.nn.functional.pad(part, (0, size - len(part)))

    def gather_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """AdamW's whole moments of every parameter, and the steps it has made."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = {int(state["step"]) for state in self.optimizer.optimizer.state.values() if "step" in state}
        if not steps:
            return
        (step,) = steps
        for name, parameter in self.parameters.items():
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in self.MOMENTS}
            yield name, {"step": torch.tensor(float(step)), **moments}

    def load_states(self, states: States) -> None:
        """Make the state of every partition, then fill in each parameter's part of it."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if not any(states.values()):
            return
        (step,) = {float(state["step"]) for state in states.values()}  # every parameter is trained at every step
        zero = self.optimizer
        for partition in self._partitions():
            moments = {key: torch.zeros_like(partition) for key in self.MOMENTS}
            zero.optimizer.state[partition] = {"step": torch.tensor(step, device=partition.device), **moments}
        if not self.spread:  # parameters have views of the partitions' state, made once
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.parameters.items():
            for key in self.MOMENTS:
                safe_set_full_optimizer_state(parameter, states[name][key].to(parameter.device), key)

    def _partitions(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer underneath steps."""
        zero = self.optimizer
        return zero.fp32_partitioned_groups_flat if self.spread else zero.single_partition_of_fp32_groups


MODEL, AVERAGE, OPTIMIZER = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
Tensors = dict[str, Tensor]


def gather(network: nn.Module, average: ExponentialMovingAverage, shards: Shards, *, keep: bool) -> dict[str, Tensors]:
    """The files of a checkpoint, on the CPU; all processes must call it, as the functions below.

    Without ``keep`` this process takes part in putting each tensor together, and forgets it.
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
