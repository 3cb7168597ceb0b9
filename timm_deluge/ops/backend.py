"""What a backend provides: the sums over layers and over positions that the fast paths are made of.

A backend is a module with these functions. Each takes tensors in any memory format, converts all tensors of a call to
the format of the first one, channels_last or else contiguous, and raises an error rather than read out of bounds.
"""
from collections.abc import Sequence
from typing import Protocol

import torch

from .layout import fast_memory_format

__all__ = ['Backend', 'check_combine', 'check_combine_backward', 'check_moments', 'check_norm_act_backward']


class Backend(Protocol):
    """Four functions; their results have no autograd history."""

    @property
    def __name__(self) -> str:
        """The module's name."""
        ...

    def combine(
            self,
            layers: Sequence[torch.Tensor],
            weights: Sequence[torch.Tensor],
            biases: Sequence[torch.Tensor],
            outs: Sequence[torch.Tensor] | None = None,
            relu: bool = False,
            scales: Sequence[torch.Tensor] | None = None,
            begun: bool = False,
    ) -> list[torch.Tensor]:
        """Sum layers, each channel with its own weights: ``x[n, c] = bias[c] + sum_i weight[i, c] * layers[i][n, c]``.

        Args:
            layers: l tensors ``[N, C, H, W]``; may be empty if the sums were begun.
            weights: The weights of each sum, ``[l, C]``.
            biases: The bias of each sum, ``[C]``; with scales, one for each image, ``[N, C]``.
            outs: Tensors in the first layer's dtype and memory format, which the sums may be written to.
            relu: Apply a ReLU to the first sum.
            scales: For each sum, ``[l, N]``: the factor of each image of a layer, besides the weight.
            begun: Whether `outs` hold the sums begun so far, which are then added to, in their dtype and format.

        Returns:
            The sums ``[N, C, H, W]``, in the first layer's dtype or, if they were begun, in that of `outs`.
        """
        ...

    def combine_backward(
            self,
            grads: Sequence[torch.Tensor],
            weights: Sequence[torch.Tensor],
            layers: Sequence[torch.Tensor],
            means: Sequence[torch.Tensor],
            begun: Sequence[torch.Tensor] | None = None,
            scales: Sequence[torch.Tensor] | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Differentiate l sums that `combine` made of layers, with respect to the layers and their weights.

        Args:
            grads: The gradients of l results, ``[N, C, H, W]``.
            weights: For each layer, its weights in these results, ``[l, C]``.
            layers: The layers, ``[N, C, H, W]``.
            means: For each layer, its mean, ``[C]``, which is first subtracted from the layer.
            begun: For each layer, the part of its gradient that other results gave, in the first layer's format; it is
                added to, and may be overwritten.
            scales: For each layer, the factors of its images in these results, ``[l, N]``.

        Returns:
            For each layer, ``sum_i weights[i] * grads[i]``, ``[N, C, H, W]``, added to `begun`; and for each layer and
            gradient, ``sum grads[i] * (layer - mean)`` over images and positions, ``[number of layers, l, C]``, in
            float32 or more. The scales, if any, multiply the gradients' images in both.
        """
        ...

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Get each channel's mean and (biased) variance over images and positions, ``[C]``, in float32 or more.

        Args:
            x: ``[N, C, H, W]``.
        """
        ...

    def norm_act_backward(
            self,
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
        ...


def check_combine(
        layers: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor] | None,
        scales: Sequence[torch.Tensor] | None,
        begun: bool,
) -> torch.Tensor:
    """Check the arguments of `Backend.combine`.

    Returns:
        The tensor whose shape, dtype and format the sums have.

    Raises:
        ValueError: If a tensor has a wrong shape, dtype or device, or the number of tensors is wrong.
    """
    like = _check_images('outs', outs or []) if begun else _check_images('layers', layers)
    if begun:
        _check('layers', layers, like.shape, like)
    batch_size, channels = like.shape[:2]
    _check('weights', weights, (len(layers), channels), like)
    bias_shape = (channels,) if scales is None else (batch_size, channels)
    _check('biases', biases, bias_shape, like, len(weights))
    if outs is not None:
        _check_memory('outs', outs, like, len(weights))
    if scales is not None:
        _check('scales', scales, (len(layers), batch_size), like, len(weights))
    return like


def check_combine_backward(
        grads: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        layers: Sequence[torch.Tensor],
        means: Sequence[torch.Tensor],
        begun: Sequence[torch.Tensor] | None,
        scales: Sequence[torch.Tensor] | None,
) -> None:
    """Check the arguments of `Backend.combine_backward`.

    Raises:
        ValueError: If a tensor has a wrong shape, dtype or device, or the number of tensors is wrong.
    """
    first = _check_images('layers', layers)
    _check_images('grads', grads, first)
    batch_size, channels = first.shape[:2]
    _check('weights', weights, (len(grads), channels), first, len(layers))
    _check('means', means, (channels,), first, len(layers))
    if begun is not None:
        _check_memory('begun', begun, first, len(layers))
    if scales is not None:
        _check('scales', scales, (len(grads), batch_size), first, len(layers))


def check_moments(x: torch.Tensor) -> None:
    """Check the argument of `Backend.moments`.

    Raises:
        ValueError: If it has a wrong shape or dtype, or is empty.
    """
    _check_images('x', [x])
    if not x.numel():
        raise ValueError(f'x: there are no moments of no values, got {list(x.shape)}')


def check_norm_act_backward(images: Sequence[torch.Tensor], *parameters: torch.Tensor) -> None:
    """Check the arguments of `Backend.norm_act_backward`.

    Args:
        images: x, y and grad.
        parameters: Weight, bias, mean and 1 / standard deviation.

    Raises:
        ValueError: If a tensor has a wrong shape, dtype or device.
    """
    for name, tensor in zip(('x', 'y', 'grad'), images):
        _check_images(name, [tensor], images[0])
    for name, parameter in zip(('weight', 'bias', 'mean', 'invstd'), parameters):
        _check(name, [parameter], images[0].shape[1:2], images[0])


def _check_images(name: str, tensors: Sequence[torch.Tensor], like: torch.Tensor | None = None) -> torch.Tensor:
    if not tensors:
        raise ValueError(f'{name}: there are none')
    like = tensors[0] if like is None else like
    if like.dim() != 4:
        raise ValueError(f'{name}: expected [N, C, H, W], got {list(like.shape)}')
    _check(name, tensors, like.shape, like)
    return like


def _check_memory(name: str, tensors: Sequence[torch.Tensor], like: torch.Tensor, number: int) -> None:
    _check(name, tensors, like.shape, like, number)
    memory_format = fast_memory_format(like)
    for tensor in tensors:
        if tensor.dtype != like.dtype or not tensor.is_contiguous(memory_format=memory_format):
            raise ValueError(
                f'{name}: expected {like.dtype} in {memory_format}, got {tensor.dtype} of strides '
                f'{tensor.stride()}')


def _check(
        name: str,
        tensors: Sequence[torch.Tensor],
        shape: Sequence[int],
        like: torch.Tensor,
        number: int | None = None,
) -> None:
    if number is not None and len(tensors) != number:
        raise ValueError(f'{name}: expected {number} tensors, got {len(tensors)}')
    device = like.device
    for tensor in tensors:
        if tensor.shape != shape:
            raise ValueError(f'{name}: expected {list(shape)}, got {list(tensor.shape)}')
        if tensor.device != device:
            raise ValueError(f'{name}: expected to be on {device}, got {tensor.device}')
        if not tensor.is_floating_point():
            raise ValueError(f'{name}: expected floating point numbers, got {tensor.dtype}')
