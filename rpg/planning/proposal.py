"""A configuration for a zoo that comes without one: what has worked for zoos of its size, its runs and its conditions.

The rules are those of the recipes that were measured (docs/results.md): configs/digits_demo.yaml for small networks,
configs/large/base.yaml for large ones, configs/digits_unseen_vit_tiny.yaml for conditions, configs/fields.yaml for
several networks of one class.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rpg.config import Config, overridden
from rpg.models.conditioning import ConditionConfig
from rpg.planning.plan import require_memory, training_need
from rpg.planning.zoo_summary import ZooSummary
from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.layout.canonical import no_product
from tokenization.layouts import layout_without_statistics
from tokenization.zoo.zoo import Zoo

MANY_VALUES = 100_000
"""Values from which on tokens are coefficients along the zoo's directions, which are few in any network."""

SMALL_TOKENS = 32
"""About as many tokens a small network is cut into, whatever its size."""

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Proposal:
    """What is proposed.

    Attributes:
        tree: the values that differ from the defaults, or that a user will want to change.
        reasons: a sentence each.
        asked: words of a command that ask for a network, of the first checkpoint's condition where there is one.
    """

    tree: dict[str, Any]
    reasons: tuple[str, ...]
    asked: str = ""

    @property
    def commands(self) -> str:
        """What makes networks once the configuration is in a file ``{file}``."""
        return f"rpg train {{file}} && rpg generate {self.tree['run']}{self.asked}"

    @property
    def config(self) -> Config:
        """The whole configuration."""
        return Config.parse(self.tree, "the proposed configuration")

    def __repr__(self) -> str:
        return self.text()

    def text(self) -> str:
        """As YAML, the reasons as comments above it."""
        lines = [f"# {line}" for reason in self.reasons for line in textwrap.wrap(reason, 116)]
        return "\n".join(lines) + "\n" + yaml.safe_dump(self.tree, sort_keys=False)


def propose(zoo: Zoo | Path | str, run: str | None = None, overrides: Sequence[str] = ()) -> Proposal:
    """A configuration to train a generator on a zoo with; no values are read.

    Args:
        zoo: two checkpoints or more, or the folder that they are in.
        run: the run folder; ``runs/`` and the zoo's name when None.
        overrides: ``section.field=value``, as `Config.load` takes them; they stand, whatever else is proposed.

    Raises:
        InputError: a single checkpoint, no size of training fits into the memory that is free, an encoder of texts that
            cannot be loaded, or an override is of no field.
    """
    zoo = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo)
    splits = Counter(entry.split for entry in zoo.entries)
    trained = ["train"] if splits["train"] else sorted(splits)
    conditions = [entry.condition for entry in zoo.entries if entry.split in trained]
    runs = len({entry.run for entry in zoo.entries if entry.split in trained})
    count = len(conditions)
    if count < 2:
        raise InputError(f"{zoo.path} has one checkpoint to learn from; a generator needs several, so add some")
    values = ZooSummary.of(zoo, Config.defaults()).layout.num_values
    reasons = [f"Proposed by rpg inspect for {count:,} checkpoints of {runs:,} run(s) of {values:,} values."]
    tree: dict[str, Any] = {"run": run or f"runs/{zoo.path.resolve().name}", "zoo": str(zoo.path)}
    large = values >= MANY_VALUES
    tree["tokens"] = _tokens(values, large, reasons)
    if (variant := no_product(zoo)) is not None:
        tree["tokens"]["lora_canonical"] = "none"
        reasons.append(f"Adapters with {variant}: their pairs are not simply multiplied, so they are learned as saved.")
    model, generate = _state(count, runs, conditions, zoo, tree["tokens"], reasons)
    model |= {
        "backbone": {"kind": "lstm", "d_model": 128, "num_layers": 1},
        "denoiser": {"kind": "mlp", "width": 128, "hidden": 256, "depth": 2},
    }
    train: dict[str, Any] = {"splits": trained, "steps": 150 if large else 200, "batch_size": 8 if large else 16}
    train["learning_rate"] = 1e-3 if zoo.condition is not None else 3e-3
    if large:
        layout = layout_without_statistics(zoo.checkpoint(0), Config.parse(tree, "tokens").tokens, len(zoo))
        train |= {"warmup_steps": 20, "ema_decay": 0.95}
        if layout.num_tokens > 2048:
            train |= {"tokens": 2048, "batch_size": 4}
    tree |= {"model": {"kind": "recurrent", **model}, "train": train, "generate": generate}
    if large:
        tree["evaluate"] = {"num": 24, "num_baseline": 5}
    if zoo.task is not None:
        reasons.append(f"The zoo's own task, {zoo.task.get('name')}, scores networks: rpg evaluate {tree['run']}.")
    tree = overridden(tree, overrides)
    condition = Config.parse(tree, "--set").model.condition
    proposal = _fitted(Proposal(tree, tuple(reasons), asked(zoo, condition)))
    return replace(proposal, tree=overridden(proposal.tree, overrides))


