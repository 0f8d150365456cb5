"""Imports once, then forks a training process for each line of standard input: it starts in milliseconds, not seconds.

It says ``ready ID``. A line is the path of a configuration, whose run goes on if there is one; the answers are
``started ID`` and at its end ``ended STATUS``, as subprocess counts. What the process says goes to ``<run>.log``.
"""

import os
import sys
from pathlib import Path

import torch._dynamo  # this and the next would be imported by every process, on use
import torch.utils.tensorboard  # noqa: F401

from rpg.config import Config
from rpg.training.loop import train


def main() -> None:
    print("ready", os.getpid(), flush=True)
    for line in sys.stdin:
        config = Config.load(line.strip())
        process = os.fork()
        if process == 0:
            log = os.open(f"{config.run}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            resume = (Path(config.run) / "config.yaml").exists()
            train(config, resume=resume, say=lambda text: print(text, flush=True))
            os._exit(0)
        print("started", process, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
