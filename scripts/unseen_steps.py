"""What sampling adds on unseen tasks, by number of steps: unseen_steps.py RUN STEPS [STEPS …]."""

import sys
import time
from pathlib import Path

from rpg.experiments.held_out_tasks import diversity, generate_for, networks_of, subset_task
from rpg.generation.generator import Generator
from rpg.tasks.images.collection import single_threaded
from tokenization.errors import InputError
from tokenization.zoo.zoo import Zoo


def main() -> None:
    if len(sys.argv) < 3 or not all(each.isdigit() for each in sys.argv[2:]):
        raise InputError("unseen_steps", " ".join(sys.argv[1:]) or "nothing", "RUN STEPS [STEPS …]")
    generator = Generator.from_pretrained(Path(sys.argv[1]))
    task, zoo = subset_task(generator.config), Zoo.open(generator.config.zoo)
    unseen, seen = networks_of(zoo, "unseen"), networks_of(zoo, "train")
    seed = generator.config.seed
    print("| steps | mean | worst | five for a task: mean | their vote | disagreement | spread | ms a network |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for steps in map(int, sys.argv[2:]):
        with single_threaded():
            started = time.perf_counter()
            networks = generate_for(generator, unseen.bits, seed, steps=steps)
            seconds = time.perf_counter() - started
            accuracies = task.accuracies(networks, unseen.bits, "test")
            spread = diversity(generator, task, unseen.bits, seen, seed, steps=steps)
        print(
            f"| {steps} | {accuracies.mean():.2%} | {accuracies.min():.1%} | {spread.mean_accuracy:.2%} "
            f"| {spread.ensemble_accuracy:.2%} | {spread.disagreement:.2%} | {spread.weight_spread:.2f} "
            f"| {1000 * seconds / len(unseen.bits):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
