"""Hints to the system about memory: which pages can go, and where large ones pay."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenization.checkpoint.checkpoint import Checkpoint

HUGE_PAGE = 2 << 20


def release_pages(checkpoint: Checkpoint, name: str, first: int = 0, last: int | None = None) -> None:
    """Drop the pages of values ``[first, last)`` of a tensor from this process; reading them again maps them again.

    The file's bytes stay in the system's cache. Does nothing where the system has no ``madvise``.
    """
    info = checkpoint.tensors[name]
    advise = _madvise()
    if advise is None or info.offset % info.dtype.itemsize:  # an unaligned tensor is a copy, not the map
        return
    whole = checkpoint.flat(name)
    part = whole[first:last]
    # The system maps a page with all of its large page. Whatever else of the file goes too can be mapped again; beyond
    # the map the memory is someone else's.
    map_begin = whole.data_ptr() - info.offset
    map_end = map_begin + -(-checkpoint.sizes[info.file] // mmap.PAGESIZE) * mmap.PAGESIZE
    begin = max(map_begin, part.data_ptr() // HUGE_PAGE * HUGE_PAGE)
    end = min(map_end, -(-(part.data_ptr() + part.nbytes) // HUGE_PAGE) * HUGE_PAGE)
    if part.nbytes:
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
