"""The two sums over layers in ATen's own operators, for tensors on any device."""
from collections.abc import Sequence

import torch

__all__ = ['combine', 'correlate']


def combine(layers: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum layers, each channel with its own weights: ``x[n, c] = bias[c] + sum_i weight[i, c] * layers[i][n, c]``.

    Args:
        layers: l tensors ``[N, C, H, W]``.
        weight: ``[l, C, 1, 1]``.
        bias: ``[C, 1, 1]``.

    Returns:
        One tensor ``[N, C, H, W]`` in the layers' dtype, without autograd history.
    """
    first, *others = weight.to(layers[0].dtype).unbind()
    x = torch.addcmul(bias.to(layers[0].dtype), layers[0], first)
    for layer, scale in zip(layers[1:], others):
        x.addcmul_(layer, scale)
    return x


def correlate(
        layers: Sequence[torch.Tensor],
        means: torch.Tensor,
        invstds: torch.Tensor,
        grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum, over images and positions, a gradient times each normalised layer, and the gradient alone.

    Args:
        layers: l tensors ``[N, C, H, W]`` before normalisation.
        means: Each layer's mean, ``[l, C]``.
        invstds: Each layer's 1 / standard deviation, ``[l, C]``.
        grad: The gradient ``[N, C, H, W]``.

    Returns:
        ``sum grad * (layers[i] - means[i]) * invstds[i]`` as ``[l, C]``, and ``sum grad`` as ``[C]``.
    """
    sums = [
        # a batch normalisation's gradients for its weight and bias are these, and ATen finds them in one pass
        torch.ops.aten.native_batch_norm_backward(
            grad, layer, None, None, None, mean, invstd, True, 0., [False, True, i == 0])
        for i, (layer, mean, invstd) in enumerate(zip(layers, means, invstds))
    ]
    return torch.stack([dots for _, dots, _ in sums]), sums[0][2]
