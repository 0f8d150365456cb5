"""Files told by their content, not their suffix, and pickles, read without running what they hold.

The unpickler is Python's own with a closed list of what it may find: functions of torch that put tensors together,
and containers. Every other name, be it a class or a function, becomes an `Inert` that takes everything and does
nothing; names that only serve to run programs are refused."""

from __future__ import annotations

import collections
import io
import pickle
import re
import shlex
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tokenization.checkpoint.safetensors import read_json, shards_of
from tokenization.errors import InputError

Kind = Literal["safetensors", "index", "torch", "pickle", "unknown"]
"""``torch``: written by torch.save, of any age; ``pickle``: any other pickle; ``index``: JSON that names shards."""

SUFFIXES = (
    ".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".pyth", ".pkl", ".pickle", ".model", ".weights", ".pdparams",
)  # fmt: skip
"""Endings that pickles of weights commonly have."""

INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")

LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"
"""What torch.save before 1.6 begins with, after the opcodes of the pickle's protocol."""

_SAVE = "then collect that"
_BY_NAME = f"read it with its own library and save the tensors by name with safetensors.torch.save_file, {_SAVE}"
_GGUF = (
    "collect the safetensors that it was made from, or let transformers (with the package gguf) read it: "
    "torch.save(AutoModelForCausalLM.from_pretrained('FOLDER', gguf_file='NAME.gguf').state_dict(), 'NEW.pth')"
)
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
    (b"GGUF", "is a GGUF file (llama.cpp)", _GGUF),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras)", _BY_NAME.replace("its own library", "h5py")),
    (b"\x93NUMPY", "is a single NumPy array (npy)", f"save the network's tensors by name with torch.save, {_SAVE}"),
    (b"\x1f\x8b", "is compressed by gzip", "unpack it with gunzip --keep"),
    (b"BZh", "is compressed by bzip2", "unpack it with bunzip2 --keep"),
    (b"\xfd7zXZ\x00", "is compressed by xz", "unpack it with unxz --keep"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it with 7z x"),
    (b"Rar!", "is a RAR archive", "unpack it with unrar x"),
)  # fmt: skip
"""First bytes, what they tell, and what to do about it."""

_TF = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_TF_INDEX_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def kind_of(path: Path) -> Kind:
    """What a file is; ``unknown`` if neither content nor suffix tell, or it cannot be opened.

    Raises InputError, with a cure, if it is of a format that is not read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(max(0, size - 8))
            end = file.read()
    except OSError:
        return "safetensors" if path.suffix == ".safetensors" else "pickle" if path.suffix in SUFFIXES else "unknown"
    if path.name.endswith(INDEX_SUFFIXES):
        return "index"
    # First, because the length of a header may be the first bytes of any other format.
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and (1 < length <= size - 8 or path.suffix == ".safetensors"):
        return "safetensors"
    if foreign := _foreign(path, head, end):
        what, cure = foreign
        raise InputError(f"{path} {what}; {cure}")
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(path)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2:
        return "torch" if LEGACY_MAGIC in head[:40] else "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"
    if path.name.endswith(".json"):
        return "index"
    return "pickle" if path.suffix in SUFFIXES else "unknown"


def _foreign(path: Path, head: bytes, end: bytes) -> tuple[str, str] | None:
    """What a file of another program is, and what to do about it; None for a file that can be read."""
    if not head:
        return "is empty", "copy or save it again"
    for magic, what, cure in _MAGIC:
        if head.startswith(magic):
            return what, cure if cure.count(" ") > 4 or "git" in cure else f"{cure} {shlex.quote(str(path))}"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, saved in the place of the file", "download the file again"
    if head[257:262] == b"ustar":
        return "is a tar archive", f"unpack it with tar -xf {shlex.quote(str(path))}"
    if head[4:8] == b"TFL3":
        return "is a TensorFlow Lite file", _BY_NAME
    if end == _TF_INDEX_END or _TF.search(path.name) or path.name == "saved_model.pb":
        cure = _BY_NAME.replace("its own library", "tf.train.load_checkpoint")
        return "is part of a TensorFlow checkpoint", cure
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and 0 < head[1] < 32 and head[2:3] in (b"\x12", b":")):
        cure = "save the state_dict() of the PyTorch network, or the graph's initializers by name, read with onnx"
        return "is an ONNX file", cure
    if path.suffix == ".msgpack" or (0x81 <= head[0] <= 0x8F and (0xA1 <= head[1] <= 0xBF or head[1] == 0xD9)):
        return "is a msgpack file (Flax)", _BY_NAME.replace("its own library", "flax.serialization.msgpack_restore")
    return None


def _kind_of_zip(path: Path) -> Kind:
    """``torch`` if the zip is one that torch.save wrote. Raises InputError that names what else it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, RecursionError):
        return "torch"  # cut off: the reader says so
    files = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in files:
        new = shlex.quote(str(path.with_suffix(".state.pt")))
        save = f"torch.save(torch.jit.load({str(path)!r}, map_location='cpu').state_dict(), {new!r})"
        raise InputError(f"{path} is a TorchScript program; save its weights alone: {save}")
    if "data.pkl" in files:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        cure = "save its arrays as tensors: safetensors.numpy.save_file(dict(numpy.load(FILE)), 'NAME.safetensors')"
        raise InputError(f"{path} is an archive of NumPy arrays (npz); {cure}")
    if "model.weights.h5" in files:
        raise InputError(f"{path} is a Keras file; {_BY_NAME.replace('its own library', 'keras and h5py')}")
    inside = [name for name in names if name.endswith((".safetensors", *SUFFIXES))]
    shown = f" with {', '.join(inside[:3])} inside" if inside else f" of {', '.join(names[:3])}"
    folder = shlex.quote(str(path.with_suffix("")) + "-files")
    cure = f"unpack it with unzip {shlex.quote(str(path))} -d {folder} and collect what it holds"
    raise InputError(f"{path} is a zip archive{shown}, no checkpoint; {cure}")


