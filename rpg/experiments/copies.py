"""Whether generated networks are copies of originals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rpg.experiments.single import parts_of, zoo_span
from rpg.generation.generator import Generator
from tokenization.checkpoint.checkpoint import Checkpoint
from tokenization.zoo.zoo import Zoo

MOST_VALUES = 50_000_000
"""Of a zoo that is read for this."""

NEAR = 0.05
"""Of the median distance of an original to its nearest neighbour: a network so near to an original is a copy."""

_LOOKED_AT = 4


def copies_notice(generator: Generator, networks: Sequence[Path], state: str | None = None) -> str | None:
    """One line if networks are copies of originals, from their distances where the zoo is there and not too large.

    Args:
        generator: what made them.
        networks: files or folders; the first few are looked at.
        state: the permutation state asked for; the configuration's when None.

    Raises:
        InputError: a network cannot be read.
    """
    folder, stored = Path(generator.config.zoo), (state or generator.config.generate.state) == "stored"
    if not stored or generator.layout.compressed is not None or not (folder / "zoo.json").is_file():
        return None
    zoo = Zoo.open(folder)
    trained, _ = parts_of(zoo, generator.config)
    if len(trained) < 2 or len(trained) * generator.layout.num_values > MOST_VALUES:
        return None
    span = zoo_span(generator, zoo, trained)
    places = span.project(Checkpoint.open(path).state_dict() for path in networks[:_LOOKED_AT])
    near, unit = span.distances(places).min(1), span.unit()
    if not unit or not bool((near.values < NEAR * unit).any()):
        return None
    place = int(near.values.argmin())
    which, far = zoo.entries[trained[int(near.indices[place])]].file, near.values[place].item() / unit
    what = f"{networks[place]} is a copy of {which}: {far:.1g} of the distance between neighbouring originals"
    return f"{what}; --state gaussian makes new ones"
