"""Reading memory-mapped files without keeping them in memory, and letting go of memory that was freed.

The kernel counts every page of a mapped file that was touched as the process's own memory until the mapping goes. So
whoever reads a checkpoint of hundreds of gigabytes through a mapping has to let go of what was read.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

BLOCK_VALUES = 1 << 22
"""What is mapped at a time; 16 MB in float32."""

_libc = ctypes.CDLL(None)


def copy_mapped(source: Tensor, target: Tensor) -> None:
    """Copy a flat tensor that `torch.load(…, mmap=True)` gave, block by block, letting go of each block's pages.

    source: must not have been written to: what is let go of comes back as the file has it.
    """
    for start in range(0, len(source), BLOCK_VALUES):
        block = source[start : start + BLOCK_VALUES]
        target[start : start + BLOCK_VALUES] = block
        _let_go(block)


def release_freed() -> None:
    """Give memory that was freed back to the kernel.

    The C library keeps what was freed in parts of less than 32 MB for later, and weights of many sizes that come and
    go leave hundreds of megabytes of such gaps.
    """
    trim = getattr(_libc, "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _let_go(block: Tensor) -> None:
    start = block.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    stop = block.data_ptr() + block.numel() * block.element_size()
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
