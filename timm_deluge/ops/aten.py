"""The backend in ATen's own operators, for tensors on any device."""
from collections.abc import Sequence

import torch

from .backend import check_combine, check_combine_backward, check_moments, check_norm_act_backward
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
    """See `Backend.combine`."""
    check_combine(layers, weights, biases, outs, scales)
    layers, _ = same_layout(layers)
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
    """See `Backend.combine_backward`."""
    check_combine_backward(grads, weights, layers, means, begun, scales)
    tensors, _ = same_layout([*layers, *grads])  # of mixed ones, ATen makes wrong sums where there is one image
    layers, grads = tensors[:len(layers)], tensors[len(layers):]
    if scales is None:
        dots = [_dot(grad, layer, mean) for layer, mean in zip(layers, means) for grad in grads]
    else:
        dots = [
            (scale[:, None] * ((layer - mean[:, None, None]) * grad).sum((2, 3))).sum(0)
            for layer, mean, of_layer in zip(layers, means, scales) for grad, scale in zip(grads, of_layer)]
    zeros = torch.zeros_like(means[0])[:, None, None]
    if scales is not None:
        zeros = zeros.expand(len(layers[0]), -1, 1, 1)
    sums = combine(grads, weights, [zeros] * len(layers), scales=scales)
    if begun is not None:
        sums = [partial.add_(total) for partial, total in zip(begun, sums)]
    return sums, torch.stack(dots).unflatten(0, (len(layers), len(grads)))


def _dot(grad: torch.Tensor, layer: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    # the gradient of a batch normalisation's weight is this, and ATen finds it in one pass: on CUDA, of a weight that
    # there is
    ones = torch.ones_like(mean)
    return torch.ops.aten.native_batch_norm_backward(
        grad, layer, ones, None, None, mean, ones, True, 0., [False, True, False])[1]


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Backend.moments`."""
    check_moments(x)
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
    """See `Backend.norm_act_backward`."""
    check_norm_act_backward(grad, x, y, weight=weight, bias=bias, mean=mean, invstd=invstd)
    if relu:
        torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    (x, grad), _ = same_layout([x, grad])
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight.to(mean.dtype), mean, invstd ** -2, mean, invstd, training, 0., [True, True, True])