_FOLDER_FILES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


def pickled_files(path: Path) -> list[Path]:
    """The pickles that ``path``, one or a folder of them, stands for. Raises InputError for foreign formats."""
    if path.is_file():
        if path.name.endswith(".bin.index.json"):
            return shards_of(read_json(path), path)
        return [path] if kind_of(path) in ("torch", "pickle") else []
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return []
    for name in _FOLDER_FILES:
        file = path / name
        if file.is_file():
            return shards_of(read_json(file), file) if file.suffix == ".json" else [file]
    return []


class Inert(dict):  # type: ignore[type-arg]
    """Stands for an object of a class that is not loaded: holds its items, and its attributes by name."""

    origin = ""
    dump_patches = False  # torch asks classes of modules in old files for it

    def __new__(cls, *args: Any, **named: Any) -> Inert:
        """Nothing that a pickle gives is looked at here."""
        return super().__new__(cls if isinstance(cls, type) else Inert)

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()
        self.args = args

    def __call__(self, *args: Any, **named: Any) -> Inert:
        """Nothing happens."""
        return Inert()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def build(self, state: Any) -> None:
        """Take the attributes that a pickle gives the object."""
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                super().update(part)

    def append(self, *_: Any) -> None:
        """Items of lists and sets are dropped."""

    extend = add = update = append  # type: ignore[assignment]


class _NumpyDtype(Inert):
    order: Any = "="

    def build(self, state: Any) -> None:
        """Take (version, byte order, …)."""
        self.order = state[1] if isinstance(state, tuple) and state[1] in ("<", ">") else "="


class InertArray(Inert):
    """A NumPy array, of which nothing is made until it is asked for."""

    def build(self, state: Any) -> None:
        """Take (version, shape, dtype, whether Fortran's order, bytes)."""
        _, shape, dtype, fortran, data = state
        self.args = (data, dtype, shape, "F" if fortran else "C")

    def tensor(self) -> Tensor | None:
        """The array as a tensor; None where its dtype is none of torch's."""
        data, dtype, shape, order = self.args
        if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes | bytearray):
            return None
        found = np.dtype(str(dtype.args[0])).newbyteorder(dtype.order)
        if found.kind not in "fiubc":
            return None
        array = np.frombuffer(data, found).reshape(shape, order=order)
        return torch.from_numpy(np.array(array, found.newbyteorder("="), order="C"))


