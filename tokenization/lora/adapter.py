"""PEFT adapter folders: LoRA and DoRA, checked for being whole and for being alike."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenization.checkpoint.safetensors import read_json, tensor_at
from tokenization.errors import InputError

CONFIG_NAME = "adapter_config.json"

_FACTOR = re.compile(r"\blora_(embedding_)?([AB])\b")

# What decides the meaning of an adapter's tensors. Lists are compared as sets: PEFT writes them in any order.
_FIELDS = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "target_modules",
    "lora_alpha",
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
)


def is_adapter(path: Path) -> bool:
    """Whether a folder is, or was meant to be, a PEFT adapter."""
    return path.is_dir() and ((path / CONFIG_NAME).exists() or any(path.glob("adapter_model.*")))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        InputError: it is missing or broken, or of another kind than LoRA (DoRA is LoRA with ``use_dora``).
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{folder} has no {CONFIG_NAME} beside the adapter's weights; save the adapter again")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is no JSON object; put the configuration of a PEFT adapter there")
    if config.get("peft_type") != "LORA":
        what = f"{path}: peft_type is {config.get('peft_type')!r}"
        raise InputError(f"{what}, and no other adapters than 'LORA' are supported (DoRA is LORA); give such ones")
    return config


def require_same_config(
    found: Mapping[str, Any], found_in: Path, expected: Mapping[str, Any], expected_in: Path
) -> None:
    """Check that two adapters' tensors mean the same. Raises InputError that names the field and both values."""
    for field in _FIELDS:
        left, right = _comparable(found.get(field)), _comparable(expected.get(field))
        if left != right:
            what = f"{found_in / CONFIG_NAME}: {field} is {_shown(found.get(field))}"
            other = f"{_shown(expected.get(field))} in {expected_in}"
            raise InputError(f"{what}, but {other}; a zoo holds adapters of one kind, so leave one of them out")


def partner_of(name: str) -> tuple[str, str] | None:
    """Of a LoRA factor: ``A`` or ``B``, and the name of the other factor; None of other tensors."""
    match = _FACTOR.search(name)
    if match is None or name.endswith(".bias"):
        return None
    start, end = match.span(2)
    return match[2], name[:start] + ("B" if match[2] == "A" else "A") + name[end:]


def check_adapter_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], folder: Path) -> None:
    """Check that both factors of every low-rank update are there and of the configured rank.

    Args:
        shapes: shape by name: ``…lora_A.weight`` ``[rank, in]``, ``…lora_B.weight`` ``[out, rank]``.
        config: the adapter's configuration.
        folder: the adapter, for errors.

    Raises:
        InputError: names the tensor that is missing or of another rank.
    """
    pairs = 0
    for name, shape in shapes.items():
        match, factor = _FACTOR.search(name), partner_of(name)
        if match is None or factor is None:
            continue
        side, partner = factor
        if partner not in shapes:
            raise InputError(f"{tensor_at(folder, partner)} is missing, which goes with {name!r}; save it again")
        rank = shape[0] if side == "A" else shape[1] if len(shape) > 1 else 0
        module = name[: match.start()].rstrip(".")
        expected = _rank_of(module, config)
        if expected is not None and rank != expected:
            what = f"{tensor_at(folder, name)} has rank {rank}, but {CONFIG_NAME} says {expected}"
            raise InputError(f"{what}; save the adapter again")
        if (
            config.get("use_dora")
            and not match[1]
            and not any(n.startswith(f"{module}.lora_magnitude") for n in shapes)
        ):
            what = f"{tensor_at(folder, f'{module}.lora_magnitude_vector')} is missing, though use_dora is set"
            raise InputError(f"{what}; save the adapter again")
        pairs += 1
    if not pairs:
        raise InputError(f"{folder} has no lora_A or lora_B tensor; save the LoRA adapter again")


def _rank_of(module: str, config: Mapping[str, Any]) -> int | None:
    if config.get("target_parameters"):  # stacked experts: the rank is multiplied by their number
        return None
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        with contextlib.suppress(re.error):
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT itself matches
                return rank
    return config.get("r")


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(map(str, value))
    return value or None  # PEFT's versions write absent options as null, false or {}


def _shown(value: Any) -> str:
    return repr(sorted(map(str, value)) if isinstance(value, list) else value)
