"""Processes of a run: rank and world size, how networks are sharded, and communication."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from rpg.config import TrainConfig
from rpg.devices import mixed_precision
from rpg.models.mamba2 import Mamba2
from rpg.packages import require_package
from rpg.training.optim import Shards, ZeROShards
from tokenization.errors import InputError

T = TypeVar("T")


class DistributedContext:
    """The processes of a run, as ``rpg train``, ``torchrun`` or ``accelerate launch`` started them.

    The configuration decides precision, accumulation and clipping, and overrides a launcher's own settings of these,
    except that ``train.precision: auto`` leaves the precision to the launcher.

    Raises:
        InputError: the launcher asks for what the training loop cannot do.
    """

    def __init__(self, settings: TrainConfig, folder: str) -> None:
        from accelerate import Accelerator  # here and below: what only looks at runs need not wait for it
        from accelerate.state import AcceleratorState
        from accelerate.utils import parse_flag_from_env

        self.settings = settings
        deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        precision = mixed_precision(settings.precision) or os.environ["ACCELERATE_MIXED_PRECISION"]
        # An earlier run of this process, perhaps one that failed, may have asked for another precision.
        AcceleratorState._reset_state(reset_partial_state=False)
        self.accelerator = Accelerator(
            mixed_precision="no" if deepspeed else precision,
            gradient_accumulation_steps=settings.gradient_accumulation,
            log_with=_trackers(settings.log_with, folder),
            project_dir=folder,
            kwargs_handlers=_deepspeed_on_cpu() if deepspeed and not torch.cuda.is_available() else [],
        )
        self.rank, self.world_size = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # accelerate counts one process per rank in some of its ways; torch always knows
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            atexit.register(_leave)
        self.device = self.accelerator.device
        self.spread: Literal["none", "zero", "fsdp"] = "none"
        if deepspeed:
            self.spread = "zero"
            self._configure_deepspeed(precision)
        elif parse_flag_from_env("ACCELERATE_USE_FSDP") and torch.distributed.is_initialized():
            self.spread = "fsdp"
        if self.spread != "none" and settings.optimizer != "adamw":
            raise InputError(
                "train.optimizer must be adamw under DeepSpeed or FSDP, which spread its moments over the "
                f"processes, not {settings.optimizer}"
            )

    def __str__(self) -> str:
        spread = {
            "none": "each with all weights",
            "zero": "weights spread by DeepSpeed",
            "fsdp": "weights spread by FSDP",
        }
        return f"{self.world_size} process{'es' * (self.world_size > 1)} on {self.device.type}, {spread[self.spread]}"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def require_single(self, what: str) -> None:
        """Raise InputError for several processes, DeepSpeed or FSDP, for which ``what`` is not made."""
        if self.world_size > 1 or self.spread != "none":
            raise InputError(f"{what} works in a single process without DeepSpeed or FSDP; start one.")

    def prepare(
        self, network: nn.Module, build_optimizer: Callable[[], torch.optim.Optimizer]
    ) -> tuple[nn.Module, Any, Shards]:
        """Spread the networks, with the weights that the run begins from, over the processes, in place.

        Returns:
            What to call in the forward pass, the optimizer of their final parameters, and how to put whole tensors
            together.
        """
        if self.spread != "none":
            for parameter in network.parameters():  # convolutions' weights may lie channels last, which neither cuts
                parameter.data = parameter.data.contiguous()
        if self.spread == "fsdp":
            _fully_shard(network.to(self.device))
            model, optimizer = network, self.accelerator.prepare_optimizer(build_optimizer())
        else:
            if self.spread == "zero":
                _keep_together(network)
            model, optimizer = self.accelerator.prepare(network, build_optimizer())
        shards = ZeROShards if self.spread == "zero" else Shards
        return model, optimizer, shards(network, optimizer.optimizer, keep=self.is_main)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process; all must call it, as the methods below."""
        return self.reduce(float(flag), "max") > 0

    def reduce(self, value: float, operation: Literal["sum", "max"]) -> float:
        """The sum or the maximum of every process's ``value``."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, operation.upper()))
        return total.item()

    def decide(self, choose: Callable[[], T]) -> T:
        """What the main process's ``choose()`` returns, on all processes."""
        chosen = [choose() if self.is_main else None]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(chosen)
        return chosen[0]  # type: ignore[return-value]

    def on_main(self, action: Callable[[], object]) -> None:
        """Run ``action`` on the main process while the others wait; its InputError is raised on all of them."""

        def attempt() -> InputError | None:
            try:
                action()
            except InputError as error:
                return error
            return None

        failure = self.decide(attempt)
        if failure is not None:
            raise failure

    def _configure_deepspeed(self, precision: str) -> None:
        """Let the run's configuration decide what DeepSpeed's JSON would otherwise have to repeat."""
        settings, content = self.settings, self.accelerator.state.deepspeed_plugin.deepspeed_config
        stage = content["zero_optimization"].get("stage", 0)
        if stage not in (1, 2, 3):
            raise InputError(
                f"zero_optimization.stage of DeepSpeed's configuration is {stage}; set 1, 2 or 3, or launch without "
                "DeepSpeed"
            )
        if any(content.get(name, {}).get("enabled") is True for name in ("bf16", "fp16")):
            raise InputError(
                "DeepSpeed's configuration enables bf16 or fp16, but the weights stay in fp32; disable them there, "
                "and set train.precision to bf16 for fast arithmetic"
            )
        parts = self.world_size * settings.gradient_accumulation
        content.pop("train_batch_size", None)
        content.update(
            train_micro_batch_size_per_gpu=max(1, settings.batch_size // parts),
            gradient_accumulation_steps=settings.gradient_accumulation,
            gradient_clipping=settings.gradient_clip,
            torch_autocast={"enabled": precision == "bf16", "dtype": "bfloat16"},
        )
        self.accelerator.gradient_accumulation_steps = settings.gradient_accumulation


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _deepspeed_on_cpu() -> list[Any]:
    """What accelerate needs to run DeepSpeed without a GPU: its rank and world size come with the backend."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    require_package("deepspeed", "the launcher asks for DeepSpeed")
    from accelerate.utils import InitProcessGroupKwargs
    from deepspeed.ops import __compatible_ops__

    # DeepSpeed compiles its own reduction for processes of one machine, for a minute, with a compiler; gloo has one.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return [InitProcessGroupKwargs(backend="gloo")]


def _keep_together(network: nn.Module) -> None:
    """Have ZeRO-3 gather all weights of a Mamba-2 layer as one: its kernels take those of its parts by themselves."""
    from deepspeed.utils import set_z3_leaf_module

    for module in network.modules():
        if isinstance(module, Mamba2):
            set_z3_leaf_module(module, True)


def _fully_shard(network: Any) -> None:
    """FSDP2: the backbone, the denoiser and the rest are gathered when used, each as one."""
    # loads for seconds, which a single process need not wait for
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(network.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for module in (network.backbone, network.denoiser, network):
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(network.denoiser, "precompute")


def _trackers(names: Sequence[str], folder: str) -> list[Any]:
    """What accelerate logs with; ``tensorboard`` is a folder of the run, ``wandb`` goes by its own environment."""
    if "wandb" not in names:
        return list(names)
    require_package("wandb", "train.log_with has wandb", ", or leave it out")
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker("rpg", name=Path(folder).name, dir=folder)
    return [*(name for name in names if name != "wandb"), tracker]
