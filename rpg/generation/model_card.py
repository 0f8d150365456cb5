"""The model card of a generator folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rpg.generation.generator import Generator


def model_card(source: Generator) -> str:
    """The text of ``README.md``."""
    layout, config = source.layout, source.config
    facts = "\n".join(f"| {name} | {value} |" for name, value in source.facts.items())
    condition = f"{source.condition.kind}, {source.condition.size} values" if source.condition else "none"
    if source.texts is not None:
        condition = f"text, through the sentence encoder {source.texts.encoder}"
    return f"""# Generator of neural-network weights

Writes checkpoints of {layout.num_values:,} values ({len(layout.layers)} layers, {layout.num_tokens:,} tokens of
{layout.token_size}). Condition: {condition}. Normalization: {config.tokens.normalization}.
{config.model.description}{_adapters(source)}

| training | |
| --- | --- |
{facts}

```python
from rpg import Generator
networks = Generator.from_pretrained("this/folder").generate(num=4, seed=0)
```

Whether these networks are new as well as good is measured by `rpg evaluate`, not promised here.
"""


def _adapters(source: Generator) -> str:
    if source.adapter is None:
        return ""
    base = json.loads(source.adapter).get("base_model_name_or_path")
    return f"\nThe checkpoints are adapters of {base}, written as folders for PEFT."
