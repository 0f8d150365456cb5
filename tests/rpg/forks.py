"""Commands that can really be killed. As a program it imports once, then forks a process for each line it is sent.

A line is a JSON object: the ``folder`` that the process works in, the command line's ``arguments``, and the ``log`` for
what it says. The answers are ``ready ID``, ``started ID`` and at its end ``ended STATUS``, as subprocess counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class ForkServer:
    """Starts commands in milliseconds, one at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "COLUMNS": "300"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=-1, stdout=-1, text=True, env=environment, cwd=Path(__file__).parents[2]
        )
        self._answer("ready")

    def _answer(self, event: str) -> int:
        assert self.server.stdout is not None
        word, number = self.server.stdout.readline().split()
        assert word == event
        return int(number)

    def start(self, folder: Path, *arguments: object, log: Path) -> int:
        """Returns the process's id."""
        assert self.server.stdin is not None
        line = {"folder": str(folder), "arguments": [*map(str, arguments)], "log": str(log)}
        self.server.stdin.write(json.dumps(line) + "\n")
        self.server.stdin.flush()
        return self._answer("started")

    def finish(self) -> int:
        """Wait for the process; returns its exit status, -9 after a SIGKILL."""
        return self._answer("ended")

    def close(self) -> None:
        """End the server."""
        self.server.communicate("")


def main() -> None:
    """Serve until standard input ends."""
    import matplotlib.backends.backend_agg  # these would be imported by every process, on use
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    from rpg import cli
    from rpg.experiments import driver, evaluating  # noqa: F401
    from rpg.generation import export  # noqa: F401
    from rpg.tasks.images import digits

    digits.load_splits()
    print("ready", os.getpid(), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            log = os.open(asked["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # collecting starts a process for each core
            os.chdir(asked["folder"])
            sys.argv = ["rpg", *asked["arguments"]]
            code: object = 1
            try:
                cli.main()
            except SystemExit as exit_:
                code = exit_.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(code) if isinstance(code, int) else 0)
        print("started", process, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
