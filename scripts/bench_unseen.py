"""Time 1,000 conditioned networks from one generator."""

import resource
import tempfile
import time

import torch
from _common import Parser, run_command

from rpg.generation.generator import Generator
from rpg.tasks.class_splits import all_tasks

NUM = 1000


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("steps", type=int, nargs="?", help="sampling steps (default: the configuration's)")
    arguments = parser.parse_args()
    generator = Generator.from_pretrained(arguments.run)
    steps = arguments.steps or generator.config.generate.steps
    bits = all_tasks(10)[:NUM].float()
    generator.generate(32, condition=bits[:32], steps=steps)  # warm-up
    with tempfile.TemporaryDirectory() as folder:
        for where, output in (("in memory", None), ("on disk", folder)):
            started = time.perf_counter()
            generator.generate(NUM, condition=bits, seed=1, steps=steps, output=output)
            seconds = time.perf_counter() - started
            print(f"{where}: {steps} step(s), {1000 * seconds / NUM:.2f} ms a network, {NUM / seconds:.0f} networks/s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{torch.get_num_threads()} thread(s), peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    run_command(main)
