"""Hints to the system about memory: which pages can go, and where large ones pay."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenization.checkpoint import Checkpoint

HUGE_PAGE = 2 << 20


def release_pages(checkpoint: Checkpoint, name: str, first: int = 0, last: int | None = None) -> None:
    """Drop the pages of values ``[first, last)`` of a tensor from this process; reading them again maps them again.

    The file's bytes stay in the system's cache. Does nothing where the system has no ``madvise``.
    """
    info = checkpoint.tensors[name]
    advise = _madvise()
    if advise is None or info.offset % info.dtype.itemsize:  # an unaligned tensor is a copy, not the map
        return
    flat = checkpoint.flat(name)[first:last]
    # Whole pages only: the bytes around the values may be anyone's.
    begin = -(-flat.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (flat.data_ptr() + flat.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        advise(begin, end - begin, mmap.MADV_DONTNEED)


def empty_huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` in huge pages where the system has them: to touch fresh small ones takes longer than to copy."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    advise = _madvise()
    begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if advise is not None and end > begin:
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):  # elsewhere it is a hint that may do nothing
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
