"""Optimizers of a training run, the learning rate of a step, the moving average, and what of them a process holds.

What is saved are whole tensors by name, so that any number of processes can resume, however they shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rpg.config import TrainConfig
from rpg.packages import require_package
from rpg.tasks.collecting import cosine_decay


def build_optimizer(settings: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``train.optimizer`` names.

    ``adamw8bit`` keeps both moments in 8 bits (arXiv 2110.02861): 2 bytes a parameter in place of 8.

    Raises:
        InputError: the library that it needs is not installed.
    """
    rate, betas, decay = settings.learning_rate, settings.betas, settings.weight_decay
    choices: dict[str, Any] = {"lr": rate, "betas": betas, "weight_decay": decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **choices)
    require_package("bitsandbytes", "train.optimizer adamw8bit needs bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **choices)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to 0 at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate * cosine_decay(step - config.warmup_steps, max(1, config.steps - config.warmup_steps))


class ExponentialMovingAverage:
    """fp32 shadows of named parameters, moved by ``1 - decay`` towards them at every update.

    The decay warms up as ``min(decay, (1 + n) / (10 + n))`` after n updates, so that short runs forget
    their random start.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.shadow = {name: parameter.detach().clone().float() for name, parameter in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Move the shadows towards the parameters."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = dict(parameters)
        for name, shadow in self.shadow.items():  # not all at once: FSDP2's parameters are DTensors, buffers are not
            shadow.lerp_(live[name].detach().float(), 1 - decay)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back the shadows, and the number of updates as ``num_updates``."""
        self.num_updates = int(state["num_updates"])
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])


Tensors = dict[str, Tensor]
States = Mapping[str, Mapping[str, Tensor]]  # whole optimizer state of each named parameter, by key


def is_spread(tensor: Any) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`, whose module takes long to load and is seldom needed."""
    return hasattr(tensor, "full_tensor")


class Shards:
    """The networks' and the optimizer's tensors, whole ones made of this process's part of them and back.

    These are PyTorch's own ways: one process and DDP hold whole tensors, FSDP2 DTensors cut along the first dimension.

    Args:
        optimizer: of the networks' final parameters.
        keep: whether this process takes what is whole, on the CPU; others help to put it together, and forget it.
    """

    def __init__(self, network: nn.Module, optimizer: Any, *, keep: bool) -> None:
        self.network, self.optimizer, self.keep = network, optimizer, keep
        self.parameters = dict(network.named_parameters())

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

    def whole_model(self) -> Tensors:
        """The networks' whole state dict; all processes must call it, as the next two."""
        names = self.parameters
        whole = ((name, self.gather(value, self.local_shard(value))) for name, value in names.items())
        buffers = ((name, value) for name, value in self.network.state_dict().items() if name not in names)
        return self._kept(whole) | self._kept(buffers)

    def whole_average(self, average: ExponentialMovingAverage) -> Tensors:
        """The whole averaged weights."""
        return self._kept(
            (name, self.gather(self.parameters[name], shard) if name in self.parameters else shard)
            for name, shard in average.shadow.items()
        )

    def whole_optimizer(self) -> Tensors:
        """The optimizer's whole state, as ``key.parameter``."""
        return self._kept(
            (f"{key}.{name}", each) for name, state in self.gather_states() for key, each in state.items()
        )

    def load_average(self, average: ExponentialMovingAverage, saved: Mapping[str, Tensor]) -> None:
        """Load the moving average into this process's shards."""
        names = self.parameters
        average.load_state_dict(
            {name: self.cut(names[name], value) if name in names else value for name, value in saved.items()}
        )

    def load_optimizer(self, saved: Mapping[str, Tensor]) -> None:
        """Load what `whole_optimizer` gave into this process's shards."""
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for name, value in saved.items():
            key, _, parameter = name.partition(".")
            states[parameter][key] = value
        self.load_states(states)

    def _kept(self, tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
        """One after the other, so that no device ever holds more than one that is put together."""
        return {name: value.detach().cpu() for name, value in tensors if self.keep}

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

    def __init__(self, network: nn.Module, optimizer: Any, *, keep: bool) -> None:
        super().__init__(network, optimizer, keep=keep)
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
