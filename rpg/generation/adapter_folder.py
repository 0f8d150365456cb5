"""Generated adapters as folders that ``PeftModel.from_pretrained`` loads: configuration, weights, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenization.files import write_text
from tokenization.layouts import Layout
from tokenization.lora.adapter import CONFIG_NAME, check_adapter_tensors, partner_of, read_adapter_config

WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"


def adapter_config_of(folder: Path, layout: Layout) -> str | None:
    """PEFT's configuration in ``folder`` as it is written there, if ``layout`` cuts adapters; else None.

    Args:
        folder: a generator or a zoo.
        layout: names and shapes of the adapter's tensors.

    Raises:
        InputError: the configuration is broken, or of another adapter than the layout's.
    """
    if not (folder / CONFIG_NAME).is_file() or not any(partner_of(name) for name in layout.names):
        return None
    config = read_adapter_config(folder)
    check_adapter_tensors({name: layout.spec(name)[1] for name in layout.names}, config, folder)
    return (folder / CONFIG_NAME).read_text(encoding="utf-8")


def write_side_files(folder: Path, config: str, metadata: Mapping[str, str]) -> None:
    """Write what goes with the weights. Raises InputError when the disk refuses.

    Args:
        folder: the adapter.
        config: text of ``adapter_config.json``.
        metadata: of the weights' file; ``rpg.provenance`` goes into the model card.
    """
    write_text(folder / CONFIG_NAME, config)
    write_text(folder / CARD_NAME, _card(json.loads(config), json.loads(metadata.get("rpg.provenance", "{}"))))


def _card(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    modules = config.get("target_modules")
    modules = ", ".join(sorted(map(str, modules))) if isinstance(modules, list) else modules
    rows = {"base model": base, "kind": f"{kind}, rank {config.get('r')}, on {modules}", **provenance}
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    return f"""---
{f"base_model: {json.dumps(base)}" if base else "tags: []"}
library_name: peft
---
# Generated {kind} adapter

Its weights were written by a generator of weights that had learned from trained adapters; they were not fine-tuned.

| | |
| --- | --- |
{table}

```python
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "this/folder")
```

Nothing here says how good it is: measure it on your own task, beside adapters that were trained for it.
"""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())
