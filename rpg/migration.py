"""Configurations that earlier versions wrote, in today's form."""

from __future__ import annotations

from typing import Any

MODEL_KINDS = {"rpg": "recurrent", "pdiff": "pdiff"}
"""What ``generator`` was, and the kind of model that it is."""


def migrate(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or a part of one, with the keys of earlier versions replaced.

    - ``generator: pdiff`` with a section ``pdiff``, and ``generator: rpg`` with a section ``model``, became one section
      ``model`` with its ``kind``;
    - ``train.fresh`` became ``train.new_states``, and ``train.behaviour.share`` became ``train.behaviour.fraction``.
    """
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


def _renamed(section: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """The section with ``new`` for ``old``; one that has both is left to be refused."""
    return section if new in section else {new if key == old else key: value for key, value in section.items()}


def with_model_kind(tree: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration whose model says its kind: recurrent where none is named."""
    model = tree.get("model")
    return {**tree, "model": {"kind": "recurrent", **model}} if isinstance(model, dict) else tree
