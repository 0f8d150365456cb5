"""The task `language`: LoRA or DoRA adapters of one language model, one for each JSONL file.

T adapters or tasks, C condition values, B rows, S token positions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from rpg.packages import without_bars
from rpg.seeding import derive_seed, make_rng
from rpg.tasks.collecting import ManyTasks
from rpg.tasks.language.adapter_bank import (
    AdapterBank,
    AdapterScores,
    completion_losses,
    fresh_adapter,
    peft_config,
    peft_on,
    score_adapters,
)
from rpg.tasks.language.adapter_training import ShownRows, train_one, train_side_by_side
from rpg.tasks.language.config import LanguageConfig
from rpg.tasks.language.rows import Rows, TaskFile, find_tasks, make_symbols, read_rows, rows_of, stack_rows
from rpg.tasks.side_by_side import Stacked, Teacher, alone, repeat, stack
from tokenization.checkpoint.checkpoint import save_checkpoint
from tokenization.errors import InputError
from tokenization.files import atomic_files, atomic_folder
from tokenization.lora.adapter import CONFIG_NAME
from tokenization.zoo.condition import ConditionSpec
from tokenization.zoo.zoo import Zoo

SCORED_ROWS = 2048
"""Rows of all adapters together in a forward pass of scoring."""


class LanguageTask(ManyTasks):
    """Trains and scores adapters. Raises InputError where files, table or base are not there or not right.

    The zoo's checkpoints are PEFT folders, named as the tasks' files.
    """

    unrecorded = ("processes",)

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        if config.training.until is not None and config.training.checkpoints > 1:
            raise InputError("task.training.until is set with several checkpoints; leave one of them out")
        if config.group > 1 and (config.adapter.dropout or config.training.gradient_checkpointing):
            field = "adapter.dropout" if config.adapter.dropout else "training.gradient_checkpointing"
            raise InputError(f"task.{field} works for one adapter at a time; leave it out, or set task.group: 1")
        self._rows: dict[int, dict[str, Rows]] = {}
        self._values: dict[tuple[int, str], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "_rows": {}, "_values": {}}  # workers load the base themselves

    @functools.cached_property
    def _found(self) -> tuple[list[TaskFile], ConditionSpec]:
        config = self.config
        table = config.conditions
        if config.symbols is not None:
            make_symbols(config.symbols, Path(config.base), Path(config.data), config.seed)
            table = table or str(Path(config.data) / "conditions.csv")
        return find_tasks(config.data, table, config.unseen, config.validation, config.seed, config.condition)

    @property
    def tasks(self) -> list[TaskFile]:
        """Every task, in the order of table or files."""
        return self._found[0]

    @property
    def condition(self) -> ConditionSpec:
        """What the conditions of the zoo's entries mean."""
        return self._found[1]

    def conditions(self) -> Tensor:
        """Every task's condition, ``[T, C]``."""
        return torch.tensor([task.condition for task in self.tasks])

    def splits(self) -> list[str]:
        """The split of every task: ``train``, ``validation`` or ``unseen``."""
        return [task.split for task in self.tasks]

    @functools.cached_property
    def _places(self) -> dict[tuple[float, ...], int]:
        conditions = self.conditions().float().tolist()  # as generators are asked for them
        return {tuple(row): place for place, row in reversed(list(enumerate(conditions)))}

    def places(self, conditions: Tensor) -> list[int]:
        """The tasks that conditions ``[T, C]`` stand for. Raises InputError for one that no task has."""
        keys = [tuple(row) for row in conditions.float().tolist()]
        for key in keys:
            if key not in self._places:
                raise InputError(
                    f"no task has the condition {list(key)}, and so there are no rows for it; give that of a task"
                )
        return [self._places[key] for key in keys]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        from transformers import AutoTokenizer

        _ = self._found  # a base that is made here is there then
        return _pretrained(AutoTokenizer, self.config.base)

    @functools.cached_property
    def base(self) -> nn.Module:
        """The base model, frozen, in the precision it is stored in."""
        from transformers import AutoModelForCausalLM

        _ = self._found
        model = _pretrained(AutoModelForCausalLM, self.config.base, dtype="auto")
        return model.to(self.device).eval().requires_grad_(False)

    @functools.cached_property
    def bank(self) -> AdapterBank:
        """Runs many adapters."""
        return AdapterBank(self.base, peft_config(self.config.adapter, self.config.base))

    def rows(self, place: int) -> dict[str, Rows]:
        """The rows of a task by split, tokenised once."""
        if place not in self._rows:
            self._rows[place] = read_rows(self.tasks[place].path, self.tokenizer, self.config.rows)
        return self._rows[place]

    def build(self) -> nn.Module:
        """The base model."""
        return self.base

    @property
    def example_classes(self) -> tuple[str, ...]:
        """Rows are of one kind."""
        return ("row",)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Of a row as values."""
        return (self.shown.size,)

    @functools.cached_property
    def shown(self) -> ShownRows:
        """Shows rows as the base sees them."""
        return ShownRows(self.base)

    def example_numbers(self, conditions: Tensor, classes: Tensor, rng: torch.Generator, split: str) -> Tensor:
        """Numbers of random rows of the tasks ``[T, C]``, as many as there are classes ``[T, n]``."""
        counts = torch.tensor([len(self.rows(place)[split]) for place in self.places(conditions)])
        return (torch.rand(classes.shape, generator=rng) * counts[:, None]).long()

    def examples(self, conditions: Tensor, classes: Tensor, rng: torch.Generator, split: str = "train") -> Tensor:
        """Those rows as values ``[T, n, P]``: what `rpg.tasks.language.adapter_training` makes of them."""
        numbers, values = self.example_numbers(conditions, classes, rng, split), []
        for place, chosen in zip(self.places(conditions), numbers, strict=True):
            if (place, split) not in self._values:
                self._values[place, split] = self.shown(self.rows(place)[split])
            values.append(self._values[place, split][chosen])
        return torch.stack(values)

    def inputs(self, examples: Tensor) -> Tensor:
        """The examples as they are."""
        return examples

    def read_examples(self, path: Path) -> Tensor:
        """The rows of a JSONL file as values ``[n, P]``. Raises InputError if it holds none."""
        return self.shown(rows_of(path, self.tokenizer, self.config.rows))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the base is."""
        return PartialState().device

    def train_part(self, tasks: list[int], folder: Path) -> tuple[list[Stacked], dict[str, Tensor]]:
        """Train the adapters of one part."""
        checkpoints = self.train(tasks)
        scores = [self._scores(weights, tasks, "validation") for weights in checkpoints]
        metrics = {f"validation_{name}": torch.stack([each[name] for each in scores]) for name in scores[0]}
        return [{name: value.cpu() for name, value in weights.items()} for weights in checkpoints], metrics

    def train(self, tasks: list[int]) -> list[Stacked]:
        """Adapters ``[T, *shape]`` for tasks given by their places: every checkpoint, in the order of steps."""
        device = next(self.base.parameters()).device
        starts = [self._start(place) for place in tasks]
        check = [self.rows(place)["validation"].to(device) for place in tasks]
        if self.config.group == 1:
            adapter = peft_config(self.config.adapter, self.config.base)
            trained = [
                train_one(self.base, adapter, start, self._draws([place], device), self.config.training, [rows])
                for place, start, rows in zip(tasks, starts, check, strict=True)
            ]
            return [stack(each) for each in zip(*trained, strict=True)]
        start = {name: value.to(device) for name, value in stack(starts).items()}
        return train_side_by_side(self.bank, start, self._draws(tasks, device), self.config.training, check)

    def _start(self, place: int) -> dict[str, Tensor]:
        """The adapter that training begins with; it changes nothing."""
        own = (place,) if self.config.start == "own" else ()
        seed = derive_seed(self.config.seed, "adapter", *own)
        return fresh_adapter(self.base, peft_config(self.config.adapter, self.config.base), seed)

    def untrained(self, zoo: Zoo, bits: Tensor) -> dict[str, Stacked]:
        """An adapter that changes nothing, for each of the tasks ``[T, C]``."""
        return {"no_adapter": repeat(self._start(0), len(bits))}

    def _draws(self, tasks: list[int], device: torch.device) -> Any:
        """Draws the next training rows of tasks: the same places in every task's file."""
        rng = make_rng(self.config.seed, "fine-tuning")  # the same for every part
        return lambda: self._draw(tasks, self.config.training.batch_size, rng, device)

    def _draw(self, tasks: list[int], num: int, rng: torch.Generator, device: torch.device) -> Rows:
        numbers = torch.randint(2**40, (num,), generator=rng)
        found = [self.rows(place)["train"] for place in tasks]
        return stack_rows([each[numbers % len(each)] for each in found]).to(device)

    def prepare(self, folder: Path) -> None:
        """Write the configuration of all adapters."""
        if (folder / CONFIG_NAME).exists():
            return
        config = peft_config(self.config.adapter, self.config.base)
        with peft_on(self.base, config):  # it completes the configuration: the base's name, fan_in_fan_out
            pass
        config.inference_mode = True
        with atomic_files(folder) as made:
            config.save_pretrained(str(made))

    def write(self, folder: Path, task: int, number: int, state_dict: Mapping[str, Tensor]) -> str:
        """Write an adapter as PEFT's folder; its place in the zoo."""
        several = self.config.training.checkpoints > 1
        name = f"checkpoints/{self.tasks[task].path.stem}" + (f"-{number:04d}" if several else "")
        with atomic_folder(folder / name) as temporary:
            (temporary / CONFIG_NAME).write_text((folder / CONFIG_NAME).read_text())
            save_checkpoint(temporary / "adapter_model.safetensors", state_dict)
        return name

    def scores(self, weights: Stacked, bits: Tensor, split: str = "test") -> AdapterScores:
        """Symbol accuracy, exact match and perplexity of T adapters at their tasks ``[T, C]``, each ``[T]``."""
        return self._scores(weights, self.places(bits), split)

    def _scores(self, weights: Stacked, tasks: list[int], split: str) -> AdapterScores:
        return score_adapters(self.bank, weights, [self.rows(place)[split] for place in tasks], SCORED_ROWS)

    def score(self, adapter: Mapping[str, Tensor], split: str = "test") -> dict[str, dict[str, float]]:
        """One adapter, under PEFT's names, on every task: metrics by task's name. Raises InputError for a misfit."""
        for name, like in self._start(0).items():
            found = list(adapter[name].shape) if name in adapter else None
            if found != list(like.shape):
                fault = "is missing" if found is None else f"has shape {found}"
                raise InputError(
                    f"tensor {name!r} {fault}, but this task's have shape {list(like.shape)}; check task.adapter"
                )
        weights, metrics = alone(adapter), {}
        for place, task in enumerate(self.tasks):
            scores = self._scores(weights, [place], split)
            metrics[task.path.stem] = {name: value.item() for name, value in scores.items()}
        return metrics

    def accuracies(self, weights: Stacked, bits: Tensor, split: str = "test") -> Tensor:
        """Symbol accuracy of T adapters at their tasks ``[T, C]``, float64 ``[T]``."""
        return self.scores(weights, bits, split)["symbol_accuracy"]

    def teacher(self, zoo: Zoo) -> Teacher:
        """Always raises: the base knows none of the tasks."""
        raise InputError("train.behaviour.target must be 'labels' here: the base model does not know the tasks")

    def behaviour_losses(
        self, weights: Stacked, conditions: Tensor, num_images: int, rng: torch.Generator,
        teacher: Teacher | None = None,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy ``[T]`` of T adapters at their tasks ``[T, C]`` on ``num_images`` random *training* rows each.

        Differentiable in ``weights``. ``teacher`` is always None, as this task has none.
        """
        rows = self._draw(self.places(conditions), num_images, rng, conditions.device)
        self.base.to(conditions.device)
        return completion_losses(self.bank, weights, rows)


def _pretrained(kind: Any, name: str, **options: Any) -> Any:
    try:
        with without_bars():
            return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        found = str(error).splitlines()[0][:200]
        raise InputError(
            f"task.base {name!r} could not be loaded ({found}); name a causal language model of transformers"
        ) from None
