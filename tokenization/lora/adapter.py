"""PEFT adapter folders: LoRA and DoRA, resolved as PEFT resolves them, checked, and brought to one configuration.

Two adapters are alike if the same tensors mean the same in both. Names and shapes say which modules they adapt and with
which rank, however the configuration spells that; a different scaling (``alpha / r``) is folded into ``lora_B``."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenization.checkpoint.safetensors import read_json, tensor_at
from tokenization.errors import InputError
from tokenization.files import write_text

CONFIG_NAME = "adapter_config.json"

_FACTOR = re.compile(r"\blora_(embedding_)?([AB])\b")

# What decides the meaning of the same tensors and cannot be converted. PEFT's versions write what is absent as null,
# false, {} or not at all. Ranks, alphas, rsLoRA, base and initialisation have rules of their own.
_FIELDS = (
    "use_dora", "fan_in_fan_out", "layer_replication", "trainable_token_indices", "use_qalora", "use_bdlora",
    "kasa_config", "arrow_config", "alora_invocation_tokens",
)  # fmt: skip

_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` under which PEFT takes the initial adapter out of the base when it loads one."""


def is_adapter(path: Path) -> bool:
    """Whether a folder is, or was meant to be, a PEFT adapter."""
    return path.is_dir() and ((path / CONFIG_NAME).exists() or any(path.glob("adapter_model.*")))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises InputError if it is missing or broken, or of another kind than LoRA (DoRA is LoRA with ``use_dora``).
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{folder} has no {CONFIG_NAME} beside the adapter's weights; save the adapter again")
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object; put the configuration of a PEFT adapter there")
    if config.get("peft_type") != "LORA":
        what = f"{path}: peft_type is {config.get('peft_type')!r}"
        raise InputError(f"{what}, and no other adapters than 'LORA' are supported (DoRA is LORA); give such ones")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise InputError(f"{path}: {field} is {config[field]!r}; write numbers by names of modules")
    numbers = {field: config[field] for field in ("r", "lora_alpha") if field in config}
    numbers |= {f"rank_pattern of {key}": value for key, value in (config.get("rank_pattern") or {}).items()}
    numbers |= {f"alpha_pattern of {key}": value for key, value in (config.get("alpha_pattern") or {}).items()}
    for field, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise InputError(f"{path}: {field} is {value!r}; write a number, as PEFT saved it")
    return config


def partner_of(name: str) -> tuple[str, str] | None:
    """Of a LoRA factor: ``A`` or ``B``, and the name of the other factor; None of other tensors."""
    match = _FACTOR.search(name)
    if match is None or name.endswith(".bias"):
        return None
    start, end = match.span(2)
    return match[2], name[:start] + ("B" if match[2] == "A" else "A") + name[end:]


def module_of(name: str) -> str:
    """The adapted module of a tensor, as the base calls it: of ``base_model.model.x.q.lora_A.weight`` it is ``x.q``."""
    module = re.split(r"\.(?:base_layer|lora_)", name, maxsplit=1)[0]
    return module.removeprefix("base_model.model.")


def changes_base(config: Mapping[str, Any]) -> str | None:
    """The ``init_lora_weights`` of an adapter that PEFT loads into a changed base, as PiSSA; None of others."""
    initialisation = str(config.get("init_lora_weights")).lower()
    return initialisation if initialisation.startswith(_BASE_CHANGING) else None


def rank_of(module: str, config: Mapping[str, Any]) -> int:
    """The rank PEFT gives a module of the base; of experts, which share two factors, that of one."""
    return int(_resolved("rank_pattern", module, config, config.get("r", 8)))


