"""How much memory is free to this process."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, within the limits of its control groups."""
    return max(0, min([psutil.virtual_memory().available, *_cgroup_room()]))


def _cgroup_room() -> list[int]:
    """Bytes left under each limit of this process's control groups, page cache that may be dropped not counted."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / place.strip("/")
        for folder in [own, *own.parents]:  # a limit of any group above holds, too
            if folder == root or root in folder.parents:
                found += _room_of(folder, *names)
    return found


def _room_of(folder: Path, limit: str, usage: str, droppable: str) -> list[int]:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if not most.isdigit() or int(most) >= 1 << 60:  # "max", or version 1's way of saying so
        return []
    return [int(most) - used + int(statistics.get(droppable, "0"))]
