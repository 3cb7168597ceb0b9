"""The memory layouts that the kernels over several layers know."""
from collections.abc import Sequence

import torch

__all__ = ['same_layout']


def same_layout(layers: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Bring layers into the first one's dtype and memory format, channels_last or else contiguous.

    Args:
        layers: Tensors ``[N, C, H, W]``.

    Returns:
        The layers, and how many positions of a channel follow each other in memory: 1 in channels_last.
    """
    channels_last = layers[0].is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    inner = 1 if channels_last else layers[0].shape[2] * layers[0].shape[3]
    return [layer.to(layers[0].dtype).contiguous(memory_format=memory_format) for layer in layers], inner
