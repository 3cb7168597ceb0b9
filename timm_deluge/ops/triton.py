"""The backend as Triton kernels: each sum reads its layers once, and runs in float32.

A kernel finds the layers through a table of their addresses, so that one compiled kernel serves any number of them.
"""
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import aten
from .aten import moments, norm_act_backward
from .backend import check_combine, check_combine_backward
from .layout import same_layout

__all__ = ['combine', 'combine_backward', 'moments', 'norm_act_backward']

TILE = 8192  # elements of a layer that a program works on
ADDRESSES = 8  # that `_table_kernel` takes as its arguments
MAX_TILES = 65535  # CUDA's limit for a grid's second dimension


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
    layers, inner = _aligned(layers, like)
    shape, grid, block = _tiling(like, inner)
    if scales is not None or grid[0] > MAX_TILES:
        return aten.combine(layers, weights, biases, outs, relu, scales, begun)
    outs = [torch.empty_like(layers[0]) for _ in weights] if outs is None else list(outs)
    with torch.cuda.device_of(like):
        # programs that read the same tile, for different results, are neighbours in the grid and run side by side
        _combine_kernel[(len(outs), *grid)](
            _table([*layers, *outs]), torch.stack(list(weights)).float(), torch.stack(list(biases)).float(), outs[0],
            len(layers), *shape, BEGUN=begun, RELU=relu, **block)
    return outs


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
    num_layers, num_grads = len(layers), len(grads)
    tensors, inner = _aligned([*layers, *grads])
    shape, grid, block = _tiling(tensors[0], inner)
    if scales is not None or grid[0] > MAX_TILES:
        return aten.combine_backward(grads, weights, layers, means, begun, scales)
    outs = [torch.empty_like(layer) for layer in tensors[:num_layers]] if begun is None else list(begun)
    dots = tensors[0].new_empty(grid[0], num_layers, num_grads, tensors[0].shape[1], dtype=torch.float32)
    with torch.cuda.device_of(tensors[0]):
        _combine_backward_kernel[(num_layers, *grid)](
            _table([*tensors, *outs]), torch.stack(list(weights)).float(), torch.stack(list(means)).float(), tensors[0],
            dots, num_layers, num_grads, *shape, BEGUN=begun is not None, **block)
    return outs, dots.sum(0)


def _aligned(layers: Sequence[torch.Tensor], like: torch.Tensor | None = None) -> tuple[list[torch.Tensor], int]:
    """Bring layers into one layout, at addresses that the kernels read 16 bytes at a time."""
    layers, inner = same_layout(layers, like)
    return [layer if layer.data_ptr() % 16 == 0 else layer.clone() for layer in layers], inner


def _tiling(x: torch.Tensor, inner: int) -> tuple[tuple[int, int, int], tuple[int, int], dict[str, int]]:
    positions, channels = x.numel() // x.shape[1], x.shape[1]
    block_c = min(64, triton.next_power_of_2(channels))
    block_p = TILE // block_c
    grid = triton.cdiv(positions, block_p), triton.cdiv(channels, block_c)
    return (positions, channels, inner), grid, dict(BLOCK_P=block_p, BLOCK_C=block_c)


def _table(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Get the layers' addresses as a tensor on their device.

    A kernel takes them as arguments and writes them there, as a copy from the host cannot be captured in a CUDA graph.
    """
    addresses = [layer.data_ptr() for layer in layers]
    if not layers[0].is_cuda:
        return torch.tensor(addresses)
    table = torch.empty(
        triton.cdiv(len(addresses), ADDRESSES) * ADDRESSES, dtype=torch.int64, device=layers[0].device)
    for part in range(0, len(addresses), ADDRESSES):
        given = addresses[part:part + ADDRESSES]
        _table_kernel[(1,)](table[part:], *given, *given[:1] * (ADDRESSES - len(given)))
    return table


@triton.jit
def _table_kernel(table, a0, a1, a2, a3, a4, a5, a6, a7):
    tl.store(table, a0)
    tl.store(table + 1, a1)
    tl.store(table + 2, a2)
    tl.store(table + 3, a3)
    tl.store(table + 4, a4)
    tl.store(table + 5, a5)
    tl.store(table + 6, a6)
    tl.store(table + 7, a7)


@triton.jit
def _combine_kernel(
        table, weights, biases, first_out, num_layers, positions, channels, inner,
        BEGUN: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    result = tl.program_id(0)
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (p < positions) & (c < channels)
    offset = p // inner * inner * channels + c.to(tl.int64) * inner + p % inner
    pointer = tl.pointer_type(first_out.dtype.element_ty)
    total = tl.load(biases + result * channels + c, mask=c < channels, other=0.)
    total += tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    out = tl.multiple_of(tl.load(table + num_layers + result).to(pointer), 16)
    if BEGUN:
        total += tl.load(out + offset, mask=mask, other=0.).to(tl.float32)
    for i in range(num_layers):
        layer = tl.multiple_of(tl.load(table + i).to(pointer), 16)
        scale = tl.load(weights + (result * num_layers + i) * channels + c, mask=c < channels, other=0.)
        total += scale * tl.load(layer + offset, mask=mask, other=0.).to(tl.float32)
    if RELU:
        total = tl.where((total < 0) & (result == 0), 0., total)  # NaN stays NaN
    tl.store(out + offset, total.to(first_out.dtype.element_ty), mask=mask)


@triton.jit
def _combine_backward_kernel(
        table, weights, means, first_layer, dots, num_layers, num_grads, positions, channels, inner,
        BEGUN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    which = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = column[None, :]
    mask = (p < positions) & (c < channels)
    offset = p // inner * inner * channels + c.to(tl.int64) * inner + p % inner
    pointer = tl.pointer_type(first_layer.dtype.element_ty)
    layer = tl.multiple_of(tl.load(table + which).to(pointer), 16)
    out = tl.multiple_of(tl.load(table + num_layers + num_grads + which).to(pointer), 16)
    centred = tl.load(layer + offset, mask=mask, other=0.).to(tl.float32)
    centred -= tl.load(means + which * channels + c, mask=c < channels, other=0.)
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    if BEGUN:
        total += tl.load(out + offset, mask=mask, other=0.).to(tl.float32)
    for i in range(num_grads):
        grad = tl.multiple_of(tl.load(table + num_layers + i).to(pointer), 16)
        scale = tl.load(weights + (which * num_grads + i) * channels + c, mask=c < channels, other=0.)
        g = tl.load(grad + offset, mask=mask, other=0.).to(tl.float32)
        total += scale * g
        dot = tl.sum(g * centred, axis=0)
        tl.store(dots + ((tile * num_layers + which) * num_grads + i) * channels + column, dot, mask=column < channels)
    tl.store(out + offset, total.to(first_layer.dtype.element_ty), mask=mask)
