"""Which layers of the networks generated for unseen tasks differ from task to task."""

from _common import Parser, run_command

from rpg.experiments.held_out_tasks import task_family
from rpg.experiments.task_methods import generate_for, networks_of
from rpg.generation.generator import Generator
from rpg.tasks.images.collection import single_threaded
from tokenization.zoo.zoo import Zoo


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run folder")
    generator = Generator.from_pretrained(parser.parse_args().run)
    task, originals = task_family(generator.config), networks_of(Zoo.open(generator.config.zoo), "unseen")
    with single_threaded():
        made = generate_for(generator, originals.bits, generator.config.seed)
        print("| tensor | spread over tasks, originals | generated |\n| --- | --- | --- |")
        for name, value in made.items():
            spreads = [each.std(0).square().mean().sqrt().item() for each in (originals.weights()[name], value)]
            print(f"| {name} | {spreads[0]:.4f} | {spreads[1]:.4f} |")
        base = task.network(task.num_classes).state_dict()
        head = {name for name, value in made.items() if value.shape[1:] != base[name].shape}  # the classifier
        mixed = {
            name: value if name in head else value.mean(0, keepdim=True).expand_as(value)
            for name, value in made.items()
        }
        for what, weights in (("whole networks", made), ("own classifiers, mean of the rest", mixed)):
            print(f"{what}: {task.accuracies(weights, originals.bits, 'validation').mean():.2%} on validation images")


if __name__ == "__main__":
    run_command(main)