def scaling_of(module: str, config: Mapping[str, Any]) -> float:
    """By what PEFT multiplies ``B A``: ``alpha / r``, under rsLoRA ``alpha / √r``."""
    alpha, rank = _resolved("alpha_pattern", module, config, config.get("lora_alpha", 8)), rank_of(module, config)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def experts_of(module: str, config: Mapping[str, Any]) -> list[str]:
    """The parameters of a module that ``target_parameters`` adapts (stacked experts); none of ordinary modules."""
    names = {str(target).rpartition(".")[2]: str(target) for target in config.get("target_parameters") or ()}
    return sorted(leaf for leaf, target in names.items() if f".{module}.{leaf}".endswith(f".{target}"))


def conversion(
    config: Mapping[str, Any],
    found_in: Path,
    expected: Mapping[str, Any],
    expected_in: Path,
    names: Iterable[str],
    base: str | None = None,
) -> dict[str, float]:
    """What tensors of an adapter are multiplied by, so that they mean under another's configuration what they did.

    Scalings are folded into ``lora_B``, exactly where their ratio is a power of two. DoRA's and every other variant's
    update holds ``scaling · B A`` as a whole, so that this is right for all of them.

    Args:
        config, expected: of the adapter, and of the other; their folders are for errors.
        names: the tensors of both.
        base: the base of all of them, whatever path each names.

    Returns:
        Factor by name of the tensors that change: none where scalings agree.

    Raises InputError that names the field and both values where they cannot mean the same.
    """
    path = found_in / CONFIG_NAME

    def require(field: str, of: Callable[[Mapping[str, Any]], Any], cure: str) -> None:
        found, other = of(config), of(expected)
        if found != other:
            raise InputError(f"{path}: {field} is {found!r}, but {other!r} in {expected_in}; {cure}")

    apart = "collect adapters of one kind, each kind into a zoo of its own"
    for field in _FIELDS:
        require(field, partial(_field, field), apart)
    require("init_lora_weights", lambda each: changes_base(each) or "plain", apart)
    if base is None:
        cure = "if both are the same model, say --base NAME"
        require("base_model_name_or_path", _base, cure)
    if config.get("target_parameters"):  # which of a module's parameters a pattern means, only the base tells
        for field in ("rank_pattern", "alpha_pattern"):
            require(field, partial(_field, field), apart)
    factors = {}
    for name in names:
        match = _FACTOR.search(name)
        if match is None:
            continue
        module = module_of(name)
        require(f"target_parameters of {module!r}", partial(experts_of, module), apart)
        require(f"the rank of {module!r}", partial(rank_of, module), apart)
        found, other = (scaling_of(module, each) for each in (config, expected))
        if found == other or match[2] == "A":
            continue
        if changes_base(config) or not other:  # the base that PEFT makes may depend on the scaling
            require(f"lora_alpha / r of {module!r}", partial(scaling_of, module), apart)
        factors[name] = found / other
    return factors


def check_adapter_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], folder: Path) -> None:
    """Check that both factors of every low-rank update are there and of the configured rank.

    Shapes by name are ``…lora_A.weight`` ``[rank, in]``, ``…lora_B.weight`` ``[out, rank]``; of grouped convolutions B
    has the rank of one group, of experts both have that of all.

    Raises InputError that names the tensor which is missing, empty or of another rank.
    """
    pairs = 0
    for name, shape in shapes.items():
        match, factor = _FACTOR.search(name), partner_of(name)
        if match is None or factor is None:
            continue
        side, partner = factor
        if len(shape) < 2 or not math.prod(shape):
            what = f"{tensor_at(folder, name)} has shape {list(shape)}, no matrix: DeepSpeed's ZeRO-3 leaves this"
            raise InputError(f"{what} where weights are not gathered; rebuild it with DeepSpeed's zero_to_fp32.py")
        if partner not in shapes:
            raise InputError(f"{tensor_at(folder, partner)} is missing, which goes with {name!r}; save it again")
        module, rank = module_of(name), shape[0] if side == "A" else shape[1]
        expected = rank_of(module, config)
        several = bool(experts_of(module, config)) or (len(shape) > 2 and side == "B")
        fits = (rank % expected == 0 or expected % rank == 0) if several else rank == expected
        if not fits:
            what = f"{tensor_at(folder, name)} has rank {rank}, but {CONFIG_NAME} says {expected}"
            raise InputError(f"{what}; save the adapter again")
        stem = name[: match.start()].rstrip(".")
        if config.get("use_dora") and not match[1] and not any(n.startswith(f"{stem}.lora_magnitude") for n in shapes):
            what = f"{tensor_at(folder, f'{stem}.lora_magnitude_vector')} is missing, though use_dora is set"
            raise InputError(f"{what}; save the adapter again")
        pairs += 1
    if not pairs:
        raise InputError(f"{folder} has no lora_A or lora_B tensor; save the LoRA adapter again")


