"""What sampling adds on unseen tasks, by number of steps."""

import time

from _common import Parser, run_command

from rpg.experiments.held_out_tasks import diversity, task_family
from rpg.experiments.task_methods import generate_for, networks_of
from rpg.generation.generator import Generator
from rpg.tasks.images.collection import single_threaded
from tokenization.zoo.zoo import Zoo


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("steps", type=int, nargs="+", help="numbers of sampling steps")
    arguments = parser.parse_args()
    generator = Generator.from_pretrained(arguments.run)
    task, zoo = task_family(generator.config), Zoo.open(generator.config.zoo)
    unseen, seen = networks_of(zoo, "unseen"), networks_of(zoo, "train")
    seed = generator.config.seed
    print("| steps | mean | worst | five for a task: mean | their vote | disagreement | spread | ms a network |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for steps in arguments.steps:
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
    run_command(main)
