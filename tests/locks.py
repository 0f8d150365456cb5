"""Folders that another process writes."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil

from tokenization.zoo.locks import Holder

CODE = """
import sys, filelock
held = [filelock.FileLock(name) for name in sys.argv[1:]]
for each in held:
    each.acquire()
print(flush=True)
input()
"""


@contextlib.contextmanager
def written_elsewhere(*files: Path) -> Iterator[Holder]:
    """Have a process hold lock files until the block ends; nobody else may have touched them."""
    for file in files:
        file.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", CODE, *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        holder = Holder(platform.node(), process.pid, psutil.Process(process.pid).create_time(), "rpg other")
        for file in files:
            file.write_text(json.dumps(asdict(holder)))
        yield holder
        assert all(Holder.read(file) == holder for file in files)
        process.communicate("\n")
