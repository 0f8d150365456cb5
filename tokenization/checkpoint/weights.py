"""Which parts of a training checkpoint are the weights, and what their tensors are called in the plain network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.pickles import Inert, InertArray
from tokenization.checkpoint.safetensors import tensor_at
from tokenization.errors import InputError

_USUAL = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module", "net")
"""Where training scripts put the weights; averaged weights first, as timm prefers them."""

_AVERAGED = re.compile(r"ema|averag|swa", re.IGNORECASE)
_NO_WEIGHTS = re.compile(r"optim|momentum|exp_avg", re.IGNORECASE)
_MOST_ITEMS, _DEEPEST = 100, 6

_WRAPPER = "module."
_INNER = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = ("total_ops", "total_params")
"""What thop leaves in networks whose operations it counted."""


class NoWeightsError(InputError):
    """A file is read but holds no weights: an optimizer's state, a training script's arguments."""


@dataclass(frozen=True)
class Chosen:
    """How a checkpoint's weights are found and named.

    Attributes:
        key: the set of weights to take where a file holds several, as the error that lists them spells it.
        strip: prefix to cut off every name.
    """

    key: str | None = None
    strip: str = ""


AS_FOUND = Chosen()
"""The usual set of weights, no prefix cut off but wrappers'."""


@dataclass
class Weights:
    """Tensors by name, and a line on everything that was left out or renamed on the way."""

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def weights_in(content: Any, path: Path, key: str | None = None) -> Weights:
    """The weights in what a pickle held: the only set there is, the usual one of several, or the one of the ``key``.

    Args:
        content: as `load_inert` gives it.
        key: where the weights lie, such as ``generator`` or ``state_dict.model``.

    Raises:
        NoWeightsError: there are none.
        InputError: there are several sets and none is the usual one, no set of that key, or no plain tensors.
    """
    found: dict[str, Mapping[Any, Any]] = {}
    modules: list[str] = []
    _search(content, "", found, modules, set())
    if not found and isinstance(content, Mapping) and any(_has_dimensions(value, 0) for value in content.values()):
        found[""] = content
    if not found:
        raise _no_weights(content, modules, path)
    name, notes = _choose(found, path, key)
    tensors: dict[str, Any] = {}
    passed = []
    for entry, value in found[name].items():
        plain = value.tensor() if isinstance(value, InertArray) else value
        if isinstance(plain, Tensor) or (isinstance(value, Inert) and "ensor" in value.origin):
            tensors[entry] = plain  # an unknown kind of tensor is refused below, by its name
        else:
            passed.append(str(entry))
    if passed:
        notes.append(f"no tensors, passed over: {_some(passed)}")
    return Weights(check_tensors(tensors, path), notes)


def plain_names(names: Sequence[str], path: Path, chosen: Chosen, shapes: Mapping[str, tuple[int, ...]]) -> Renamed:
    """What tensors are called in the network itself, without what wrappers, compilers and averages add.

    ``shapes`` are those of the tensors, where they are known.

    Raises InputError if two tensors would have one name, or a name lacks the prefix to cut off.
    """
    notes = []
    kept = [name for name in names if name != "n_averaged"]
    if len(kept) < len(names) and all(name.startswith(_WRAPPER) for name in kept):
        notes.append("n_averaged, the counter of an averaged model, left out")
    else:
        kept = list(names)
    counters = {n for n in kept if n.rpartition(".")[2] in _COUNTERS and shapes.get(n, ()) in ((), (1,))}
    if counters and len(counters) < len(kept):
        notes.append("total_ops and total_params, the counters of thop, left out")
        kept = [name for name in kept if name not in counters]
    new = {name: _INNER.sub("", name) or name for name in kept}
    if any(name != text for name, text in new.items()):
        notes.append(f"{_some(sorted({m[2] + '.' for name in kept for m in _INNER.finditer(name)}))} cut out of names")
    if new and all(text.startswith(_WRAPPER) and text != _WRAPPER for text in new.values()):
        while all(text.startswith(_WRAPPER) and text != _WRAPPER for text in new.values()):
            new = {name: text.removeprefix(_WRAPPER) for name, text in new.items()}
        notes.append(f"{_WRAPPER} cut off every name")
        new = {name: _INNER.sub("", text) or text for name, text in new.items()}
    if chosen.strip:
        prefix = chosen.strip.removesuffix(".") + "."
        for name, text in new.items():
            if not text.startswith(prefix) or text == prefix:
                what = f"{tensor_at(path, name)} does not begin with {prefix!r}"
                raise InputError(f"{what}, which --strip should cut off every name; leave --strip out or fix it")
        new = {name: text.removeprefix(prefix) for name, text in new.items()}
        notes.append(f"{prefix} cut off every name")
    if len(set(new.values())) < len(new):
        texts = list(new.values())
        twice = next(text for text in texts if texts.count(text) > 1)
        raise InputError(f"{tensor_at(path, twice)} is there twice once wrappers' prefixes are cut; rename one of them")
    return Renamed(new, notes)


@dataclass(frozen=True)
class Renamed:
    """Plain names by those in the file, without what is left out; and a line on each kind of change."""

    names: dict[str, str]
    notes: list[str]

    @property
    def same(self) -> bool:
        """Whether the file's own names are the plain ones, all of them."""
        return not self.notes and all(name == text for name, text in self.names.items())


