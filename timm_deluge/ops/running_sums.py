"""A block's cross-layer sums, several from one pass over its layers."""
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise, starmap

import torch

from .implementation import choose_backend

__all__ = ['running_sums']

SUMS_PER_PASS = 4
FoldedWeights = Callable[[range, Sequence[int], bool], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]


def running_sums(
        layers: list[torch.Tensor],
        num_sums: int,
        folded_weights: FoldedWeights,
        outs: Sequence[torch.Tensor] | None = None,
        relus: Sequence[bool] | None = None,
        sources: Sequence[Collection[int]] | None = None,
) -> Iterator[torch.Tensor]:
    """Yield weighted sums, each over all layers that the caller has appended by then.

    If each sum were computed by itself, it would read all layers again: L²/2 reads in a block. Instead, one pass over
    the layers begins the next four sums, each of which later adds only the layers appended since. The groups of four
    are counted back from the last and longest sum; the first one to four sums, of few layers, are computed one by one.

    Args:
        layers: ``[N, C, H, W]`` each; the caller appends one between two sums.
        num_sums: Number of sums.
        folded_weights: ``folded_weights(sums, layers, begins)`` gives, for each of these sums, the weights of these
            layers, ``[number of layers, C]``, and their share of the bias, ``[C]``, with the layers' normalisation
            folded in. Sums and layers are given by index; ``begins`` tells whether these layers begin the sums.
        outs: For each sum, a tensor like a layer, which the sum may be written to.
        relus: For each sum, whether a ReLU follows; none does if None.
        sources: For each sum, the layers that enter it; all if None. Layers that enter no sum of a pass are not read.

    Yields:
        ``[N, C, H, W]``, without autograd history.
    """
    def entering(numbers: range, sums: Sequence[int]) -> Sequence[int]:
        return numbers if sources is None else [n for n in numbers if any(n in sources[i] for i in sums)]

    relus = relus or [False] * num_sums
    num_single = min(num_sums, num_sums % SUMS_PER_PASS or SUMS_PER_PASS)
    firsts = [*range(num_single), *range(num_single, num_sums + 1, SUMS_PER_PASS)]
    for group in starmap(range, pairwise(firsts)):
        combine = choose_backend(layers[0]).combine
        num_known = len(layers)
        known = entering(range(num_known), group)
        sums = combine([layers[n] for n in known], *folded_weights(group, known, True),
                       outs and outs[group.start:group.stop], relus[group.start])
        yield sums.pop(0)  # popped: what was handed out is not kept here
        for i in group[1:]:
            new = entering(range(num_known, len(layers)), [i])
            yield combine([layers[n] for n in new], *folded_weights(range(i, i + 1), new, False), [sums.pop(0)],
                          relus[i], begun=True)[0]
