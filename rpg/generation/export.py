"""Generated weights in the forms that timm, transformers, PEFT and plain torch load without any code of ours.

The networks that they are for are built without values, to compare keys and shapes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpg.generation.folders import WEIGHTS_NAME, write_side_files
from rpg.generation.generator import Generator
from rpg.packages import without_bars
from rpg.tasks import load_callable
from tokenization.checkpoint.checkpoint import Checkpoint, save_checkpoint
from tokenization.checkpoint.pickles import pickled_files
from tokenization.checkpoint.safetensors import read_json, tensor_at
from tokenization.checkpoint.tensor_file import find_ties
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


def _save(checkpoint: Checkpoint, path: Path) -> None:
    """Every key of the state dict, straight from the memory map; tied keys are one tensor."""
    stored = {name: checkpoint.flat(name).view(info.shape) for name, info in checkpoint.tensors.items()}
    tensors = {name: stored[checkpoint.ties.get(name, name)] for name in checkpoint.order}
    save_checkpoint(path, tensors, checkpoint.metadata, materialize_ties=True)


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
    files = (path for path in base.iterdir() if path.is_file() and path.suffix in _SIDE_SUFFIXES)
    return sorted(path for path in files if not path.name.endswith(".index.json"))


@dataclass(frozen=True)
class Target:
    """What a network's loader expects.

    Attributes:
        shapes: shape by key of the state dict.
        ties: ``{alias: key}`` of keys that are one tensor; one of them is enough.
        ignored: regular expressions of keys that the loader passes over.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, network: nn.Module, name: str) -> Target:
        """That of a network, which may be on the meta device."""
        state_dict = network.state_dict()
        ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
        return cls(name, _shapes(state_dict), find_ties(state_dict), tuple(ignored))

    def fault(self, found: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
        """The first key of some shapes that does not fit, and why not."""
        held = {self.ties.get(key, key) for key in found}
        for key, shape in self.shapes.items():
            if key not in found:
                if self.ties.get(key, key) not in held:
                    return key, f"is missing, and {self.name} has one of shape {list(shape)}"
            elif found[key] != shape:
                return key, f"has shape {list(found[key])}, but {list(shape)} in {self.name}"
        for key in found:
            if key not in self.shapes and not any(re.search(pattern, key) for pattern in self.ignored):
                return key, f"is not in {self.name}"
        return None

    def require(self, found: Mapping[str, tuple[int, ...]], path: Path | str) -> None:
        """Raise InputError for the first tensor that is missing, unexpected or of another shape."""
        if fault := self.fault(found):
            what = f"{tensor_at(path, fault[0])} {fault[1]}"
            raise InputError(f"{what}; name with --base the network that the zoo was made from")


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape by key, aliases included."""
    return {name: checkpoint.info(name).shape for name in checkpoint.order}


def transformers_target(base: Path, found: Mapping[str, tuple[int, ...]]) -> Target:
    """The network of a folder's ``config.json``: the class that it names, else the one of its kind that fits best.

    Raises:
        InputError: transformers knows no such network.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    read_json(base / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        classes = [getattr(transformers, name) for name in getattr(config, "architectures", None) or ()]
        if not classes:
            mappings = [each for name, each in vars(modeling_auto).items() if re.fullmatch(r"MODEL_.*MAPPING", name)]
            listed = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
            flat = [each for one in listed for each in (one if isinstance(one, tuple | list) else [one])]
            classes = list(dict.fromkeys(flat))
        with torch.device("meta"), without_bars(warnings=False):
            targets = [Target.of(kind(config), f"the {kind.__name__} of {base}") for kind in classes]
    except (AttributeError, OSError, TypeError, ValueError, ImportError, KeyError, RuntimeError) as error:
        what = f"{base / 'config.json'} names no network that transformers builds ({str(error).splitlines()[0]})"
        raise InputError(f"{what}; name another --base, or export with --to torch") from error
    if not targets:
        raise InputError(f"{base / 'config.json'} names no network that transformers builds; name another --base")
    return max(targets, key=lambda target: (target.fault(found) is None, len(target.shapes.keys() & found.keys())))


def timm_target(base: str, found: Mapping[str, tuple[int, ...]]) -> Target:
    """The network of a timm name, or of a folder as timm saves it; classes and channels as in the weights.

    Raises:
        InputError: timm knows no such network.
    """
    import timm

    settings: Mapping[str, Any] = {}
    if (Path(base) / "config.json").is_file():
        settings = read_json(Path(base) / "config.json")
    name = str(settings.get("architecture", base))

    def build(**more: Any) -> Any:
        with torch.device("meta"):
            return timm.create_model(name, **{**settings.get("model_args", {}), **more})

    try:
        network = build()
        more = {}
        heads, stems = (network.default_cfg.get(key) or () for key in ("classifier", "first_conv"))
        head, stem = (each if isinstance(each, str) else next(iter(each), "") for each in (heads, stems))
        if shape := found.get(f"{head}.weight"):
            more["num_classes"] = shape[0]
        if shape := found.get(f"{stem}.weight"):
            more["in_chans"] = shape[1]
        return Target.of(build(**more), f"timm's {name}")
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        what = f"--base {base} is not a network that timm builds ({str(error).splitlines()[0]})"
        raise InputError(f"{what}; see timm.list_models()") from error


def peft_target(folder: Path) -> Target | None:
    """The adapter of a folder's ``adapter_config.json``; None where its base lies not on this machine."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    base = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    if not base or not (Path(base) / "config.json").is_file():
        return None
    import transformers

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.init_lora_weights = True  # others look at the base's values
        base_config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"), contextlib.suppress(AttributeError):
            for kind in (getattr(transformers, name) for name in getattr(base_config, "architectures", None) or ()):
                shapes = _shapes(get_peft_model_state_dict(get_peft_model(kind(base_config), config)))
                return Target(f"the adapter of {folder / CONFIG_NAME} on {base}", shapes)
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        what = f"{folder / CONFIG_NAME} fits no layer of {base} ({str(error).splitlines()[0]})"
        raise InputError(f"{what}; name with --base the adapter that the zoo was made from") from error
    return None


def own_target(base: str) -> Target:
    """A network of the user's: ``MODULE:FUNCTION``, or a class, that builds it. Raises InputError if it does not."""
    build = load_callable(base, "--base")
    try:
        with torch.device("meta"):
            network = build()
    except Exception as error:  # whatever the user's function does
        what = f"cannot be built without arguments ({type(error).__name__}: {error})"
        raise InputError(f"--base {base} {what}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"--base {base} gives a {type(network).__name__}; name what builds the network")
    return Target.of(network, base)


def lightning_target(base: str) -> tuple[Target, dict[str, Any]]:
    """The network of a Lightning checkpoint or of ``MODULE:CLASS``, and what else the new checkpoint is to hold.

    Raises:
        InputError: it is neither.
    """
    if ":" in base and not Path(base).exists():
        return own_target(base), {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.0.0"}
    try:
        content = torch.load(base, map_location="cpu", weights_only=True)
        shapes = _shapes(content["state_dict"])
    except Exception as error:  # foreign bytes may fail in any way
        what = f"--base {base} is not a Lightning checkpoint of plain values ({type(error).__name__})"
        raise InputError(f"{what}; name one of the originals, or MODULE:CLASS of the LightningModule") from error
    kept = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "hparams_name")
    return Target(base, shapes), {name: content[name] for name in kept if name in content}


def prefix_of(target: Target, found: Mapping[str, tuple[int, ...]]) -> str:
    """What the target's keys begin with beyond those of the weights (``model.``); empty if they are the same."""
    first = next(iter(found))
    for key in target.shapes:
        prefix = key.removesuffix(first)
        if key.endswith(f".{first}") and target.fault({prefix + name: shape for name, shape in found.items()}) is None:
            return prefix
    return ""
