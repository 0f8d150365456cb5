"""Processes that work together as launched ones do, forked from the test: nothing is imported anew."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def in_two_processes(work: Callable[[], object]) -> None:
    """Call ``work`` in two processes as ``torchrun --nproc_per_node 2`` would; it must have no thread but its own.

    It must not train: after a fork autograd refuses a backward pass if an earlier test gave it threads.
    """
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [os.fork() or _child(work, {**place, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def _child(work: Callable[[], object], place: dict[str, str]) -> int:
    from accelerate.state import PartialState

    code = 1
    try:
        os.environ.update({**place, "CUDA_VISIBLE_DEVICES": ""})
        PartialState._reset_state()  # the test may have been a single process already
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