def load_inert(path: Path) -> Any:
    """What a pickle holds: tensors on the CPU, memory-mapped where the file allows it, containers, numbers, `Inert`.

    Raises InputError if it names functions that run programs (they are not run), is truncated or no pickle.
    """
    try:
        if zipfile.is_zipfile(path):
            _kind_of_zip(path)  # torch.load would give a TorchScript program to another reader
            if path.suffix != ".safetensors":
                return _torch_load(path, mmap=True)
            with path.open("rb") as file:  # torch.load goes by that ending
                return _torch_load(file)
        with path.open("rb") as file:
            legacy = LEGACY_MAGIC in file.read(40)
            file.seek(0)
            return _load_legacy(file) if legacy else _Unpickler(file).load()
    except InputError:
        raise
    except _CodeError as error:
        what = f"{path} is a pickle that holds code ({error})"
        raise InputError(f"{what}, which is not run; save the network's state_dict() alone") from error
    except Exception as error:  # foreign bytes may fail in any way
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0] or type(error).__name__
        raise InputError(f"{path} is unreadable as a pickle of tensors ({reason}); copy or save it again") from error


class _CodeError(Exception):
    """A pickle names something that only serves to run programs."""


class _Unpickler(pickle._Unpickler):
    """Python's own in Python: the one in C gives a memo of any length that broken bytes ask for."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for; nothing is imported."""
        known = _known(module, name)
        if known is not None:
            return known
        if module.partition(".")[0] in _RUNS or (module in ("builtins", "__builtin__") and name in _RUNS_BUILTINS):
            raise _CodeError(f"{module}.{name}")
        if module in ("torch._utils", "torch._tensor", "torch.storage"):
            raise ValueError(f"tensors made by {module}.{name} are not read")
        return type(name, (Inert,), {"origin": f"{module}.{name}"})

    def load_build(self) -> None:
        """Give an object its attributes; what torch and Python made of the pickle has all that it needs."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        if isinstance(self.stack[-1], Inert):  # type: ignore[attr-defined]
            self.stack[-1].build(state)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build


def _load_legacy(file: BinaryIO) -> Any:
    """Torch's format of old. The one before it, a tar archive, would be unpacked onto the disk."""
    if tarfile.is_tarfile(file):
        raise ValueError("a tar archive of PyTorch before 0.2")
    file.seek(0)
    return _torch_load(file)


def _torch_load(file: Path | BinaryIO, mmap: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes whose code is not there: it is not wanted
        return torch.load(file, map_location="cpu", pickle_module=_MODULE, weights_only=False, mmap=mmap)


def _load_from_bytes(data: bytes) -> Any:
    """A storage as plain pickles hold it: a file of torch's old format."""
    if LEGACY_MAGIC not in data[:40]:
        raise ValueError("a storage in an unknown format")
    return _load_legacy(io.BytesIO(data))


_MODULE = types.SimpleNamespace(
    __name__="inert", Unpickler=_Unpickler, load=lambda file, **how: _Unpickler(file, **how).load()
)
"""What torch.load takes in the place of Python's pickle."""

_RUNS = {
    "asyncio", "bdb", "code", "codeop", "commands", "concurrent", "ctypes", "gc", "imp", "importlib", "inspect", "nt",
    "os", "pdb", "pip", "pkgutil", "platform", "popen2", "posix", "profile", "pty", "runpy", "setuptools", "shutil",
    "signal", "socket", "ssl", "subprocess", "sys", "tempfile", "threading", "timeit", "urllib", "webbrowser",
}  # fmt: skip
_RUNS_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "execfile", "globals", "open", "setattr"}

_TORCH_FUNCTIONS = (
    "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_sparse_tensor", "_rebuild_qtensor",
    "_rebuild_meta_tensor_no_storage", "_rebuild_nested_tensor", "_rebuild_device_tensor_from_numpy",
)  # fmt: skip
_LAYOUTS = {f"torch.{name}": getattr(torch, name) for name in ("strided", "sparse_coo", "sparse_csr", "sparse_csc")}
_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda *items: dict(*items),
    "_codecs.encode": lambda text, encoding="latin1": text.encode("latin1"),
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.UntypedStorage": torch.UntypedStorage,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: function(*args),
    "torch.serialization._get_layout": lambda name: _LAYOUTS.get(name),
    **{f"torch._utils.{name}": getattr(torch._utils, name) for name in _TORCH_FUNCTIONS if hasattr(torch._utils, name)},
    **{f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, dict)},
    **{f"numpy.{core}.multiarray._reconstruct": InertArray for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": InertArray for core in ("core", "_core")},
    "numpy.dtype": _NumpyDtype,
}


def _known(module: str, name: str) -> Any:
    """What may be made of a pickle; None of all else."""
    if module == "torch" and isinstance(
        found := getattr(torch, name, None), torch.dtype | torch.qscheme | torch.layout
    ):
        return found
    return _KNOWN.get(f"{module}.{name}")