def _resolved(field: str, module: str, config: Mapping[str, Any], default: Any) -> Any:
    leaf = experts_of(module, config)[:1]
    for pattern, value in (config.get(field) or {}).items():
        with contextlib.suppress(re.error):
            if re.match(rf"(.*\.)?({pattern})$", ".".join([module, *leaf])):  # as PEFT itself matches
                return value
    return default


def _field(name: str, config: Mapping[str, Any]) -> Any:
    return config.get(name) or False


def _base(config: Mapping[str, Any]) -> str:
    """The base's name and revision: of a folder of the hub's cache the model's id; without a slash at its end."""
    name = str(config.get("base_model_name_or_path") or "").rstrip("/\\")
    if cached := re.search(r"models--([^/\\]+)[/\\]snapshots[/\\](\w+)$", name):
        return cached[1].replace("--", "/") + (f"@{config['revision']}" if config.get("revision") else "")
    revision = config.get("revision") or "main"
    return name if revision == "main" else f"{name}@{revision}"


def balanced_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced singular value decomposition of ``B A = U Σ Vᵀ``: ``(Σ^½ Vᵀ, U Σ^½)``, float64.

    Singular values descend. Each pair of vectors has the sign that makes ``Σ u |u| + Σ v |v|`` positive, a sum over all
    entries, which small changes of single ones do not turn over. Components below float64's resolution of the product,
    whose vectors are arbitrary, become 0; a product of zeros is two zero factors. Equal singular values leave a
    rotation open, which ``align_factors`` decides.

    Args:
        a: ``[r, in]``, finite, any float dtype.
        b: ``[out, r]``.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, sigma, vh = torch.linalg.svd(left.R @ right.R.T)  # the core, [min(out, r), min(in, r)]
    count = len(sigma)  # < r where the layer is smaller than the rank
    u, v = left.Q @ u[:, :count], right.Q @ vh[:count].T  # [out, count], [in, count]
    resolution = torch.finfo(torch.float64).eps * len(a) * left.R.norm() * right.R.norm()
    sign = torch.where((u * u.abs()).sum(0) + (v * v.abs()).sum(0) < 0, -1.0, 1.0)
    weight = sign * torch.where(sigma > resolution, sigma, 0).sqrt()
    new_a, new_b = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    new_a[:count], new_b[:, :count] = (v * weight).T, u * weight
    return new_a, new_b


