"""Generated weights in the forms that timm, transformers, PEFT and plain torch load without any code of ours."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.generation.folders import WEIGHTS_NAME, write_side_files
from rpg.generation.generator import Generator
from rpg.generation.targets import (
    Target,
    lightning_target,
    own_target,
    peft_target,
    prefix_of,
    shapes_of,
    timm_target,
    transformers_target,
)
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.checkpoint.pickles import pickled_files
from tokenization.errors import InputError
from tokenization.files import atomic_file, atomic_folder, temporary_name
from tokenization.lora.adapter import CONFIG_NAME, check_adapter_tensors, is_adapter, read_adapter_config
from tokenization.zoo.locks import locked

FORMS = ("timm", "transformers", "peft", "lightning", "torch")
SUFFIXES = {"timm": ".safetensors", "torch": ".pth", "lightning": ".ckpt"}
"""What the forms that are files end with; the others are folders."""

_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""What else a transformers folder needs: generation settings, tokenizer, chat template. Code is never copied."""


def export(
    source: Path | str,
    to: str,
    output: Path | str | None = None,
    *,
    base: Path | str | None = None,
    seed: int = 0,
    condition: Any = None,
    initial: Path | str | None = None,
    progress: Callable[[float, float], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write one network in the form that ``to`` names, its keys and shapes compared with the network it is meant for.

    ================  ==========================================================================================
    to                what is written, and who loads it
    ================  ==========================================================================================
    ``timm``          a safetensors file: ``timm.create_model(name, checkpoint_path=file)``
    ``transformers``  a folder, configuration and tokenizer as in ``base``: ``AutoModel.from_pretrained(folder)``
    ``peft``          an adapter folder, its configuration as in ``base``: ``PeftModel.from_pretrained(net, folder)``
    ``lightning``     a checkpoint, its settings as in ``base``: ``LitNetwork.load_from_checkpoint(file)``
    ``torch``         a pickle of tensors (.pth): ``network.load_state_dict(torch.load(file))``
    ================  ==========================================================================================

    Args:
        source: a checkpoint (as `rpg generate` writes it), or a run or generator folder to generate a network with.
        to: one of ``FORMS``.
        output: the file or folder to write; it must not be there yet. Beside ``source`` if left out.
        base: the network that the weights are for: a folder with its ``config.json`` (transformers) or
            ``adapter_config.json`` (PEFT; not needed where ``source`` is a PEFT folder or a generator of adapters),
            timm's name of it or a folder as timm saves it, an original Lightning checkpoint, or ``MODULE:FUNCTION``
            that builds it (timm, Lightning, torch).
        seed, condition, initial, progress: of the generation, if ``source`` is a generator; the condition in any form
            that it takes, or a function that makes one for it.
        say: receives a line where there was no network to compare with.

    Raises:
        InputError: there is no such form or source, ``output`` is in the way or being written, ``base`` is missing or
            does not fit the weights, or the disk refuses; nothing is left behind then.
    """
    if to not in FORMS:
        raise InputError(f"--to {to!r} is not a format of weights; choose one of {', '.join(FORMS)}")
    output = _beside(Path(source), to) if output is None else Path(output)
    _require_free(output, to)
    asked = {"seed": seed, "condition": condition, "initial": initial, "progress": progress}
    with locked(output, beside=True), _checkpoint(source, output, asked) as checkpoint:
        if to in SUFFIXES:
            _write_file(to, checkpoint, output, None if base is None else str(base), say)
        else:
            _write_folder(to, checkpoint, output, base, say)
    return output


def _write_folder(
    to: str, checkpoint: Checkpoint, output: Path, base: Path | str | None, say: Callable[[str], None]
) -> None:
    """The forms that are a folder."""
    if to == "transformers":
        files = _transformers_files(_base(base, None, "config.json"), checkpoint)
        with atomic_folder(output) as temporary:
            for file in files:
                shutil.copyfile(file, temporary / file.name)
            _save(checkpoint, temporary / "model.safetensors")
        return
    folder = _base(base, checkpoint.path if is_adapter(checkpoint.path) else None, CONFIG_NAME)
    check_adapter_tensors(shapes_of(checkpoint), read_adapter_config(folder), checkpoint.path)
    _compare(peft_target(folder), checkpoint, "the base model is not on this machine", say)
    with atomic_folder(output) as temporary:
        config = (folder / CONFIG_NAME).read_text(encoding="utf-8")
        write_side_files(temporary, config, checkpoint.metadata)
        _save(checkpoint, temporary / WEIGHTS_NAME)


def _write_file(to: str, checkpoint: Checkpoint, output: Path, base: str | None, say: Callable[[str], None]) -> None:
    """The forms that are one file."""
    found = shapes_of(checkpoint)
    if to == "lightning":
        if base is None:
            raise InputError("--base is missing; name an original checkpoint of Lightning, or MODULE:CLASS")
        target, more = lightning_target(base)
        prefix = prefix_of(target, found)
        target.require({prefix + name: shape for name, shape in found.items()}, checkpoint.path)
        _save_pickle(checkpoint, output, prefix, more)
        return
    own = to == "torch" or (base is not None and ":" in base)
    network = None if base is None else own_target(base) if own else timm_target(base, found)
    hint = "name one with --base " + ("MODULE:FUNCTION" if to == "torch" else "and timm's name of it")
    _compare(network, checkpoint, hint, say)
    (_save if to == "timm" else _save_pickle)(checkpoint, output)


def _compare(target: Target | None, checkpoint: Checkpoint, why: str, say: Callable[[str], None]) -> None:
    """Raise InputError if a network's keys or shapes are others; where there is none, say ``why`` not compared."""
    if target is None:
        say(f"names and shapes were compared with no network: {why}")
    else:
        target.require(shapes_of(checkpoint), checkpoint.path)


def _beside(source: Path, to: str) -> Path:
    """Where weights are written unless it is said: beside a checkpoint, in a run or generator folder."""
    if _is_generator(source):
        return source / f"exported-{to}{SUFFIXES.get(to, '')}"
    if not source.exists():
        raise InputError(f"{source} is not a file or folder of this machine; say with --output where to write")
    return source.with_name(f"{source.name.removesuffix('.safetensors')}-{to}{SUFFIXES.get(to, '')}")


def _is_generator(path: Path) -> bool:
    return path.is_dir() and ((path / "generator").is_dir() or (path / "layout.json").is_file())


@contextlib.contextmanager
def _checkpoint(source: Path | str, output: Path, asked: dict[str, Any]) -> Iterator[Checkpoint]:
    """The weights to export, generated now if need be, as is ``asked``."""
    path, condition = Path(source), asked["condition"]
    if path.exists() and not _is_generator(path):
        if asked["initial"] is not None or (condition is not None and not callable(condition)):
            raise InputError(f"{path} is a checkpoint, which takes no condition and no initial weights; leave them out")
        if pickled_files(path):
            raise InputError(f"{path} is a pickle, the form that torch loads already; name a safetensors checkpoint")
        yield Checkpoint.open(path)
        return
    generator = Generator.from_pretrained(source)
    folder = temporary_name(output.with_name(f"{output.name}.generated"))
    try:
        asked["condition"] = condition(generator) if callable(condition) else condition
        [made] = generator.generate(1, output=folder, **asked)
        yield Checkpoint.open(made)  # type: ignore[arg-type]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every key of the state dict in the memory map; tied keys are one tensor."""
    stored = {name: checkpoint.flat(name).view(info.shape) for name, info in checkpoint.tensors.items()}
    return {name: stored[checkpoint.ties.get(name, name)] for name in checkpoint.order}


def _save(checkpoint: Checkpoint, path: Path) -> None:
    save_checkpoint(path, _tensors(checkpoint), checkpoint.metadata, materialize_ties=True)


def _save_pickle(checkpoint: Checkpoint, path: Path, prefix: str = "", more: Mapping[str, Any] | None = None) -> None:
    """A state dict as a pickle; with ``more``, beside that and under names that begin with ``prefix``."""
    state_dict = checkpoint.state_dict()  # copies: a view would be saved with its whole file
    named = {prefix + name: tensor for name, tensor in state_dict.items()}
    content = named if more is None else {**more, "state_dict": named}
    with atomic_file(path) as temporary, temporary.open("wb") as file:  # of a name torch would make a part of it
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(None, str(error).splitlines()[0]) from error


def _require_free(output: Path, to: str) -> None:
    suffix = SUFFIXES.get(to, "")
    if suffix and output.suffix != suffix:
        raise InputError(f"--output {output} has the wrong suffix; --to {to} writes a file that ends with {suffix}")
    if output.is_dir() and not suffix and not any(output.iterdir()):
        return
    if output.exists():
        raise InputError(f"--output {output} already exists; choose a new path")
    if not output.parent.is_dir():
        raise InputError(f"--output {output} lies in {output.parent}, which is not a folder; create it first")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"--output {output} lies in a folder that may not be written; choose another")


def _base(base: Path | str | None, default: Path | None, config: str) -> Path:
    folder = Path(base) if base is not None else default
    if folder is None:
        raise InputError(f"--base is missing; name the folder that holds {config}")
    if not (folder / config).is_file():
        raise InputError(f"--base {folder} has no {config}; name the folder that holds it")
    return folder


def _transformers_files(base: Path, checkpoint: Checkpoint) -> list[Path]:
    """The files of ``base`` that go with the weights. Raises InputError if they are not those of its network."""
    found = shapes_of(checkpoint)
    weights = [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]
    if not weights or Target(str(base), shapes_of(Checkpoint.open(base))).fault(found) is not None:
        transformers_target(base, found).require(found, checkpoint.path)
    return sorted(
        path
        for path in base.iterdir()
        if path.is_file() and path.suffix in _SIDE_SUFFIXES and not path.name.endswith(".index.json")
    )
