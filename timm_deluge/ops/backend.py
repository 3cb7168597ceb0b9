"""What a backend provides: the sums over layers and over positions that the fast paths are made of.

A backend is a module with these functions. All of them take tensors in any memory format, bring those of a call into
the first one's, channels_last or else contiguous, and raise an error rather than read what is not theirs.
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
        """The module's."""
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
            layers: l tensors ``[N, C, H, W]``; there may be none to add to sums that were begun.
            weights: ``[l, C]``, of each sum.
            biases: ``[C]``, of each sum; with scales, one for each image, ``[N, C]``.
            outs: Memory in the first layer's dtype and format that the sums may take.
            relu: Apply a ReLU to the first sum.
            scales: ``[l, N]``, of each sum: what the images of a layer are multiplied by, besides the weight.
            begun: Whether `outs` hold what the sums are to be added to; their dtype and format are then the sums'.

        Returns:
            The sums ``[N, C, H, W]``, in the first layer's dtype or, where they were begun, in the first out's.
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
        """Differentiate by layers, and by their weights, what l calls of `combine` made of them.

        Args:
            grads: The gradients of l results, ``[N, C, H, W]``.
            weights: Of each layer, its weights in these results, ``[l, C]``.
            layers: The layers, ``[N, C, H, W]``.
            means: Of each layer, its mean, ``[C]``, which is taken from the layer first.
            begun: Of each layer, what other results have begun of its gradient, in the first layer's format; it may be
                overwritten.
            scales: Of each layer, what its images were multiplied by in these results, ``[l, N]``.

        Returns:
            Of each layer, ``sum_i weights[i] * grads[i]``, ``[N, C, H, W]``, added to what was begun; and of each layer
            and gradient ``sum grads[i] * (layer - mean)`` over images and positions, ``[number of layers, l, C]``. With
            scales, these multiply the gradients' images in both.
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
        The one whose shape, dtype and format the sums have.

    Raises:
        ValueError: If there is one of another shape, dtype, device or number.
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
        ValueError: If there is one of another shape, dtype, device or number.
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
        ValueError: If it is of another shape or dtype, or empty.
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
        ValueError: If there is one of another shape, dtype or device.
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
