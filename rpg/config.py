"""The configuration of an experiment: one typed tree, read strictly from YAML, saved beside every run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from rpg.evaluation.config import EvaluateConfig
from rpg.generation.config import GenerateConfig
from rpg.migration import migrate, with_model_kind
from rpg.models import ModelConfig, RecurrentConfig
from rpg.section import Section, default_config, exists, read_mapping, validated
from rpg.tasks.config import TaskConfig
from rpg.training.config import TrainConfig
from tokenization.errors import InputError
from tokenization.layout.layout import TokenOptions


class Config(Section):
    """An experiment."""

    seed: int = Field(0, ge=0)
    run: str = Field("runs/run", description="the run folder")
    zoo: str = Field("runs/zoo", description="the zoo folder")
    task: TaskConfig | None = Field(
        None, description="what collects and scores checkpoints; null for a zoo of your own"
    )
    tokens: TokenOptions = TokenOptions()
    model: ModelConfig = RecurrentConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _joint_denoiser_takes_all_tokens(self) -> Config:
        if isinstance(self.model, RecurrentConfig) and self.model.denoiser.kind == "joint" and self.train.tokens:
            raise ValueError("train.tokens must be null with model.denoiser.kind joint, which looks at all tokens")
        return self

    @classmethod
    def load(cls, path: Path | str, overrides: list[str] | None = None) -> Config:
        """Read a YAML file; ``overrides`` are ``section.field=value`` with YAML values.

        A file may name another as ``extends: other.yaml`` (relative to itself) and say only what differs. Of several,
        ``extends: [first.yaml, second.yaml]``, later ones win. A ``configs/…`` that is not there is the package's own.

        Raises:
            InputError: the file is missing or not YAML, a key is unknown, or a value is impossible.
        """
        path = Path(path)
        if path.parts[:1] == ("configs",) and not exists(path):
            own = default_config(str(Path(*path.parts[1:])))
            path = own if exists(own) else path
        tree = with_model_kind(_read_tree(path))
        for override in overrides or []:
            _apply(tree, override)
        return cls.parse(tree, str(path))

    @classmethod
    def defaults(cls, overrides: list[str] | None = None) -> Config:
        """The defaults with ``overrides`` as in ``load``. Raises InputError for an unknown key or impossible value."""
        return cls.parse(overridden({}, overrides or []), "--set")

    @classmethod
    def parse(cls, tree: dict[str, Any], where: str) -> Config:
        """Validate a tree of plain values; ``where`` names it in errors."""
        return validated(cls, with_model_kind(migrate(tree)), where)

    def save(self, path: Path | str) -> None:
        """Write every value, defaults included, as YAML."""
        Path(path).write_text(yaml.safe_dump(self.plain(), sort_keys=False))

    def plain(self) -> dict[str, Any]:
        """The tree as plain values (JSON types)."""
        return self.model_dump(mode="json")


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise InputError(f"{path} extends itself; remove one of the extends lines")
    tree = read_mapping(path, "a YAML configuration (see configs/ for examples)")
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise InputError(f"{path}: extends is {parents!r}; name one file or a list of files, relative to this one.")
    base: dict[str, Any] = {}
    for parent in parents:
        base = _merge(base, _read_tree(path.parent / parent, (*seen, path.resolve())))
    return _merge(base, migrate(tree))


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` over ``base``; a section whose ``kind`` (or ``name``) changes starts afresh."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            tag = "kind" if "kind" in old else "name"  # a metric has both: its name is no kind
            same_kind = value.get(tag, old.get(tag)) == old.get(tag)
            merged[key] = _merge(old, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def overridden(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a configuration's tree with ``section.field=value`` put in. Raises InputError for what is no change."""
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        _apply(changed, override)
    return changed


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(
            f"--set {override!r} is no change; write section.field=value, for example --set train.steps=100"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {key} has {text!r}, which is no YAML value; correct it") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    change: Any = value
    for part in reversed(key.strip().split(".")):
        change = {part: change}
    tree.update(_merge(tree, migrate(change)))
