"""What a file is, told by its content, not by its suffix; formats of other programs are named with a cure."""

from __future__ import annotations

import re
import shlex
import zipfile
from pathlib import Path
from typing import Literal

from tokenization.errors import InputError

Kind = Literal["safetensors", "index", "torch", "pickle", "unknown"]
"""``torch``: written by torch.save, of any age; ``pickle``: any other pickle; ``index``: JSON that names shards."""

SUFFIXES = (
    ".pth",
    ".pt",
    ".bin",
    ".ckpt",
    ".tar",
    ".th",
    ".pyth",
    ".pkl",
    ".pickle",
    ".model",
    ".weights",
    ".pdparams",
)
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
    """What a file is.

    Returns:
        ``unknown`` if neither content nor suffix tell, or the file cannot be opened.

    Raises:
        InputError: it is of a format that is not read, which is named with a cure.
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
