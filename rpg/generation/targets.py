"""The networks that exported weights are meant for, built without values, to compare keys and shapes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rpg.packages import without_bars
from rpg.tasks import load_callable
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.checkpoint.safetensors import read_json, tensor_at
from tokenization.checkpoint.tensor_file import find_ties
from tokenization.errors import InputError
from tokenization.lora.adapter import CONFIG_NAME


@dataclass(frozen=True)
class Target:
    """What a network's loader expects.

    Attributes:
        shapes: shape by key of the state dict.
        ties: ``{alias: key}`` of keys that are one tensor; one of them is enough.
        ignored: regular expressions of keys that the loader passes over.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, network: nn.Module, name: str) -> Target:
        """That of a network, which may be on the meta device."""
        state_dict = network.state_dict()
        ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
        shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
        return cls(name, shapes, find_ties(state_dict), tuple(ignored))

    def fault(self, found: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
        """The first key of some shapes that does not fit, and why not."""
        held = {self.ties.get(key, key) for key in found}
        for key, shape in self.shapes.items():
            if key not in found:
                if self.ties.get(key, key) not in held:
                    return key, f"is missing, and {self.name} has one of shape {list(shape)}"
            elif found[key] != shape:
                return key, f"has shape {list(found[key])}, but {list(shape)} in {self.name}"
        for key in found:
            if key not in self.shapes and not any(re.search(pattern, key) for pattern in self.ignored):
                return key, f"is not in {self.name}"
        return None

    def require(self, found: Mapping[str, tuple[int, ...]], path: Path | str) -> None:
        """Raise InputError for the first tensor that is missing, unexpected or of another shape."""
        if fault := self.fault(found):
            what = f"{tensor_at(path, fault[0])} {fault[1]}"
            raise InputError(f"{what}; name with --base the network that the zoo was made from")


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape by key, aliases included."""
    return {name: checkpoint.info(name).shape for name in checkpoint.order}


def transformers_target(base: Path, found: Mapping[str, tuple[int, ...]]) -> Target:
    """The network of a folder's ``config.json``: the class that it names, else the one of its kind that fits best.

    Raises:
        InputError: transformers knows no such network.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    read_json(base / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        names = list(getattr(config, "architectures", None) or ())
        classes = [getattr(transformers, name) for name in names]
        if not classes:
            mappings = [
                vars(modeling_auto)[name] for name in vars(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING", name)
            ]
            listed = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
            flat = [each for one in listed for each in (one if isinstance(one, tuple | list) else [one])]
            classes = list(dict.fromkeys(flat))
        targets = []
        for kind in classes:
            with torch.device("meta"), without_bars(warnings=False):
                targets.append(Target.of(kind(config), f"the {kind.__name__} of {base}"))
    except (AttributeError, OSError, TypeError, ValueError, ImportError, KeyError, RuntimeError) as error:
        what = f"{base / 'config.json'} names no network that transformers builds ({str(error).splitlines()[0]})"
        raise InputError(f"{what}; name another --base, or export with --to torch") from error
    if not targets:
        raise InputError(f"{base / 'config.json'} names no network that transformers builds; name another --base")
    return max(targets, key=lambda target: (target.fault(found) is None, len(target.shapes.keys() & found.keys())))


def timm_target(base: str, found: Mapping[str, tuple[int, ...]]) -> Target:
    """The network of a timm name, or of a folder as timm saves it; classes and channels as in the weights.

    Raises:
        InputError: timm knows no such network.
    """
    import timm

    settings: Mapping[str, Any] = {}
    if (Path(base) / "config.json").is_file():
        settings = read_json(Path(base) / "config.json")
    name = str(settings.get("architecture", base))

    def build(**more: Any) -> Any:
        with torch.device("meta"):
            return timm.create_model(name, **{**settings.get("model_args", {}), **more})

    try:
        network = build()
        more = {}
        heads, stems = (network.default_cfg.get(key) or () for key in ("classifier", "first_conv"))
        head, stem = (each if isinstance(each, str) else next(iter(each), "") for each in (heads, stems))
        if shape := found.get(f"{head}.weight"):
            more["num_classes"] = shape[0]
        if shape := found.get(f"{stem}.weight"):
            more["in_chans"] = shape[1]
        return Target.of(build(**more), f"timm's {name}")
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--base {base} is not a network that timm builds ({reason}); see timm.list_models()"
        ) from error


def peft_target(folder: Path) -> Target | None:
    """The adapter of a folder's ``adapter_config.json``; None where its base lies not on this machine."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    base = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    if not base or not (Path(base) / "config.json").is_file():
        return None
    import transformers

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.init_lora_weights = True  # others look at the base's values
        base_config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        names = getattr(base_config, "architectures", None) or ()
        with torch.device("meta"), contextlib.suppress(AttributeError):
            for kind in (getattr(transformers, name) for name in names):
                state_dict = get_peft_model_state_dict(get_peft_model(kind(base_config), config))
                shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
                return Target(f"the adapter of {folder / CONFIG_NAME} on {base}", shapes)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        what = f"{folder / CONFIG_NAME} fits no layer of {base} ({str(error).splitlines()[0]})"
        raise InputError(f"{what}; name with --base the adapter that the zoo was made from") from error
    return None


def own_target(base: str) -> Target:
    """A network of the user's: ``MODULE:FUNCTION``, or a class, that builds it. Raises InputError if it does not."""
    build = load_callable(base, "--base")
    try:
        with torch.device("meta"):
            network = build()
    except Exception as error:  # whatever the user's function does
        raise InputError(
            f"--base {base} cannot be built without arguments ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(f"--base {base} gives a {type(network).__name__}; name what builds the network")
    return Target.of(network, base)


def lightning_target(base: str) -> tuple[Target, dict[str, Any]]:
    """The network of a Lightning checkpoint or of ``MODULE:CLASS``, and what else the new checkpoint is to hold.

    Raises:
        InputError: it is neither.
    """
    if ":" in base and not Path(base).exists():
        return own_target(base), {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.0.0"}
    try:
        content = torch.load(base, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
    except Exception as error:  # foreign bytes may fail in any way
        what = f"--base {base} is not a Lightning checkpoint of plain values ({type(error).__name__})"
        raise InputError(f"{what}; name one of the originals, or MODULE:CLASS of the LightningModule") from error
    kept = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "hparams_name")
    return Target(base, shapes), {name: content[name] for name in kept if name in content}


def prefix_of(target: Target, found: Mapping[str, tuple[int, ...]]) -> str:
    """What the target's keys begin with beyond those of the weights (``model.``); empty if they are the same."""
    first = next(iter(found))
    for key in target.shapes:
        prefix = key.removesuffix(first)
        if key.endswith(f".{first}") and target.fault({prefix + name: shape for name, shape in found.items()}) is None:
            return prefix
    return ""
