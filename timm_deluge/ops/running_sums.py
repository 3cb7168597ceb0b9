"""A block's cross-layer sums, several from one pass over its layers."""
from collections.abc import Callable, Iterator, Sequence

import torch

from .implementation import kernels

__all__ = ['running_sums']

SUMS_PER_PASS = 4


def running_sums(
        layers: list[torch.Tensor],
        num_sums: int,
        terms: Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]],
        outs: Sequence[torch.Tensor] | None = None,
        relu: bool = False,
) -> Iterator[torch.Tensor]:
    """Sum over all layers there are, each time one more is there.

    Every sum by itself would read all layers again, L²/2 of them in a block. Instead, a pass over the layers begins
    the next sums, too, each of which later adds only the layers that were not there yet.

    Args:
        layers: ``[N, C, H, W]`` each; the caller appends one between two sums.
        num_sums: Number of sums.
        terms: Gives the weights ``[stop - start, C, 1, 1]`` and their share of the bias ``[C, 1, 1]`` with which
            ``layers[start:stop]`` enter sum i: ``terms(i, start, stop)``.
        outs: Memory that the sums may take, one tensor like a layer for each.
        relu: Apply a ReLU to every sum.

    Yields:
        ``[N, C, H, W]``, without autograd history.
    """
    for first in range(0, num_sums, SUMS_PER_PASS):
        combine = kernels(layers[0]).combine
        num_known = len(layers)
        group = range(first, min(first + SUMS_PER_PASS, num_sums))
        weights, biases = zip(*(terms(i, 0, num_known) for i in group))
        sums = combine(layers, weights, biases, outs and outs[first:group.stop], relu)
        yield sums[0]
        for i, begun in zip(group[1:], sums[1:]):
            weight, bias = terms(i, num_known, len(layers))
            weight = torch.cat([torch.ones_like(weight[:1]), weight])
            yield combine([begun, *layers[num_known:]], [weight], [bias], [begun], relu)[0]
