"""The sums over layers and over positions in ATen's own operators, for tensors on any device."""
from collections.abc import Sequence

import torch

from .layout import same_layout

__all__ = ['combine', 'combine_backward', 'moments', 'norm_act_backward']


def combine(
        layers: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor] | None = None,
        relu: bool = False,
        scales: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Sum layers, each channel with its own weights: ``x[n, c] = bias[c] + sum_i weight[i, c] * layers[i][n, c]``.

    Args:
        layers: l tensors ``[N, C, H, W]``.
        weights: ``[l, C, 1, 1]``, of each sum.
        biases: ``[C, 1, 1]``, of each sum; with scales, one for each image, ``[N, C, 1, 1]``.
        outs: Memory in the first layer's format that the sums may take. A single sum may take a layer's.
        relu: Apply a ReLU to the first sum.
        scales: ``[l, N]``, of each sum: what the images of a layer are multiplied by, besides the weight.

    Returns:
        The sums ``[N, C, H, W]`` in the first layer's dtype, without autograd history.
    """
    results: list[torch.Tensor] = []
    if scales is not None:
        weights = [weight[:, None] * scale[..., None, None, None] for weight, scale in zip(weights, scales)]
    for weight, bias in zip(weights, biases):
        x = torch.addcmul(bias, layers[0], weight[0])
        for layer, scale in zip(layers[1:], weight[1:]):
            x.addcmul_(layer, scale)
        results.append((x.relu_() if relu and not results else x).to(layers[0].dtype))
    return results


def combine_backward(
        grads: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        layers: Sequence[torch.Tensor],
        means: Sequence[torch.Tensor],
        begun: Sequence[torch.Tensor] | None = None,
        scales: Sequence[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Differentiate by layers, and by their weights, what l calls of `combine` made of them.

    Args:
        grads: The gradients of l results, ``[N, C, H, W]``.
        weights: Of each layer, its weights in these results, ``[l, C, 1, 1]``.
        layers: The layers, ``[N, C, H, W]``.
        means: Of each layer, its mean, ``[C]``, which is taken from the layer first.
        begun: Of each layer, what other results have begun of its gradient, in the first layer's format; overwritten.
        scales: Of each layer, what its images were multiplied by in these results, ``[l, N]``.

    Returns:
        Of each layer, ``sum_i weights[i] * grads[i]``, ``[N, C, H, W]``, added to what was begun; and of each layer and
        gradient ``sum grads[i] * (layer - mean)`` over images and positions, ``[number of layers, l, C]``. With scales,
        these multiply the gradients' images in both.
    """
    tensors, _ = same_layout([*layers, *grads])  # of mixed ones, ATen makes wrong sums where there is one image
    layers, grads = tensors[:len(layers)], tensors[len(layers):]
    zeros = torch.zeros_like(means[0])[:, None, None]
    if scales is None:
        dots = [_dot(grad, layer, mean) for layer, mean in zip(layers, means) for grad in grads]
    else:
        dots = [
            (scale[:, None] * ((layer - mean[:, None, None]) * grad).sum((2, 3))).sum(0)
            for layer, mean, of_layer in zip(layers, means, scales) for grad, scale in zip(grads, of_layer)]
    sums = combine(grads, weights, [zeros] * len(layers), scales=scales)
    if begun is not None:
        sums = [partial.add_(total) for partial, total in zip(begun, sums)]
    return sums, torch.stack(dots).unflatten(0, (len(layers), len(grads)))


def _dot(grad, layer, mean) -> torch.Tensor:
    # the gradient of a batch normalisation's weight is this, and ATen finds it in one pass
    return torch.ops.aten.native_batch_norm_backward(
        grad, layer, None, None, None, mean, torch.ones_like(mean), True, 0., [False, True, False])[1]


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Get each channel's mean and (biased) variance over images and positions, ``[C]``.

    Args:
        x: ``[N, C, H, W]``.
    """
    # running statistics that stay as they are, for the results to have their dtype
    dtype = torch.promote_types(x.dtype, torch.float32)
    running = torch.zeros(2, x.shape[1], device=x.device, dtype=dtype)
    mean, var = torch.ops.aten.batch_norm_update_stats(x, *running, 0.)
    return mean, var


def norm_act_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        training: bool,
        relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiate ``y = relu(weight * (x - mean) * invstd + bias)``, or the same without ReLU.

    Args:
        grad: The gradient of y, ``[N, C, H, W]``; it may be overwritten.
        x: ``[N, C, H, W]``.
        y: ``[N, C, H, W]``.
        weight: ``[C]``.
        bias: ``[C]``.
        mean: ``[C]``.
        invstd: 1 / standard deviation, ``[C]``.
        training: Whether mean and standard deviation are those of x.
        relu: Whether there is a ReLU.

    Returns:
        The gradients of x, weight and bias.
    """
    if relu:
        torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    (x, grad), _ = same_layout([x, grad])
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, invstd ** -2, mean, invstd, training, 0., [True, True, True])
