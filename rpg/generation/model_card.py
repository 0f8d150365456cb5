"""The model card of a generator folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rpg.config import Config

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
{_networks(config)}{_adapters(source)}

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


def _networks(config: Config) -> str:
    if config.generator == "pdiff":
        kind = "variational autoencoder" if config.pdiff.variational else "autoencoder and latent diffusion"
        return f"p-diff (arXiv 2402.13144): {kind}, latent of {config.pdiff.latent_size} values."
    model = config.model
    return (
        "Recurrent diffusion (arXiv 2501.11587).\n"
        f"Objective: {model.diffusion.kind}, backbone: {model.backbone.kind}, denoiser: {model.denoiser.kind}."
    )