def common_prefix(names: Iterable[str]) -> str:
    """What all names of a network begin with up to a dot, such as ``net.``; empty where nothing, or one of PEFT's."""
    heads = {name.partition(".")[0] if "." in name else "" for name in names}
    head = heads.pop() if len(heads) == 1 else ""
    return f"{head}." if head and not head.isdigit() and head != "base_model" else ""


def check_tensors(state_dict: Mapping[str, Any], path: Path | str) -> dict[str, Tensor]:
    """The entries of a state dict as plain dense tensors. Raises InputError that names the first other one."""
    if not state_dict:
        raise InputError(f"{path} has no tensor; give a state dict")
    tensors: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"is of type {type(value).__name__}"
            raise InputError(f"{path}: entry {name!r} {what}, but a state dict holds tensors by name; leave it out")
        kind = None
        if value.is_quantized:
            kind = "a quantised tensor"
        elif value.layout != torch.strided or value.is_nested:
            kind = f"a sparse tensor ({value.layout})"
        elif value.is_meta:
            kind = "a tensor without data (meta device)"
        if kind:
            raise InputError(f"{tensor_at(path, name)} is {kind}; convert it to a dense tensor before saving")
        tensors[name] = value.detach()
    return tensors


def _search(content: Any, key: str, found: dict[str, Mapping[Any, Any]], modules: list[str], seen: set[int]) -> None:
    """Add every set of weights at any depth to ``found``, by its key; whole pickled networks to ``modules``."""
    if id(content) in seen or key.count(".") >= _DEEPEST:
        return
    seen.add(id(content))
    if isinstance(content, list | tuple) and len(content) <= _MOST_ITEMS:
        content = {str(index): each for index, each in enumerate(content) if not isinstance(each, Tensor)}
    if not isinstance(content, Mapping) or {"state", "param_groups"} <= content.keys():  # an optimizer's
        return
    if {"_parameters", "_modules"} <= content.keys():
        modules.append(getattr(content, "origin", ""))
        return
    if any(isinstance(name, str) and _has_dimensions(value) for name, value in content.items()):
        found[key] = content
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping | list | tuple):
            _search(value, f"{key}.{name}" if key else name, found, modules, seen)


def _has_dimensions(value: Any, least: int = 1) -> bool:
    if isinstance(value, InertArray):
        return len(value.args) > 2 and isinstance(value.args[2], tuple) and len(value.args[2]) >= least
    return isinstance(value, Tensor) and value.dim() >= least and (value.is_floating_point() or value.is_quantized)


def _choose(found: Mapping[str, Mapping[Any, Any]], path: Path, key: str | None) -> tuple[str, list[str]]:
    """The key of the set to take, and what to say about it."""
    names = ", ".join(name or "." for name in found)
    if key is not None:
        if (name := "" if key == "." else key) in found:
            return name, []
        raise InputError(f"{path} has no weights under {key!r}; --key takes one of {names}")
    large = [name for name in found if any(_has_dimensions(value, 2) for value in found[name].values())]
    left = [name for name in large or found if not _NO_WEIGHTS.search(name)] or list(found)
    if len(left) == 1:
        usual = not left[0] or left[0].partition(".")[0] in _USUAL
        return left[0], [] if usual and len(found) == 1 else [f"weights taken from {left[0] or '.'!r}"]
    ranks = {name: _USUAL.index(first) for name in left if (first := name.partition(".")[0]) in _USUAL}
    best = [name for name in left if ranks.get(name) == min(ranks.values(), default=None)]
    if len(best) != 1 and len({_shape_of(found[name], path) for name in left}) == 1:
        best = [name for name in left if _AVERAGED.search(name)]
    if len(best) != 1:
        raise InputError(f"{path} holds several sets of weights ({', '.join(left)}); choose one with --key {left[0]}")
    others = ", ".join(name or "." for name in left if name != best[0])
    return best[0], [f"weights taken from {best[0]!r} and not from {others} (--key chooses)"]


def _shape_of(entries: Mapping[Any, Any], path: Path) -> frozenset[tuple[str, tuple[int, ...]]]:
    shapes = {str(name): tuple(value.shape) for name, value in entries.items() if isinstance(value, Tensor)}
    plain = plain_names(list(shapes), path, Chosen(), shapes).names
    return frozenset((plain[name], shapes[name]) for name in plain)


def _no_weights(content: Any, modules: Sequence[str], path: Path) -> InputError:
    if modules:
        what = f"{path} is a whole network pickled with its code ({modules[0]}), which is not run"
        return InputError(f"{what}; where that code is, save its weights alone: torch.save(network.state_dict(), FILE)")
    if isinstance(content, list | tuple) and any(isinstance(each, Tensor) for each in content):
        what = f"{path} holds a list of tensors without names"
        return InputError(f"{what}; save the network's state_dict(), which names them")
    if not isinstance(content, Mapping):
        name = getattr(content, "origin", "") or type(content).__name__
        return NoWeightsError(f"{path} holds a {name}, no state dict; save the network's state_dict()")
    inside = f"but {_some([str(name) for name in content])}" if content and not isinstance(content, Inert) else ""
    return NoWeightsError(f"{path} has no tensor of weights {inside}".rstrip() + "; save the network's state_dict()")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
