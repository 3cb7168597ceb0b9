"""The memory layouts that the fast implementations know."""
from collections.abc import Sequence

import torch

__all__ = ['fast_memory_format', 'rows', 'same_layout']


def fast_memory_format(x: torch.Tensor) -> torch.memory_format:
    """Get the format that a tensor ``[N, C, H, W]`` is in, or is brought into: channels_last or else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def same_layout(layers: Sequence[torch.Tensor], like: torch.Tensor | None = None) -> tuple[list[torch.Tensor], int]:
    """Bring layers into one dtype and memory format, channels_last or else contiguous.

    Args:
        layers: Tensors ``[N, C, H, W]``.
        like: The tensor ``[N, C, H, W]`` whose dtype and format they get; the first layer if None.

    Returns:
        The layers, and how many positions of a channel follow each other in memory: 1 in channels_last.
    """
    like = layers[0] if like is None else like
    memory_format = fast_memory_format(like)
    inner = 1 if memory_format is torch.channels_last else like.shape[2] * like.shape[3]
    dtype = like.dtype
    return [
        layer if layer.dtype is dtype and layer.is_contiguous(memory_format=memory_format)
        else layer.to(dtype).contiguous(memory_format=memory_format) for layer in layers], inner


def rows(x: torch.Tensor) -> torch.Tensor:
    """View a tensor ``[N, C, H, W]`` in channels_last as a matrix ``[N * H * W, C]``, a row for each position."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])