def write_config(zoo: Path, path: Path, overrides: Sequence[str] = ()) -> Proposal:
    """Write the configuration that is proposed for a zoo, with ``overrides`` as `Config.load` takes them.

    Raises:
        InputError: it is not a zoo, the file is there, or an override is of no field.
    """
    if not (zoo / "zoo.json").is_file():
        raise InputError(f"--write-config needs a zoo, and {zoo} is not one; collect one first")
    if path.exists():
        raise InputError(f"{path} already exists; name another file with --write-config, or remove it")
    proposal = propose(Zoo.open(zoo), overrides=overrides)
    write_text(path, proposal.text())
    return proposal


def asked(zoo: Zoo | Path | str, condition: ConditionConfig) -> str:
    """Words that ask a generator for a network, after ``rpg generate RUN``: as the zoo's first checkpoint, if there."""
    if condition.kind == "none":
        return ""
    if condition.kind == "examples":
        return " --examples FOLDER"
    known: Zoo | None = None
    with contextlib.suppress(InputError):
        known = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo)
    entries = known.entries if known is not None else []
    if condition.kind == "metric":
        values = [entry.metrics[str(condition.name)] for entry in entries if condition.name in entry.metrics]
        return f" --metric {condition.name}={values[0]:.3g}" if values else f" --metric {condition.name}=VALUE"
    first = next((entry.condition for entry in entries if entry.condition is not None), None)
    if condition.kind == "text":
        names = known.condition.names if known is not None and known.condition is not None else ()
        return f" --prompt {shlex.quote(names[int(first[0])])}" if first is not None and names else " --prompt TEXT"
    return f" --condition {','.join(f'{value:g}' for value in first)}" if first is not None else " --condition VALUES"


def _tokens(values: int, large: bool, reasons: list[str]) -> dict[str, Any]:
    if large:
        reasons.append("Large networks: tokens are coefficients along the directions in which the zoo varies (rank).")
        return {"size": 16384, "pack": True, "rank": "auto"}
    size = 2 ** round(math.log2(values / SMALL_TOKENS)) if values > SMALL_TOKENS else 1
    reasons.append(f"Small networks: about {SMALL_TOKENS} tokens of values each.")
    return {"size": min(max(size, 16), 4096)}


def _state(
    count: int, runs: int, conditions: list[Any], zoo: Zoo, tokens: dict[str, Any], reasons: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The permutation state and the condition, and how networks are asked for."""
    kind = zoo.condition.kind if zoo.condition is not None else "none"
    if kind == "none":
        width = min(count - 1, 64, max(16, runs + 6) if runs < count else 16)  # what parts the runs, and more
        reasons.append(f"No conditions: a code of {width} numbers says which checkpoint a network is like.")
        reasons.append("generate.state: density draws new codes near those of the checkpoints.")
        if runs == count:
            reasons.append(
                "Between runs that were trained apart new networks may be as bad as averages, and generate.state: "
                "stored gives copies of originals; compare them with rpg evaluate."
            )
        return {"state": {"of": "code", "width": width}}, {"steps": 4, "state": "density"}
    condition: dict[str, Any] = {"kind": kind}
    if kind == "text":
        condition["encoder"] = ENCODER
        reasons.append("Texts: model.condition.encoder turns them into vectors, and prompts later on.")
    several = count / len(set(conditions))
    if several >= 4:
        width = min(64, count - 1)
        reasons.append(
            f"{several:.0f} checkpoints for each condition: a code of {width} numbers, drawn by a prior of its own, "
            "says which of them a network is like."
        )
        state = {"of": "code", "width": width, "prior": {}}
        return {"state": state, "condition": condition}, {"steps": 4, "state": "prior"}
    tokens["centre"] = "condition"
    reasons.append(
        "Conditions: tokens are their regression on the condition, and diffusion makes the rest; no state of its own, "
        "which would explain what the condition should. rpg train --compare says whether kernel ridge alone is better."
    )
    return {"state": {"of": "none"}, "condition": condition}, {"steps": 1}


def _fitted(proposal: Proposal) -> Proposal:
    """With the largest batch, then the most tokens a step, whose training fits into the memory that is free."""
    while True:
        need = training_need(proposal.config)
        try:
            if need is not None:
                require_memory(need)
            return proposal
        except InputError:
            train = dict(proposal.tree["train"])
            if train["batch_size"] > 1:
                train["batch_size"] //= 2
            elif train.get("tokens", 2048) > 64:
                train["tokens"] = train.get("tokens", 2048) // 2
            else:
                raise
        note = f"train.batch_size {train['batch_size']}: what the free memory has room for."
        kept = tuple(reason for reason in proposal.reasons if not reason.startswith("train.batch_size"))
        proposal = replace(proposal, tree={**proposal.tree, "train": train}, reasons=(*kept, note))
