"""The backend made of ATen's own operators, for tensors on any device."""
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
        begun: bool = False,
) -> list[torch.Tensor]:
    """See `Backend.combine`."""
    like = check_combine(layers, weights, biases, outs, scales, begun)
    layers, _ = same_layout(layers, like)
    results: list[torch.Tensor] = []
    if scales is not None:
        weights = [weight[:, None] * scale[..., None] for weight, scale in zip(weights, scales)]
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        bias = bias[..., None, None]
        terms = zip(layers, weight[..., None, None])
        x = outs[i] + bias if outs and begun else torch.addcmul(bias, *next(terms))
        for layer, scale in terms:
            x.addcmul_(layer, scale)
        results.append((x.relu_() if relu and i == 0 else x).to(like.dtype))
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
    tensors, _ = same_layout([*layers, *grads])  # with mixed formats, ATen's sums are wrong for a single image
    layers, grads = tensors[:len(layers)], tensors[len(layers):]
    zeros = torch.zeros_like(means[0])
    if scales is None:
        dots = [_dot(grad, layer, mean) for layer, mean in zip(layers, means) for grad in grads]
    else:
        dots = [
            (scale[:, None] * ((layer - mean[:, None, None]) * grad).sum((2, 3))).sum(0)
            for layer, mean, of_layer in zip(layers, means, scales) for grad, scale in zip(grads, of_layer)]
        zeros = zeros.expand(len(layers[0]), -1)
    sums = combine(grads, weights, [zeros] * len(layers), begun, False, scales, begun is not None)
    return sums, torch.stack(dots).unflatten(0, (len(layers), len(grads)))


def _dot(grad: torch.Tensor, layer: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    # this is the gradient of a batch normalisation's weight, which ATen computes in one pass; on CUDA, only if a weight
    # is given
    ones = torch.ones_like(mean)
    return torch.ops.aten.native_batch_norm_backward(
        grad, layer, ones, None, None, mean, ones, True, 0., [False, True, False])[1]


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Backend.moments`."""
    check_moments(x)
    # the running statistics stay as they are; they only set the dtype of the results
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
    check_norm_act_backward([x, y, grad], weight, bias, mean, invstd)
    if relu:
        torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    (x, grad), _ = same_layout([x, grad])
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight.to(mean.dtype), mean, invstd ** -2, mean, invstd, training, 0., [True, True, True])
