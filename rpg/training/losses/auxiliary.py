"""Losses beside the denoiser's own: generated networks are run, and what they answer is scored."""

from __future__ import annotations

import torch

from rpg.config import Config
from rpg.models.recurrent_diffusion import Batch, Loss, RecurrentDiffusion
from rpg.seeding import make_rng
from rpg.tasks import Task, build_task, task_of
from rpg.training.distributed import DistributedContext
from rpg.training.losses.behaviour import BehaviourLoss
from rpg.training.losses.new_states import NewStatesLoss
from tokenization.errors import InputError
from tokenization.layouts import Layout
from tokenization.zoo.zoo import Zoo


class AuxiliaryLosses:
    """The sum of the losses that ``train.behaviour`` and ``train.new_states`` ask for; 0 without either.

    Args:
        config: the experiment.
        zoo: names the task where the configuration has none.
        layout: decodes tokens.
        network: the generator's networks; only the fresh-state loss runs them, which p-diff refuses to have.
        distributed: the processes of the run.

    Raises:
        InputError: the task, the sampled tokens, the conditions or the processes do not allow it.
    """

    def __init__(
        self, config: Config, zoo: Zoo, layout: Layout, network: RecurrentDiffusion, distributed: DistributedContext
    ) -> None:
        self.config = config
        self.distributed = distributed
        self.behaviour = self._build_behaviour(zoo, layout)
        self.new_states = self._build_new_states(zoo, layout, network)

    def _build_behaviour(self, zoo: Zoo, layout: Layout) -> BehaviourLoss | None:
        settings = self.config.train.behaviour
        if settings is None or not settings.weight:
            return None
        if self.config.train.tokens is not None and self.config.train.tokens < layout.num_tokens:
            raise InputError(
                f"train.tokens is {self.config.train.tokens}, but train.behaviour needs a whole network; set it to null"
            )
        if self.config.model.condition.kind == "none":
            raise InputError("train.behaviour needs a condition that names the task; set model.condition.kind")
        return BehaviourLoss(self._task(zoo), layout, settings, zoo)

    def _build_new_states(self, zoo: Zoo, layout: Layout, network: RecurrentDiffusion) -> NewStatesLoss | None:
        if self.config.train.new_states is None:
            return None
        if self.distributed.world_size > 1 or self.distributed.spread != "none":
            raise InputError("train.new_states works in a single process without DeepSpeed or FSDP; start one.")
        return NewStatesLoss(network, self._task(zoo), layout, self.config.train.new_states)

    def _task(self, zoo: Zoo) -> Task:
        return build_task(self.config.task) if self.config.task is not None else task_of(zoo)

    def __call__(self, step: int, batch: Batch, loss: Loss) -> torch.Tensor | float:
        """The losses of a step of this process, given its batch and what the denoiser made of it."""
        return self._behaviour_of(step, batch, loss) + self._new_states_of(step)

    def _behaviour_of(self, step: int, batch: Batch, loss: Loss) -> torch.Tensor | float:
        if self.behaviour is None:
            return 0.0
        assert loss.samples is not None and batch.conditions is not None
        rows = batch.group[: batch.num_last]
        dropped = None if batch.dropped is None else batch.dropped[rows]
        rng = make_rng(self.config.seed, "behaviour", step, 0)  # the same images on every process
        return self.behaviour(loss.samples, batch.conditions[rows], dropped, rng)

    def _new_states_of(self, step: int) -> torch.Tensor | float:
        """The loss of new states, once it has set in."""
        settings = self.config.train.new_states
        if self.new_states is None or settings is None or step < settings.start * self.config.train.steps:
            return 0.0
        with self.distributed.accelerator.autocast():
            return self.new_states(make_rng(self.config.seed, "fresh", step))  # as earlier versions drew

    def facts(self, seconds: float) -> dict[str, str]:
        """What the model card says of the losses, after ``seconds`` of training."""
        if self.behaviour is None:
            return {}
        return {"behaviour loss, share of training seconds": self.behaviour.fraction_of(seconds)}
