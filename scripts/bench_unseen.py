"""Time 1,000 conditioned networks from one generator: bench_unseen.py RUN [STEPS]."""

import resource
import sys
import tempfile
import time

import torch

from rpg.generation.generator import Generator
from rpg.tasks.class_splits import all_tasks
from tokenization.errors import InputError

NUM = 1000


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise InputError("bench_unseen", f"{len(sys.argv) - 1} arguments", "RUN [STEPS]")
    generator = Generator.from_pretrained(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) == 3 else generator.config.generate.steps
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
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
