"""The model card of a generator folder."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rpg.models import ModelConfig
from tokenization.layouts import Layout
from tokenization.zoo.condition import ConditionSpec


def model_card(
    model: ModelConfig,
    layout: Layout,
    condition: ConditionSpec | None,
    encoder: str | None,
    adapter: str | None,
    facts: Mapping[str, object],
) -> str:
    """The text of a generator's ``README.md``.

    Args:
        model: the section of the configuration.
        layout: how tokens become checkpoints.
        condition: what its conditions mean; None when it takes none.
        encoder: the sentence encoder of its texts, if it takes any.
        adapter: text of PEFT's ``adapter_config.json``, if it writes adapters.
        facts: how it was trained.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    asked = f"{condition.kind}, {condition.size} values" if condition else "none"
    if encoder is not None:
        asked = f"text, through the sentence encoder {encoder}"
    return f"""# Generator of neural-network weights

Writes checkpoints of {layout.num_values:,} values ({len(layout.layers)} layers, {layout.num_tokens:,} tokens of
{layout.token_size}). Condition: {asked}. Normalization: {layout.options.normalization}.
{model.description}{_adapters(adapter)}

| training | |
| --- | --- |
{rows}

```python
from rpg import Generator
networks = Generator.from_pretrained("this/folder").generate(num=4, seed=0)
```

Whether these networks are new as well as good is measured by `rpg evaluate`, not promised here.
"""


def _adapters(adapter: str | None) -> str:
    if adapter is None:
        return ""
    base = json.loads(adapter).get("base_model_name_or_path")
    return f"\nThe checkpoints are adapters of {base}, written as folders for PEFT."
