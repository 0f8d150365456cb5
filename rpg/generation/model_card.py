"""The model card of a generator folder: what it is, how good, how it is used; its metadata as the hub reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenization.zoo.condition import ConditionSpec

Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Published:
    """What a card says beyond its folder, of a generator that is published.

    Attributes:
        repo: its id on the hub.
        scores: figures by kind of networks, ``generated`` first.
        pictures: by their paths in the repository.
    """

    repo: str = "this/folder"
    scores: Scores = field(default_factory=dict)
    pictures: Sequence[str] = ()


def model_card(generator: Any, published: Published | None = None) -> str:
    """The text of a generator's ``README.md``.

    Args:
        generator: a :class:`rpg.generation.generator.Generator`.
        published: where it lies and how it was scored; None of a folder.
    """
    layout, condition, shown = generator.layout, generator.condition, published or Published()
    rows = "\n".join(f"| {name} | {value} |" for name, value in generator.facts.items())
    asked = f"{condition.kind}, {condition.size} values" if condition else "none"
    if generator.texts is not None:
        asked = f"text, through the sentence encoder {generator.texts.encoder}"
    base = json.loads(generator.adapter).get("base_model_name_or_path") if generator.adapter is not None else None
    adapters = f"\nThe checkpoints are adapters of {base}, written as folders for PEFT." if generator.adapter else ""
    copied = f"\n{layout.copied_note}" if layout.copied_note else ""
    return f"""---
{_metadata(generator, shown, base)}
---
# Generator of neural-network weights

Writes checkpoints of {layout.num_values:,} values ({len(layout.layers)} layers, {layout.num_tokens:,} tokens of
{layout.token_size}). Condition: {asked}. Normalization: {layout.options.normalization}.
{generator.config.model.description}{adapters}{copied}
{_pictures(shown.pictures)}
## How to use it
```python
from rpg import Generator

generator = Generator.from_pretrained("{shown.repo}")
networks = generator.generate(num=4, seed=0{_example(generator)})
```

Each is a state dict that plain `load_state_dict` takes; with `output="folder"` they are written as safetensors files.

{_table(shown.scores)}
## How it was trained
| | |
| --- | --- |
{rows}
"""


def _metadata(generator: Any, published: Published, base: str | None) -> str:
    """The front matter, without its dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    config = generator.config
    task = config.task.name if config.task is not None else "own checkpoints"
    figures = published.scores.get("generated", {})
    results = [
        EvalResult(
            task_type="other", task_name="weight generation", dataset_type=task.replace(" ", "-"), dataset_name=task,
            metric_type=name, metric_value=value, metric_name=f"{name} of generated networks, mean",
        )
        for name, value in figures.items()
    ]  # fmt: skip
    tags = ["rpg", "weight-generation", "neural-network-weights", config.model.kind.replace("_", "-")]
    data = ModelCardData(
        library_name="rpg",
        tags=tags,
        base_model=base,
        model_name=published.repo.partition("/")[2],
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _example(generator: Any) -> str:
    """What the call of ``generate`` must be told, with the comma before it."""
    condition: ConditionSpec | None = generator.condition
    words = ""
    if generator.metric is not None:
        words = f", condition=[{(generator.metric.low + generator.metric.high) / 2:.4g}]"
    elif condition is not None and condition.kind == "text":
        words = f", condition={json.dumps(condition.names[0], ensure_ascii=False)}"
    elif condition is not None and condition.kind == "class":
        words = ", condition=[0]"
    elif condition is not None:
        words = f", condition=[1] + [0] * {condition.size - 1}"
    return words + (', initial="your/checkpoint.safetensors"' if generator.takes_initial else "")


def _pictures(paths: Sequence[str]) -> str:
    return "".join(f"\n![{Path(path).stem}]({path})\n" for path in paths)


def _table(scores: Scores) -> str:
    """Scores of the generated networks beside those of all else that was scored, or where to find out."""
    if not scores:
        return "Whether these networks are new as well as good is measured by `rpg evaluate`, not promised here.\n"
    names = list(scores["generated"])
    lines = [
        f"| {kind.replace('_', ' ')} | {' | '.join(f'{each[name]:.4g}' if name in each else '' for name in names)} |"
        for kind, each in scores.items()
    ]
    head = f"| networks | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}"
    said = "Means over the networks. What needs no generator is in the other rows; better than those is what counts."
    return "\n".join(["## How good they are", head, *lines, "", said, ""])
