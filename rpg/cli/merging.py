"""The command that merges checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rpg.cli import parameters as o
from rpg.console import console, progress_bar, say
from tokenization.errors import InputError

Merged = Annotated[list[Path], o.argument("Checkpoints of one network, of any kind, or PEFT adapters.", "FILE…")]
Method = Annotated[
    str, o.option("linear, slerp, ties, dare_linear, dare_ties or model_stock.", "--method", metavar="METHOD")
]
Output = Annotated[Path, o.option("The safetensors file to write; of adapters the folder.")]
Begun = Annotated[
    str | None,
    o.option(
        "What all began with: a file, for ties, dare_linear, dare_ties and model_stock; of adapters the base's name."
    ),
]
Weights = Annotated[
    str | None, o.option("One number for each file, e.g. 0.7,0.3 (default: equal ones).", metavar="NUMBERS")
]
Normalize = Annotated[
    bool | None,
    o.option(
        "Scale the weights to add up to 1 (default: linear and ties do, dare_linear and dare_ties do not).",
        "--normalize/--no-normalize",
    ),
]
Density = Annotated[
    float | None, o.option("Share of the deviations that ties (default: 0.2) and dare (default: 0.5) keep.")
]
Place = Annotated[float | None, o.option("Of slerp: 0 is the first, 1 the second network (default: 0.5).", "--t")]


def merge(
    files: Merged,
    method: Method,
    output: Output,
    base: Begun = None,
    weights: Weights = None,
    normalize: Normalize = None,
    density: Density = None,
    t: Place = None,
    seed: o.Seed = 0,
    key: o.Key = None,
    strip: o.Strip = None,
    function: o.Function = None,
) -> dict[str, Any]:
    """Merge checkpoints of one network, one tensor at a time; adapters into one whose rank is the sum of theirs.

    Methods and options are mergekit's. The files, their digests and the settings stand in the metadata under rpg.merge.
    """
    from rpg.merging.adapters import merge_adapters
    from rpg.merging.files import merge_files
    from rpg.merging.methods import Merge
    from tokenization.checkpoint.weights import AS_FOUND, Chosen
    from tokenization.lora.adapter import is_adapter

    adapters = [is_adapter(file) for file in files]
    if any(adapters) and not all(adapters):
        one, other = files[adapters.index(True)], files[adapters.index(False)]
        raise InputError(
            f"{one} is an adapter and {other} is not; merge networks with networks, or adapters with adapters"
        )
    chosen = Chosen(key, strip or "")
    how = Merge(method, _numbers(weights), normalize, density, t, seed)
    if all(adapters):
        if chosen != AS_FOUND:
            raise InputError("--key and --strip are for networks, and these are adapters; leave them out")
        merge_adapters(files, how, output, base=base)
    else:
        with progress_bar("merging") as advance:
            begun = None if base is None else Path(base)
            merge_files(files, how, output, base=begun, chosen=chosen, progress=advance)
    say(f"{method} of {len(files)}: {output}")
    if function is None:
        return {"path": str(output), "method": method}
    from rpg.evaluation.table import print_checkpoints
    from rpg.experiments.score_files import score_checkpoints

    scores = score_checkpoints(files, function, None, "test", chosen=chosen)
    scores |= score_checkpoints([output], function, None, "test")
    print_checkpoints(scores, console)
    return {"path": str(output), "method": method, "checkpoints": scores}


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--weights {text} is not a list of numbers; write them with commas, e.g. 0.7,0.3") from error
