"""Put a trained generator into the package: rpg run configs/sensors.yaml && python scripts/ship.py runs/sensors"""

from __future__ import annotations

import argparse
from pathlib import Path

from rpg.generation.folders import SHIPPED, SHIPPED_FOLDER
from rpg.generation.generator import Generator
from rpg.generation.model_card import without_places
from rpg.training.data import TrainingSet
from rpg.training.trainer import measure_known_range
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo

MOST_BYTES = 2_000_000


def ship(run: str, name: str, into: Path = SHIPPED_FOLDER) -> Path:
    """Write the generator of a run as the package's own; errors by distance are measured if the run has none."""
    generator = Generator.from_pretrained(run)
    generator.known = generator.known or measure_known_range(
        generator, TrainingSet(Zoo.open(generator.config.zoo), generator.config)
    )
    shipped = without_places(generator)
    shipped.facts = {name: fact for name, fact in shipped.facts.items() if "seconds" not in name}  # of that machine
    folder = shipped.save_pretrained(into / name)
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > MOST_BYTES:
        raise InputError(f"{folder} has {size:,} bytes; train a smaller generator, the package takes {MOST_BYTES:,}")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--name", default=SHIPPED[0], choices=SHIPPED)
    arguments = parser.parse_args()
    print(ship(arguments.run, arguments.name))


if __name__ == "__main__":
    main()
