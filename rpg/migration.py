"""Configurations that earlier versions wrote, in today's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_KINDS = {"rpg": "recurrent", "pdiff": "pdiff"}
"""What ``generator`` was, and the kind of model that it is."""


def migrate(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or a part of one, with the keys of earlier versions replaced.

    - ``generator: pdiff`` with a section ``pdiff``, and ``generator: rpg`` with a section ``model``, became one section
      ``model`` with its ``kind``;
    - ``train.fresh`` became ``train.new_states``, and ``train.behaviour.share`` became ``train.behaviour.fraction``;
    - ``model.start`` and ``model.state.start`` became ``initial``; for tasks see `migrate_task`.
    """
    if isinstance(tree.get("task"), dict):
        tree = {**tree, "task": migrate_task(tree["task"])}
    if isinstance(tree.get("model"), dict):
        model = _renamed(tree["model"], "start", "initial")
        if isinstance(model.get("state"), dict):
            model = {**model, "state": _renamed(model["state"], "start", "initial")}
        tree = {**tree, "model": model}
    if isinstance(tree.get("train"), dict):
        train = _renamed(tree["train"], "fresh", "new_states")
        if isinstance(train.get("behaviour"), dict):
            train = {**train, "behaviour": _renamed(train["behaviour"], "share", "fraction")}
        tree = {**tree, "train": train}
    if "generator" not in tree and "pdiff" not in tree:
        return tree
    tree = dict(tree)
    generator, pdiff = tree.pop("generator", None), tree.pop("pdiff", {})
    if generator == "pdiff" or (generator is None and "model" not in tree):
        tree["model"] = pdiff
    section = tree.get("model", {})
    if generator is not None and isinstance(section, dict):
        tree["model"] = {"kind": MODEL_KINDS.get(generator, generator), **section}
    return tree


def migrate_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task's section, as a configuration or a zoo has it, with the keys of earlier versions replaced.

    The task ``trajectories`` became ``training_runs``; of families of tasks, ``held_out`` became ``unseen``.
    """
    task = dict(task)
    if task.get("name") == "trajectories":
        task["name"] = "training_runs"
    if isinstance(task.get("held_out"), dict):
        task = _renamed(task, "held_out", "unseen")
    return task | {key: migrate_task(task[key]) for key in ("family",) if isinstance(task.get(key), dict)}


def _renamed(section: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The section with ``new`` for ``old``; one that has both is left to be refused."""
    return section if new in section else {new if key == old else key: value for key, value in section.items()}


def with_model_kind(tree: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration whose model says its kind: recurrent where none is named."""
    model = tree.get("model")
    return {**tree, "model": {"kind": "recurrent", **model}} if isinstance(model, dict) else tree
