"""Generated weights in the forms that timm, transformers, PEFT and plain torch load without any code of ours."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rpg.generation.folders import WEIGHTS_NAME, write_side_files
from rpg.generation.generator import Generator
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.checkpoint.pickles import pickled_files
from tokenization.checkpoint.safetensors import read_json, tensor_at
from tokenization.errors import InputError
from tokenization.files import atomic_file, atomic_folder, temporary_name
from tokenization.lora.adapter import CONFIG_NAME, check_adapter_tensors, is_adapter, read_adapter_config
from tokenization.zoo.locks import locked

FORMS = ("timm", "transformers", "peft", "torch")

_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""What else a transformers folder needs: generation settings, tokenizer, chat template. Code is never copied."""


def export(
    source: Path | str,
    to: str,
    output: Path | str,
    *,
    base: Path | str | None = None,
    seed: int = 0,
    condition: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write one network in the form that ``to`` names.

    ================  ==========================================================================================
    to                what is written, and who loads it
    ================  ==========================================================================================
    ``timm``          a safetensors file: ``timm.create_model(name, checkpoint_path=file)``
    ``transformers``  a folder, configuration and tokenizer as in ``base``: ``AutoModel.from_pretrained(folder)``
    ``peft``          an adapter folder, its configuration as in ``base``: ``PeftModel.from_pretrained(net, folder)``
    ``torch``         a pickle of tensors (.pth): ``network.load_state_dict(torch.load(file))``
    ================  ==========================================================================================

    Args:
        source: a checkpoint (as `rpg generate` writes it), or a run or generator folder to generate a network with.
        to: one of ``FORMS``.
        output: the file or folder to write; it must not be there yet.
        base: folder with the ``config.json`` (transformers) or ``adapter_config.json`` (PEFT; a zoo of adapters keeps
            it; not needed where ``source`` is a PEFT folder or a generator of adapters).
        seed, condition, progress: of the generation, if ``source`` is a generator.

    Returns:
        ``output``.

    Raises:
        InputError: there is no such form or source, ``output`` is in the way or being written, ``base`` is missing or
            does not fit the weights, or the disk refuses; nothing is left behind then.
    """
    output = Path(output)
    if to not in FORMS:
        raise InputError(f"--to {to!r} is no form of weights; choose one of {', '.join(FORMS)}")
    _require_free(output, to)
    with locked(output, beside=True), _checkpoint(source, output, seed, condition, progress) as checkpoint:
        if to == "timm":
            _save(checkpoint, output)
        elif to == "torch":
            _save_pickle(checkpoint, output)
        elif to == "transformers":
            files = _transformers_files(_base(base, None, "config.json"), checkpoint)
            with atomic_folder(output) as temporary:
                for file in files:
                    shutil.copyfile(file, temporary / file.name)
                _save(checkpoint, temporary / "model.safetensors")
        else:
            folder = _base(base, checkpoint.path if is_adapter(checkpoint.path) else None, CONFIG_NAME)
            _require_adapter(checkpoint, folder)
            with atomic_folder(output) as temporary:
                config = (folder / CONFIG_NAME).read_text(encoding="utf-8")
                write_side_files(temporary, config, checkpoint.metadata)
                _save(checkpoint, temporary / WEIGHTS_NAME)
    return output


@contextlib.contextmanager
def _checkpoint(
    source: Path | str,
    output: Path,
    seed: int,
    condition: Sequence[float] | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Checkpoint]:
    """The weights to export, generated now if need be."""
    path = Path(source)
    is_generator = path.is_dir() and ((path / "generator").is_dir() or (path / "layout.json").is_file())
    if path.exists() and not is_generator:
        if pickled_files(path):
            raise InputError(f"{path} is a pickle, the form that torch loads already; name a safetensors checkpoint")
        yield Checkpoint.open(path)
        return
    generator = Generator.from_pretrained(source)
    folder = temporary_name(output.with_name(f"{output.name}.generated"))
    try:
        [made] = generator.generate(1, seed=seed, condition=condition, output=folder, progress=progress)
        yield Checkpoint.open(made)  # type: ignore[arg-type]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every key of the state dict in the memory map; tied keys are one tensor."""
    stored = {name: checkpoint.flat(name).view(info.shape) for name, info in checkpoint.tensors.items()}
    return {name: stored[checkpoint.ties.get(name, name)] for name in checkpoint.order}


def _save(checkpoint: Checkpoint, path: Path) -> None:
    save_checkpoint(path, _tensors(checkpoint), checkpoint.metadata, materialize_ties=True)


def _save_pickle(checkpoint: Checkpoint, path: Path) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:  # of a name torch would make a part of it
        try:
            torch.save(checkpoint.state_dict(), file)  # copies: a view would be saved with its whole file
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(None, str(error).splitlines()[0]) from error


def _require_free(output: Path, to: str) -> None:
    suffix = {"timm": ".safetensors", "torch": ".pth"}.get(to, "")
    if suffix and output.suffix != suffix:
        raise InputError(f"--output {output} has the wrong ending; --to {to} writes a file that ends with {suffix}")
    if output.is_dir() and not suffix and not any(output.iterdir()):
        return
    if output.exists():
        raise InputError(f"--output {output} is there already; choose a new path")
    if not output.parent.is_dir():
        raise InputError(f"--output {output} lies in {output.parent}, which is no folder; make it first")
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
    """The files of ``base`` that go with the weights. Raises InputError if its own weights are of another structure."""
    read_json(base / "config.json")
    weights = [*base.glob("*.safetensors"), *base.glob("*.safetensors.index.json")]
    if weights:
        _require_alike(checkpoint, Checkpoint.open(base))
    return sorted(
        path
        for path in base.iterdir()
        if path.is_file() and path.suffix in _SIDE_SUFFIXES and not path.name.endswith(".index.json")
    )


def _require_alike(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Raise InputError for a tensor of the base that the weights lack: transformers would draw it at random."""
    names = set(checkpoint.order)
    for name in base.order:
        expected = list(base.info(name).shape)
        if name not in names:
            raise InputError(
                f"{tensor_at(checkpoint.path, name)} is missing, and {base.path} has one of shape {expected}; name the "
                "base that the zoo was made from"
            )
        found = list(checkpoint.info(name).shape)
        if found != expected:
            raise InputError(
                f"{tensor_at(checkpoint.path, name)} has shape {found}, but {expected} in {base.path}; name the base "
                "that the zoo was made from"
            )


def _require_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    shapes: Mapping[str, tuple[int, ...]] = {name: checkpoint.info(name).shape for name in checkpoint.order}
    check_adapter_tensors(shapes, read_adapter_config(folder), checkpoint.path)
