"""Batch normalisation in inference is affine: here it becomes part of a neighbour's weights."""
import copy
from typing import Any

import torch
from torch import nn

__all__ = ['ChannelAffine', 'affine_of', 'fold_into_conv']


def affine_of(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the scale and the shift, ``[C]``, by which a batch normalisation acts in inference."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


def fold_into_conv(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """Fold a batch normalisation into the convolution before it.

    Args:
        conv: Convolution without bias; left as it is.
        norm: The batch normalisation of its output.

    Returns:
        One convolution, with bias, that gives what both gave in inference.
    """
    scale, shift = affine_of(norm)
    conv = copy.deepcopy(conv)
    conv.weight = nn.Parameter(conv.weight.detach() * scale[:, None, None, None])
    conv.bias = nn.Parameter(shift)
    return conv


class ChannelAffine(nn.Module):
    """Scale and shift of each channel, then ReLU or nothing: a batch normalisation that has no convolution before."""

    def __init__(self, norm: nn.Module, act: nn.Module):
        super().__init__()
        scale, shift = affine_of(norm)
        self.weight = nn.Parameter(scale[:, None, None])
        self.bias = nn.Parameter(shift[:, None, None])
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(torch.addcmul(self.bias, x, self.weight))
