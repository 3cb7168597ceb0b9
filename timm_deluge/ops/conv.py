"""Convolutions as matrix products on a CPU, where these are faster than oneDNN's convolutions.

In channels_last, a 1x1 convolution is a matrix product as it stands. With a larger kernel, it is a product with a
matrix of patches: a row for each output position, with all that the kernel sees there. Patches take memory and time,
and pay off where there are few positions for each output channel, as late in a network, where oneDNN's convolutions are
slowest. For weight gradients in bfloat16 with AMX, they pay off up to a larger number of positions.
"""
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from .layout import rows

__all__ = ['conv2d', 'conv2d_backward']

MAX_POSITIONS = 4  # for each output channel
MAX_POSITIONS_OF_WEIGHT_GRAD = 32  # for each output channel, in bfloat16 with AMX
MAX_POSITIONS_OF_A_SUM = 4096  # longer sums are slower, and less exact
ConvArgs = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding, dilation


def conv2d(x: torch.Tensor, weight: torch.Tensor, conv_args: ConvArgs) -> torch.Tensor:
    """Convolve.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[C', C, K, K']``.
        conv_args: Stride, padding and dilation, as an `nn.Conv2d` has them.

    Returns:
        ``[N, C', H', W']``, without autograd history, in the dtype that autocast gives a convolution.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    size = _output_size(x, weight, conv_args)
    if _pays(x, weight, size, MAX_POSITIONS):
        kernels = weight.permute(0, 2, 3, 1).flatten(1)
        return _images(_patches(x, weight, size, conv_args) @ kernels.t(), x.shape[0], size)
    return F.conv2d(x, weight, None, *conv_args)


def conv2d_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        conv_args: ConvArgs,
        needs_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Get the gradients of a convolution's input and, if needed, of its weight.

    Args:
        grad: The gradient of its output, ``[N, C', H', W']``.
        x: ``[N, C, H, W]``, of the gradient's dtype.
        weight: ``[C', C, K, K']``, of the gradient's dtype.
        conv_args: See `conv2d`.
        needs_weight_grad: Whether the weight's gradient is needed.
    """
    size = grad.shape[2:]
    grad_weight: torch.Tensor | None = None
    if _is_matrix(x) and _is_matrix(grad) and _is_product(weight, conv_args):
        if needs_weight_grad:
            grad_weight = _images(rows(grad).t() @ rows(x), weight.shape[0], (1, 1))
        return _images(rows(grad) @ weight.flatten(1), x.shape[0], x.shape[2:]), grad_weight
    by_patches = _is_matrix(grad) and _pays(x, weight, size, MAX_POSITIONS)
    weight_by_patches = by_patches or _is_matrix(grad) and _pays_for_weight_grad(x, weight, size)
    if needs_weight_grad and weight_by_patches:
        kernels_grad = rows(grad).t() @ _patches(x, weight, size, conv_args)
        grad_weight = _images(kernels_grad, weight.shape[0], weight.shape[2:])
    if by_patches:
        return _input_grad(grad, x, weight, conv_args), grad_weight
    mask = [True, needs_weight_grad and grad_weight is None, False]
    grad_x, of_aten, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *conv_args, False, [0, 0], 1, mask)
    return grad_x, of_aten if mask[1] else grad_weight


def _is_matrix(x: torch.Tensor) -> bool:
    return x.device.type == 'cpu' and x.is_contiguous(memory_format=torch.channels_last)


def _is_product(weight: torch.Tensor, conv_args: ConvArgs) -> bool:
    return weight.shape[2:] == (1, 1) and conv_args == ((1, 1), (0, 0), (1, 1))


def _pays(x: torch.Tensor, weight: torch.Tensor, size: tuple[int, ...], max_positions: int) -> bool:
    """Tell whether a product of patches is possible and, as far as was measured, faster."""
    few = x.shape[0] * size[0] * size[1] <= max_positions * weight.shape[0]
    return few and weight.shape[2:] != (1, 1) and _is_matrix(x) and _is_matrix(weight) and x.dtype == weight.dtype


def _pays_for_weight_grad(x: torch.Tensor, weight: torch.Tensor, size: tuple[int, ...]) -> bool:
    few = x.shape[0] * size[0] * size[1] <= MAX_POSITIONS_OF_A_SUM
    return few and _pays(x, weight, size, MAX_POSITIONS_OF_WEIGHT_GRAD) and x.dtype is torch.bfloat16 and _has_amx()


@cache
def _has_amx() -> bool:
    capabilities: Any = getattr(torch.cpu, 'get_capabilities', dict)()
    return capabilities.get('amx_bf16', False)


def _output_size(x: torch.Tensor, weight: torch.Tensor, conv_args: ConvArgs) -> tuple[int, ...]:
    return tuple(
        (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], *conv_args))


def _images(matrix: torch.Tensor, n: int, size: tuple[int, ...]) -> torch.Tensor:
    """View a matrix ``[N * H * W, C]`` as ``[N, C, H, W]``."""
    return matrix.view(n, *size, -1).permute(0, 3, 1, 2)


def _patches(x: torch.Tensor, weight: torch.Tensor, size: tuple[int, ...], conv_args: ConvArgs) -> torch.Tensor:
    """Copy what the kernel sees at each output position: ``[N * H' * W', K * K' * C]``."""
    (sh, sw), (ph, pw), (dh, dw) = conv_args
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
    n, h, w, c = padded.stride()
    patches = padded.as_strided(
        (x.shape[0], *size, *weight.shape[2:], x.shape[1]), (n, sh * h, sw * w, dh * h, dw * w, c))
    return patches.reshape(-1, weight[0].numel())


def _input_grad(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, conv_args: ConvArgs) -> torch.Tensor:
    """Get the gradient of x, by one product for each set of positions that the same elements of the kernel saw."""
    (sh, sw), (ph, pw), (dh, dw) = conv_args
    (n, c, h, w), (kh, kw) = x.shape, weight.shape[2:]
    pad_h, pad_w = max(0, dh * (kh - 1) - ph), max(0, dw * (kw - 1) - pw)
    padded = F.pad(grad.permute(0, 2, 3, 1), (0, 0, pad_w, pad_w, pad_h, pad_h))
    grad_x = x.new_empty(n, h, w, c)
    for top, left in product(range(min(sh, h)), range(min(sw, w))):
        part = grad_x[:, top::sh, left::sw]
        seen, kernels = [], []
        for i, j in product(range(kh), range(kw)):
            (row, no_row), (column, no_column) = divmod(top + ph - i * dh, sh), divmod(left + pw - j * dw, sw)
            if not no_row and not no_column:
                seen.append(padded[:, row + pad_h:][:, :part.shape[1], column + pad_w:][:, :, :part.shape[2]])
                kernels.append(weight[:, :, i, j])
        if seen:
            part.copy_((torch.cat(seen, -1).flatten(0, 2) @ torch.cat(kernels)).view_as(part))
        else:
            part.zero_()
    return grad_x.permute(0, 3, 1, 2)
