"""Commands that share: push, pull, and the pages that are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rpg
from rpg.cli import parameters as o
from rpg.console import console, say
from tokenization.errors import InputError


def push(
    folder: o.Pushed, repo: o.Repo, kind: o.HubKind = None, private: o.Private = False, branch: o.Branch = None,
    message: o.Message = None,
) -> dict[str, Any]:  # fmt: skip
    """Publish a generator or a zoo on the Hugging Face hub in one commit; log in first with hf auth login."""
    is_zoo = (folder / "zoo.json").is_file()
    if kind is not None and (kind == "dataset") != is_zoo and folder.is_dir():
        other = f"{folder} is {'a' if is_zoo else 'not a'} zoo"
        raise InputError(f"{other}; leave out --type {kind}, or name another folder")
    how = {"private": private or None, "branch": branch, "message": message}
    if is_zoo:
        from tokenization.zoo.zoo import Zoo

        address = Zoo.open(folder).push_to_hub(repo, **how)
    elif folder.is_dir():
        from rpg.generation.generator import Generator

        address = Generator.from_pretrained(folder).push_to_hub(repo, **how)
    else:
        raise InputError(f"there is no folder {folder}; name a run, a generator folder or a zoo")
    say(address)
    return {"address": address}


def pull(repo: o.Repo, folder: o.Pulled, kind: o.PulledKind = "model", revision: o.Revision = None) -> dict[str, Any]:
    """Download a generator or a zoo from the Hugging Face hub into a folder (rpg generate also takes ids)."""
    if folder.exists():
        raise InputError(f"{folder} already exists; name a new folder")
    if kind == "dataset":
        from tokenization.zoo.zoo import Zoo

        Zoo.from_hub(repo, folder, revision=revision)
    else:
        from rpg.generation.folders import copy_folder

        copy_folder(repo, folder, revision=revision)
    console.print(f"{repo} in {folder}")
    return {"folder": str(folder)}


def doctor() -> dict[str, Any]:
    """Show versions, devices, optional packages, memory, disks and access to the hub."""
    from rpg.packages import unmet, versions

    found: dict[str, Any] = {"versions": {"rpg": rpg.__version__, **versions()}, "unmet": unmet()}
    numbers = found["versions"].items()
    say(", ".join(f"{name} {number}" for name, number in numbers if number))  # before what takes seconds to load
    say("not installed: " + (", ".join(name for name, number in numbers if not number) or "nothing"))
    say(*found["unmet"])

    from rpg.planning.machine import devices, features, hub, room

    found |= {"devices": devices(), "features": features(), **room(), "hub": hub()}
    for each in found["devices"]:
        more = f", {_gib(each['free'])} of {_gib(each['total'])} free" if "total" in each else ""
        say(f"device {each['name']}: {each['what']}{more}")
    say(*(f"{'✓' if each['found'] else '–'} {each['name']}: {each['note']}" for each in found["features"]))
    memory = found["memory"]
    say(f"memory: {_gib(memory['free'])} of {_gib(memory['total'])} free")
    say(*(f"disk, {name}: {_gib(each['free'])} free in {each['path']}" for name, each in found["disks"].items()))
    say(f"hub: {found['hub']['note']}")
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


SHIPPED = Path("sensors")
"""The generator that comes with rpg."""


def app(
    run: o.AppFolder = SHIPPED, host: o.Host = "127.0.0.1", port: o.Port = 7860, prompt_model: o.PromptModel = None,
    device: o.Device = "auto", ignore_memory: o.IgnoreMemory = False,
) -> None:  # fmt: skip
    """Try a generator in the browser: choose a condition, generate, compare, download."""
    from rpg.devices import use_device
    from rpg.generation.folders import which_generator
    from rpg.planning.plan import generation_need, guard

    try:
        from rpg.app.loaded import LoadedRun
        from rpg.app.serve import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        from rpg.packages import install_command

        cure = f"run {install_command('gradio')}"
        raise InputError(f"the page needs Gradio, which is not installed; {cure}") from None
    place = use_device(device)
    guard(lambda: generation_need(run), ignore_memory)
    say(which_generator(run) or f"reading {run}")
    serve(LoadedRun(run, place, prompt_model), host, port, lambda line: console.print(line, highlight=False))
