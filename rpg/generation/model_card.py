"""The model card of a generator folder and its publication: what it is, how good, how it is used."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpg.config import Config
from rpg.generation.folders import OPTIONAL_FILES
from tokenization.checkpoint.safetensors import read_json
from tokenization.zoo.hub import publish, without_local_paths

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
    """The text of the ``README.md`` of a `rpg.generation.generator.Generator`, published or in a local folder."""
    layout, condition, shown = generator.layout, generator.condition, published or Published()
    rows = "\n".join(f"| {name} | {value} |" for name, value in generator.facts.items())
    asked = f"{condition.kind}, {condition.size} values" if condition else "none"
    if generator.texts is not None:
        asked = f"text, through the sentence encoder {generator.texts.encoder}"
    base = json.loads(generator.adapter).get("base_model_name_or_path") if generator.adapter is not None else None
    adapters = f"\nThe checkpoints are adapters of {base}, written as folders for PEFT." if generator.adapter else ""
    copied = f"\n{layout.copied_note}" if layout.copied_note else ""
    pictures = "".join(f"\n![{Path(path).stem}]({path})\n" for path in shown.pictures)
    return f"""---
{_metadata(generator, shown, base)}
---
# Generator of neural-network weights

Writes checkpoints of {layout.num_values:,} values ({len(layout.layers)} layers, {layout.num_tokens:,} tokens of
{layout.token_size}). Condition: {asked}. Normalization: {layout.options.normalization}.
{generator.config.model.description}{adapters}{copied}
{pictures}
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
    name = published.repo.partition("/")[2]
    data = ModelCardData(library_name="rpg", tags=tags, base_model=base, model_name=name, eval_results=results or None)
    return str(data.to_yaml())


def _example(generator: Any) -> str:
    """What the call of ``generate`` must be told, with the comma before it."""
    condition: ConditionSpec | None = generator.condition
    asked = ""
    if generator.metric is not None:
        asked = f"[{(generator.metric.low + generator.metric.high) / 2:.4g}]"
    elif condition is not None and condition.kind == "text":
        asked = json.dumps(condition.names[0], ensure_ascii=False)
    elif condition is not None:
        asked = "[0]" if condition.kind == "class" else f"[1] + [0] * {condition.size - 1}"
    return (f", condition={asked}" if asked else "") + (
        ', initial="your/checkpoint.safetensors"' if generator.takes_initial else ""
    )


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


REPLACED = (*OPTIONAL_FILES, "evaluation.json", "pictures/*.png")
"""What an earlier version of a generator may have left in its repository."""


def push_generator(generator: Any, repo: str, run: Path | None, **options: Any) -> str:
    """Publish a `rpg.generation.generator.Generator` as ``name/generator``, and return the address of the commit.

    Args:
        run: the run folder whose ``evaluation.json`` and pictures go with it, if any.
        options: as `tokenization.zoo.hub.publish` takes them.

    Raises:
        InputError: the hub refuses or cannot be reached.
    """
    shared = without_places(generator)
    pictures = {f"pictures/{path.name}": path for path in sorted(run.glob("*.png"))} if run is not None else {}
    scores = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = shared.save_pretrained(Path(temporary) / "generator")
        if run is not None and (run / "evaluation.json").is_file():
            evaluation = without_local_paths(read_json(run / "evaluation.json"))
            scores = scores_of(evaluation)
            (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
        card = model_card(shared, Published(repo, scores, list(pictures)))
        (folder / "README.md").write_text(card, encoding="utf-8")
        files: dict[str, Path | bytes] = {path.name: path for path in sorted(folder.iterdir())}
        return publish({**files, **pictures}, repo, "model", REPLACED, **options)


def without_places(generator: Any) -> Any:
    """The same generator without the paths of this machine: of run, zoo, data, base model and sentence encoder."""
    shared = copy.copy(generator)
    shared.config = Config.parse(without_local_paths(generator.config.plain()), "config.yaml")
    shared.facts = without_local_paths(generator.facts)
    if generator.adapter is not None:
        shared.adapter = json.dumps(without_local_paths(json.loads(generator.adapter)), indent=2) + "\n"
    if generator.texts is not None:
        shared.texts = dataclasses.replace(generator.texts, encoder=without_local_paths(generator.texts.encoder))
    return shared


def scores_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The means that ``evaluation.json`` holds, by kind of networks: the generated first, then the others.

    Empty where nothing of the generated networks is known, and of files of earlier versions.
    """
    kinds = evaluation.get("kinds") or {}
    found = {
        kind: {name: float(summary["mean"]) for name, summary in each["summaries"].items() if summary}
        for kind, each in kinds.items()
    }
    generated = found.pop("generated", {})
    return {"generated": generated, **{kind: each for kind, each in found.items() if each}} if generated else {}
