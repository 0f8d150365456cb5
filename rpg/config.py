"""The configuration of an experiment: one typed tree, read strictly from YAML, saved beside every run."""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from rpg.evaluation.config import EvaluateConfig
from rpg.generation.config import GenerateConfig
from rpg.migration import migrate, with_model_kind
from rpg.models import ModelConfig, RecurrentConfig
from rpg.section import Section
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

    @classmethod
    def load(cls, path: Path | str, overrides: list[str] | None = None) -> Config:
        """Read a YAML file; ``overrides`` are ``section.field=value`` with YAML values.

        A file may name another as ``extends: other.yaml`` (relative to itself) and say only what differs. Of several,
        ``extends: [first.yaml, second.yaml]``, later ones win.

        Raises:
            InputError: the file is missing or not YAML, a key is unknown, or a value is impossible.
        """
        tree = with_model_kind(_read_tree(Path(path)))
        for override in overrides or []:
            _apply(tree, override)
        return cls.parse(tree, str(path))

    @classmethod
    def defaults(cls, overrides: list[str] | None = None) -> Config:
        """The defaults with ``overrides`` as in ``load``. Raises InputError for an unknown key or impossible value."""
        tree: dict[str, Any] = {}
        for override in overrides or []:
            _apply(tree, override)
        return cls.parse(tree, "--set")

    @classmethod
    def parse(cls, tree: dict[str, Any], where: str) -> Config:
        """Validate a tree of plain values; ``where`` names it in errors."""
        try:
            return cls.model_validate(with_model_kind(migrate(tree)))
        except ValidationError as error:
            raise _explain(cls, error, where) from None

    def save(self, path: Path | str) -> None:
        """Write every value, defaults included, as YAML."""
        Path(path).write_text(yaml.safe_dump(self.plain(), sort_keys=False))

    def plain(self) -> dict[str, Any]:
        """The tree as plain values (JSON types)."""
        return self.model_dump(mode="json")


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(str(path), "no such file", "a YAML configuration", "see configs/ for examples")
    if path.resolve() in seen:
        raise InputError(str(path), "a file that extends itself", "", "remove one of the extends lines")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"invalid YAML ({error})", "a YAML mapping") from None
    if not isinstance(tree, dict):
        raise InputError(str(path), type(tree).__name__, "a YAML mapping of sections")
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
            same_kind = all(value.get(tag, old.get(tag)) == old.get(tag) for tag in ("kind", "name"))
            merged[key] = _merge(old, value) if same_kind else value
        else:
            merged[key] = value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError("--set", repr(override), "section.field=value", "for example --set train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {key}", repr(text), "a YAML value") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    change: Any = value
    for part in reversed(key.strip().split(".")):
        change = {part: change}
    tree.update(_merge(tree, migrate(change)))


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> InputError:
    """The first fault as one line that names the field and the cure."""
    first = error.errors()[0]
    path, siblings = _locate(model, first["loc"])
    field = ".".join(path)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        cure = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(siblings))}"
        return InputError(f"{where}: {field}", "an unknown key", "", cure)
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{where}: {field}", repr(first["input"]), message[0].lower() + message[1:])


def _locate(model: Any, location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The dotted path of a pydantic location without union tags, and the keys known beside its last part."""
    path: list[str] = []
    siblings: list[str] = []
    current: list[Any] = [model]
    for part in location:
        names = {name: kind for member in current for name, kind in _fields(member).items()}
        if names and part not in names and part in {tag for member in current for tag in _tags(member)}:
            current = [member for member in current if part in _tags(member)]
            continue
        path.append(str(part))
        siblings = list(names) or siblings
        current = _members(names[str(part)]) if part in names else []
    return path, siblings


def _members(annotation: Any) -> list[Any]:
    """The classes of a (nested, annotated) union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _fields(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in fields(kind)}
    return {}


def _tags(kind: Any) -> tuple[str, ...]:
    """The literal ``kind`` or ``name`` values, by which a union tells its members apart."""
    known = _fields(kind)
    literals = [known[tag] for tag in ("kind", "name") if tag in known and get_origin(known[tag]) is Literal]
    return tuple(str(value) for literal in literals for value in get_args(literal)) + (
        (kind.__name__,) if isinstance(kind, type) else ()
    )
