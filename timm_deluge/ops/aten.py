"""The two sums over layers in ATen's own operators, for tensors on any device."""
from collections.abc import Sequence

import torch

__all__ = ['combine', 'combine_backward']


def combine(
        layers: Sequence[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor,
        relu: bool = False,
) -> torch.Tensor:
    """Sum layers, each channel with its own weights: ``x[n, c] = bias[c] + sum_i weight[i, c] * layers[i][n, c]``.

    Args:
        layers: l tensors ``[N, C, H, W]``.
        weight: ``[l, C, 1, 1]``.
        bias: ``[C, 1, 1]``.
        relu: Apply a ReLU to the sum.

    Returns:
        One tensor ``[N, C, H, W]`` in the layers' dtype, without autograd history.
    """
    x = torch.addcmul(bias, layers[0], weight[0])
    for layer, scale in zip(layers[1:], weight[1:]):
        x.addcmul_(layer, scale)
    return (x.relu_() if relu else x).to(layers[0].dtype)


def combine_backward(
        grads: Sequence[torch.Tensor],
        weight: torch.Tensor,
        layer: torch.Tensor,
        mean: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate by one layer, and by its weights, what l calls of `combine` made of it.

    Args:
        grads: The gradients of l results, ``[N, C, H, W]``.
        weight: The layer's weights in these results, ``[l, C, 1, 1]``.
        layer: The layer, ``[N, C, H, W]``.
        mean: Its mean, ``[C]``, which is taken from the layer first.

    Returns:
        ``sum_i weight[i] * grads[i]``, ``[N, C, H, W]``, and for each gradient ``sum grads[i] * (layer - mean)`` over
        images and positions, ``[l, C]``.
    """
    ones, zeros = torch.ones_like(mean), torch.zeros_like(mean)
    dots = [
        # the gradient of a batch normalisation's weight is this, and ATen finds it in one pass
        torch.ops.aten.native_batch_norm_backward(
            grad, layer, None, None, None, mean, ones, True, 0., [False, True, False])[1]
        for grad in grads
    ]
    return combine(grads, weight, zeros[:, None, None]), torch.stack(dots)
