"""Generators on the Hugging Face hub."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpg.config import Config
from rpg.generation.folders import OPTIONAL_FILES
from rpg.generation.model_card import Published, model_card
from tokenization.checkpoint.safetensors import read_json
from tokenization.zoo.hub import publish, without_local_paths

REPLACED = (*OPTIONAL_FILES, "evaluation.json", "pictures/*.png")
"""What an earlier version of a generator may have left in its repository."""


def push_generator(generator: Any, repo: str, run: Path | None, **options: Any) -> str:
    """Publish a generator.

    Args:
        generator: a :class:`rpg.generation.generator.Generator`.
        repo: ``name/generator``; made if it is not there.
        run: the run folder whose ``evaluation.json`` and pictures go with it, if any.
        options: as `tokenization.zoo.hub.publish` takes them.

    Returns:
        The address of the commit.

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

    Returns:
        Metrics by kind; empty where nothing of the generated networks is known, and of files of earlier versions.
    """
    kinds = evaluation.get("kinds") or {}
    found = {
        kind: {name: float(summary["mean"]) for name, summary in each["summaries"].items() if summary}
        for kind, each in kinds.items()
    }
    generated = found.pop("generated", {})
    return {"generated": generated, **{kind: each for kind, each in found.items() if each}} if generated else {}
