"""The base class of configuration sections: reading, checks (each fault is one sentence) and renamed keys."""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from tokenization.errors import InputError

_OTHER = object()
SectionType = TypeVar("SectionType", bound=BaseModel)


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("it must be odd")
    return value


Odd = Annotated[int, AfterValidator(_odd)]


class Section(BaseModel):
    """A frozen section of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    constants: ClassVar[dict[str, Any]] = {}
    """Fields of earlier versions that are constants now, with their values: read where they say the same."""

    @model_validator(mode="before")
    @classmethod
    def _without_constants(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if cls.constants.get(key, _OTHER) != value}


def read_mapping(path: Path, expected: str) -> dict[str, Any]:
    """The mapping in a YAML file, or the variant of that name that a file in its folder holds.

    A file may list ``variants``, which say by name what differs from it: ``large/base.yaml`` has ``vit_base``, which is
    read as ``large/vit_base.yaml`` and begins with ``extends: base.yaml`` unless it extends another one.

    Raises:
        InputError: there is no such file, or it holds something else; ``expected`` says what it should be.
    """
    if not path.is_file():
        variant = find_variant(path)
        if variant is None:
            raise InputError(f"There is no file {path}; name {expected}.")
        return variant
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is invalid YAML ({error}); name {expected}.") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}, not a mapping of sections; name {expected}.")
    tree.pop("variants", None)
    return tree


def default_config(name: str) -> Path:
    """A configuration that comes with the package: beside it in a checkout, inside it when installed."""
    package = Path(__file__).parent
    inside = package / "configs"
    return (inside if inside.is_dir() else package.parent / "configs") / name


def exists(path: Path) -> bool:
    """Whether there is such a file or variant."""
    return path.is_file() or find_variant(path) is not None


def find_variant(path: Path) -> dict[str, Any] | None:
    """The variant that a file in ``path``'s folder holds under ``path``'s name, or None."""
    for file in sorted(path.parent.glob("*.yaml")) if path.suffix == ".yaml" else ():
        variants = read_variants(file)
        if path.stem in variants:
            return {"extends": file.name, **(variants[path.stem] or {})}
    return None


def read_variants(file: Path) -> dict[str, Any]:
    """The variants that a file holds, by name."""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        text = file.read_text()
        return (yaml.safe_load(text).get("variants") or {}) if "variants:" in text else {}
    return {}


def validated(kind: type[SectionType], values: Any, where: str) -> SectionType:
    """Plain values as a section, or as one of a discriminated union; ``where`` names their source in errors.

    Raises:
        InputError: a key is unknown or a value impossible; it names the field and the cure.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise _explain(kind, error, where) from None


def _explain(model: Any, error: ValidationError, where: str) -> InputError:
    """The first fault as one line that names the field and the cure."""
    first = error.errors()[0]
    path, siblings = _locate(model, first["loc"])
    field = ": ".join(filter(None, (where, ".".join(path))))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        cure = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(siblings))}."
        return InputError(f"{field} is an unknown key; {cure}")
    if first["type"] == "missing":
        return InputError(f"{field} is missing; give it a value.")
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{field} cannot be {first['input']!r}: {message[0].lower() + message[1:]}.")


def _locate(model: Any, location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The dotted path of a pydantic location without union tags, and the keys known beside its last part."""
    path: list[str] = []
    siblings: list[str] = []
    current = _members(model)
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


MODEL_KINDS = {"rpg": "recurrent", "pdiff": "pdiff"}
"""What ``generator`` was, and the kind of model that it is."""


RENAMED = (
    ("model", "start", "initial"), ("model.state", "start", "initial"), ("train", "fresh", "new_states"),
    ("train.behaviour", "share", "fraction"),
)  # fmt: skip
"""Sections, keys of earlier versions, and what they are called now; for tasks see `migrate_task`."""


def migrate(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or a part of one, with the keys of earlier versions replaced.

    ``generator: pdiff`` with a section ``pdiff``, and ``generator: rpg`` with a section ``model``, became one section
    ``model`` with its ``kind``. Others were renamed.
    """
    if isinstance(tree.get("task"), dict):
        tree = {**tree, "task": migrate_task(tree["task"])}
    for section, old, new in RENAMED:
        tree = _renamed(tree, old, new, *section.split("."))
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


def _renamed(section: dict[str, Any], old: str, new: str, *path: str) -> dict[str, Any]:
    """The section with ``new`` for ``old`` in the one at ``path``, which is left to be refused if it has both."""
    if path:
        inner = section.get(path[0])
        return {**section, path[0]: _renamed(inner, old, new, *path[1:])} if isinstance(inner, dict) else section
    return section if new in section else {new if key == old else key: value for key, value in section.items()}


def with_model_kind(tree: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration whose model says its kind: recurrent where none is named."""
    model = tree.get("model")
    return {**tree, "model": {"kind": "recurrent", **model}} if isinstance(model, dict) else tree
