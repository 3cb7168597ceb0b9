"""Batch normalisation, optional ReLU and convolution as one function, which keeps only its input for backward."""
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .conv import conv2d, conv2d_backward
from .implementation import choose_backend

__all__ = ['Recompute', 'begin_norm', 'norm_act_conv', 'normalize', 'refuse_batched', 'stand_in', 'statistics']


class Recompute(Protocol):
    """Recomputes the input of a fused convolution in the backward pass."""

    def __call__(self) -> torch.Tensor:
        """Recompute the input, ``[N, C, H, W]``."""
        ...

    def take_grad_sum(self, total: torch.Tensor) -> None:
        """Take the sum of the input's whole gradient over images and positions, ``[C]``.

        It is the gradient of the biases of the cross-layer convolution that gave the input, unless that one drops
        connections.
        """
        ...


def norm_act_conv(
        x: torch.Tensor,
        norm: Any,
        conv: nn.Conv2d,
        recompute: Recompute | None = None,
) -> torch.Tensor:
    """Apply ``conv(norm(x))``; the backward pass normalises x again, so that the normalised tensor is not kept.

    Args:
        x: ``[N, C, H, W]``.
        norm: BN with affine parameters and running statistics, and ReLU where it has one, as timm's `BatchNormAct2d`.
        conv: Convolution without bias.
        recompute: Recomputes x in the backward pass, so that x is not kept either. It is told the sum of x's whole
            gradient, so nothing else may use x.

    Returns:
        ``[N, C', H', W']``.
    """
    return _NormActConv.apply(
        x, norm.weight, norm.bias, conv.weight, *begin_norm(norm), isinstance(getattr(norm, 'act', None), nn.ReLU),
        (conv.stride, conv.padding, conv.dilation), recompute)


def begin_norm(norm: Any) -> tuple[torch.Tensor, torch.Tensor, bool, float | None, float]:
    """Begin a call of a batch normalisation: count the batch in training, and get all it needs besides the parameters.

    Returns:
        Running mean and variance, ``[C]``, whether it is in training, momentum and eps. The momentum may be None in
        evaluation, which does not use it.
    """
    momentum = norm.momentum
    if norm.training:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the statistics are a mean over all batches
            momentum = 1 / norm.num_batches_tracked.item()
    return norm.running_mean, norm.running_var, norm.training, momentum, norm.eps


def statistics(
        x: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        training: bool,
        momentum: float,
        eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the mean and 1 / standard deviation, ``[C]``, that a batch normalisation uses, in float32 or more.

    In training they are those of x, and the running statistics are updated with them.

    Args:
        x: ``[N, C, H, W]``.
        running_mean, running_var, training, momentum, eps: See `begin_norm`.

    Raises:
        ValueError: In training, if x has only one value for each channel.
    """
    if training:
        count = x.numel() / x.shape[1]
        if count == 1:
            raise ValueError(f'Expected more than 1 value per channel when training, got input size {list(x.shape)}')
        mean, var = choose_backend(x).moments(x)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    else:
        dtype = torch.promote_types(running_mean.dtype, torch.float32)
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype)
    return mean, (var + eps).rsqrt()


def normalize(
        x: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor, training: bool, eps: float) -> torch.Tensor:
    """Normalise by the definition, differentiably: for backward passes that are differentiated themselves.

    Args:
        x: ``[N, C, H, W]``.
        mean: ``[C]``, as `statistics` gave it.
        invstd: ``[C]``, as `statistics` gave it.
        training: Whether mean and invstd are the statistics of x; gradients then flow through these, too.
        eps: Added to the variance.

    Returns:
        ``[N, C, H, W]``, in float32 or more.
    """
    if training:
        return F.batch_norm(x.to(mean.dtype), None, None, training=True, eps=eps)
    return (x - mean[:, None, None]) * invstd[:, None, None]


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Get a tensor of the same values to differentiate with respect to, which does not call the given one's hooks."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def refuse_batched(grad: torch.Tensor) -> None:
    """Raise a NotImplementedError if this is a batch of gradients, of `is_grads_batched=True` or `torch.func.vmap`."""
    if torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_batchedtensor(grad):
        raise NotImplementedError(
            'Batched gradients are not supported by the fast implementations of DelugeNet: '
            'call timm_deluge.set_implementation("reference") before the forward pass')


class _NormActConv(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx, x, norm_weight, norm_bias, weight, running_mean, running_var, training, momentum, eps, relu,
            conv_args, recompute):
        mean, invstd = statistics(x, running_mean, running_var, training, momentum, eps)
        ctx.save_for_backward(None if recompute else x, norm_weight, norm_bias, weight, mean, invstd)
        ctx.training, ctx.eps, ctx.relu, ctx.conv_args, ctx.recompute = training, eps, relu, conv_args, recompute
        y = _norm_act(x, norm_weight, norm_bias, mean, invstd, relu)
        return conv2d(y, weight, conv_args)

    @staticmethod
    def backward(ctx, grad):
        refuse_batched(grad)
        x, norm_weight, norm_bias, weight, mean, invstd = ctx.saved_tensors
        if ctx.recompute:
            x = ctx.recompute()
        backend = choose_backend(x)
        with torch.autocast(grad.device.type, enabled=False):  # as for ATen's convolutions, even within autocast
            if torch.is_grad_enabled():
                grads = _differentiable_grads(ctx, grad, x, norm_weight, norm_bias, weight, mean, invstd)
                return *grads, *[None] * 8
            y = _norm_act(x, norm_weight, norm_bias, mean, invstd, ctx.relu).to(grad.dtype)
            grad_y, grad_weight = conv2d_backward(
                grad, y, weight.to(grad.dtype), ctx.conv_args, ctx.needs_input_grad[3])
        grad_x, grad_norm_weight, grad_norm_bias = backend.norm_act_backward(
            grad_y, x, y, norm_weight, norm_bias, mean, invstd, ctx.training, ctx.relu)
        if ctx.recompute:  # in training, a gradient through a batch normalisation sums to 0
            ctx.recompute.take_grad_sum(
                torch.zeros_like(mean) if ctx.training else norm_weight * invstd * grad_norm_bias)
        return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, *[None] * 8


def _norm_act(x, norm_weight, norm_bias, mean, invstd, relu) -> torch.Tensor:
    """Normalise and, if wanted, apply the ReLU, as a sum over a single layer."""
    scale = norm_weight * invstd
    [y] = choose_backend(x).combine([x], [scale[None]], [norm_bias - scale * mean], relu=relu)
    return y


def _differentiable_grads(ctx, grad, x, norm_weight, norm_bias, weight, mean, invstd) -> list[torch.Tensor | None]:
    """Get the gradients of x and of the parameters by the definition, so that they can be differentiated again."""
    needed = ctx.needs_input_grad[:4]
    x, norm_weight, norm_bias, weight = inputs = [
        stand_in(tensor) if need else tensor for tensor, need in zip((x, norm_weight, norm_bias, weight), needed)]
    normalized = normalize(x, mean, invstd, ctx.training, ctx.eps)
    y = torch.addcmul(norm_bias[:, None, None], normalized, norm_weight[:, None, None])
    if ctx.relu:
        y = y.relu()
    result = F.conv2d(y.to(grad.dtype), weight.to(grad.dtype), None, *ctx.conv_args)
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needed]
