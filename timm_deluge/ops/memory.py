"""Memory for a block's layer outputs on a CPU that lasts from block to block and from call to call."""
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ['split_batch', 'workspace']

WORKSPACE_BYTES = 128 * 2 ** 20  # the most that a thread keeps for tensors between calls
BYTES_BETWEEN = 9 * 64  # two tensors, lest they all map to the same sets of a cache, which hold few lines
_thread = threading.local()


def split_batch(x: torch.Tensor, num_tensors: int) -> tuple[torch.Tensor, ...]:
    """Split a batch into groups of images so that `num_tensors` tensors like a group fit the workspace, if possible.

    Args:
        x: ``[N, C, H, W]``.
        num_tensors: Number of tensors like a group.

    Returns:
        From 1 to N groups, if possible a power of two, because convolutions have to be prepared for each group size.
    """
    fitting = max(1, WORKSPACE_BYTES // max(1, x[:1].nbytes * num_tensors))
    num_groups = 1 << ((len(x) - 1) // fitting).bit_length()
    return x.tensor_split(min(num_groups, max(1, len(x))))


@contextmanager
def workspace(num_tensors: int, like: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Lend memory that stays allocated: an allocator would return this much to the system, which clears it each time.

    Args:
        num_tensors: Number of tensors.
        like: Their shape and dtype, ``[N, C, H, W]``.

    Yields:
        Tensors in channels_last, on the CPU, whose contents are lost when the context ends.
    """
    n, c, h, w = like.shape
    stride = like.nbytes + BYTES_BETWEEN
    memory = _thread.__dict__.pop('memory', None)
    if memory is None or len(memory) < num_tensors * stride:
        memory = _allocate(num_tensors * stride)
    try:
        tensors = memory[:num_tensors * stride].view(num_tensors, stride)[:, :like.nbytes].view(like.dtype)
        yield list(tensors.view(num_tensors, n, h, w, c).permute(0, 1, 4, 2, 3).unbind())
    finally:
        if num_tensors * like.nbytes <= WORKSPACE_BYTES:
            _thread.memory = memory


def _allocate(size: int) -> torch.Tensor:
    """Allocate memory, in huge pages where the system has them: a TLB holds too few small pages for a block."""
    with torch.inference_mode(False):
        try:
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        except (AttributeError, OSError):  # no huge pages, or too little memory, which PyTorch then reports
            return torch.empty(size, dtype=torch.uint8, device='cpu')
        return torch.frombuffer(memory, dtype=torch.uint8)
