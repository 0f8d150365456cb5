"""Adapters that become one zoo: each is brought to what its tensors would mean under the first one's configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenization.errors import InputError
from tokenization.files import write_text
from tokenization.lora.adapter import CONFIG_NAME, check_adapter_tensors, conversion, partner_of, read_adapter_config

Shapes = Mapping[str, tuple[int, ...]]


class CollectedAdapters:
    """Compares the adapters of a zoo one after the other.

    PEFT adapters have a configuration. Files for the Stable Diffusion interfaces have none, but an ``alpha`` beside
    each pair of factors.

    Args:
        zoo: a zoo that has adapters, whose configuration is the measure; None for a new one.
        base: the base of all of them, whatever path each names.

    Raises:
        InputError: the zoo's adapters are of another base.
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

        Raises:
            InputError: it is not whole, or cannot mean the same as the others.
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
        """Say what was converted and which adapters change nothing, and give a new zoo its ``adapter_config.json``.

        Raises:
            InputError: the disk refuses.
        """
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