def align_factors(a: Tensor, b: Tensor, reference_a: Tensor, reference_b: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate factors as near as they come to a reference, their product unchanged (orthogonal Procrustes).

    The ``Q`` that minimises ``|Qᵀ A - A₀|² + |B Q - B₀|²`` is ``U Vᵀ`` of ``A A₀ᵀ + Bᵀ B₀ = U S Vᵀ`` (Schönemann 1966).
    It does not depend on the rotation that the factors, balanced and float64, come in, so that signs, order and equal
    singular values no longer matter where the reference tells the components apart.
    """
    u, _, vh = torch.linalg.svd(a @ reference_a.double().T + b.T @ reference_b.double())
    rotation = u @ vh  # [r, r]
    return rotation.T @ a, b @ rotation


def product_distance(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> tuple[float, float]:
    """Frobenius norms ``(|B A - B' A'|, |B A|)`` in float64 of factors ``[r, in]`` and ``[out, r]``."""
    left = torch.cat([b.double(), other_b.double()], 1)  # [out, 2 r]
    right = torch.cat([a.double(), -other_a.double()])  # [2 r, in]
    return _product_norm(right, left), _product_norm(a.double(), b.double())


def _product_norm(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T))


Shapes = Mapping[str, tuple[int, ...]]


class CollectedAdapters:
    """Compares the adapters of a zoo, which may have some already, one after the other.

    PEFT adapters have a configuration. Files for the Stable Diffusion interfaces have none, but an ``alpha`` beside
    each pair of factors. ``base`` is the base of all of them, whatever path each names.

    Raises InputError if the zoo's adapters are of another base.
    """

    def __init__(self, zoo: Path | None, base: str | None = None) -> None:
        self.base = base
        self.config: dict[str, Any] | None = None
        self.where = Path()
        self._alphas: dict[str, float] = {}
        self._rescaled: list[Path] = []
        self._rounded = False
        self._untrained: list[Path] = []
        if zoo is not None and (zoo / CONFIG_NAME).is_file():
            self.config, self.where = read_adapter_config(zoo), zoo
            own = self.config.get("base_model_name_or_path")
            if base is not None and base != own:
                raise InputError(f"the adapters of {zoo} are of the base {own!r}; say --base {own}, or make a new zoo")

    def factors(
        self, path: Path, config: Mapping[str, Any] | None, shapes: Shapes, tensor: Callable[[str], Tensor]
    ) -> dict[str, float]:
        """Factors of the next adapter's tensors; empty if it is like the first or not an adapter.

        Raises InputError if it is not whole, or cannot mean the same as the others.
        """
        found: dict[str, float] = {}
        if config is not None:
            check_adapter_tensors(shapes, config, path)
            if self.config is None:
                self.config, self.where = dict(config), path
            found = conversion(config, path, self.config, self.where, shapes, self.base)
        for name in shapes:
            stem = name.removesuffix(".alpha")
            raised = next((up for up in (f"{stem}.lora_up.weight", f"{stem}.lora_B.weight") if up in shapes), None)
            if stem != name and raised is not None and math.prod(shapes[name]) == 1:
                alpha = float(tensor(name))
                first = self._alphas.setdefault(name, alpha)
                if alpha != first and alpha and first:
                    found |= {name: first / alpha, raised: alpha / first}
        if found:
            self._rescaled.append(path)
            self._rounded |= any(math.frexp(factor)[0] != 0.5 for factor in found.values())
        pairs = [(name, *partner) for name in shapes if (partner := partner_of(name))]
        if pairs and not any(side == "A" and _is_trained(tensor, a, b) for a, side, b in pairs):
            self._untrained.append(path)
        return found

    def finish(self, zoo: Path, say: Callable[[str], None]) -> None:
        """Report conversions and adapters that change nothing, and give a new zoo its ``adapter_config.json``."""
        if self._rescaled:
            how = "up to the rounding of their dtype" if self._rounded else "exactly"
            say(
                f"{len(self._rescaled)} adapter(s) with another scaling (alpha, rank, rsLoRA) than the first: their "
                f"factors B were multiplied, so that they compute what they did {how}; for example {self._rescaled[0]}"
            )
        if self._untrained:
            say(
                f"{len(self._untrained)} adapter(s) change nothing (every product B A is 0, as before training); "
                f"for example {self._untrained[0]}"
            )
        if self.config is None or (zoo / CONFIG_NAME).exists():
            return
        if self.base is None:
            text = (self.where / CONFIG_NAME).read_text(encoding="utf-8")
        else:
            text = json.dumps({**self.config, "base_model_name_or_path": self.base, "revision": None}, indent=2)
        write_text(zoo / CONFIG_NAME, text)


def _is_trained(tensor: Callable[[str], Tensor], a: str, b: str) -> bool:
    return bool(tensor(a).float().any()) and bool(tensor(b).float().any())
