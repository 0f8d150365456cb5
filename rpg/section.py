"""The base class of configuration sections: reading, checks (each fault is one sentence) and renamed keys."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError

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
    def _known_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if cls.constants.get(key, _OTHER) != value}
        return require_known(values, cls.model_fields)


UNKNOWN = "unknown_key"
"""Pydantic's type of the error that `require_known` raises."""


def require_known(values: Any, known: Collection[str]) -> Any:
    """The values; pydantic refuses them if they are a mapping with a key that is not known."""
    for key in values if isinstance(values, dict) else ():
        if isinstance(key, str) and key not in known:
            raise PydanticCustomError(UNKNOWN, "unknown key", {"key": key, "known": list(known)})
    return values


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
        raise _explain(values, error, where) from None


def _explain(values: Any, error: ValidationError, where: str) -> InputError:
    """The first fault as one line that names the field and the cure."""
    first = error.errors()[0]
    path, current = [], values
    for part in first["loc"]:
        if (isinstance(current, dict) and part in current) or isinstance(current, list | tuple):
            path.append(str(part))
            current = current[part]  # type: ignore[index]
        elif first["type"] == "missing" and part == first["loc"][-1]:
            path.append(str(part))  # any other part that is not in the values is the tag of a union
    field = ": ".join(filter(None, (where, ".".join(path))))
    if first["type"] == UNKNOWN:
        key, known = first["ctx"]["key"], first["ctx"]["known"]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        cure = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}."
        place = f"{field}{'.' if path else ': ' if where else ''}{key}"
        return InputError(f"{place} is an unknown key; {cure}")
    if first["type"] == "missing":
        return InputError(f"{field} is missing; give it a value.")
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{field} cannot be {first['input']!r}: {message[0].lower() + message[1:]}.")


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
