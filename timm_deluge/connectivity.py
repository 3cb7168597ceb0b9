"""What the cross-layer depthwise convolutions have learned to connect: the paper's Fig. 3, and every connection.

A connection is one source layer's weights, one per channel, in one cross-layer convolution. Its strength here is their
L2 norm. The source layers are batch-normalised, so that a weight says how much its source can move the result, and
norms of one convolution can be compared with each other.
"""
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from .aggregation import CrossLayerDepthwiseConv2d, spread
from .weights import CheckpointError, read_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    'BlockConnectivity', 'block_connectivity', 'draw_connectivity', 'names_model', 'read_state_dict', 'with_pruned',
]

FILE_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin')
SOURCES = ('hf-hub:', 'hf_hub:', 'local-dir:')  # of models for timm, beside its registry
DEAD = 1e-3  # relative to the largest weight of a convolution


@dataclass(frozen=True)
class BlockConnectivity:
    """The connections of a block.

    Attributes:
        block: Number of the block, counted from 1.
        norms: ``norms[k][i]`` is the L2 norm of the weights of source h_i in the convolution that gives x_{k+2}, which
            has k + 2 sources.
        dead_weights: For each convolution, the share of its weights, one per source and channel, whose magnitude is
            at most a thousandth of the largest.
    """
    block: int
    norms: list[list[float]]
    dead_weights: list[float]

    @cached_property
    def last(self) -> list[float]:
        """Norm of each source layer in the convolution with the most sources, relative to the largest norm (Fig. 3)."""
        return [norm / (max(self.norms[-1]) or 1.) for norm in self.norms[-1]]

    def as_dict(self) -> dict[str, Any]:
        return {'block': self.block, 'last': self.last, 'norms': self.norms, 'dead_weights': self.dead_weights}


def block_connectivity(state_dict: dict[str, torch.Tensor]) -> list[BlockConnectivity]:
    """Measure the connections of each block.

    Args:
        state_dict: A DelugeNet's tensors by name.

    Returns:
        The blocks in their order.

    Raises:
        ValueError: If there are no cross-layer convolutions, their weights are not finite, or a convolution lacks
            weights for some of the layers before it.
    """
    blocks: dict[int, dict[int, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        found = re.search(r'(?:^|\.)stages\.(\d+)\.cross_layers\.(\d+)\.weight$', name)
        if found and tensor.shape[1] == 1:  # depthwise; reparameterised ones are not
            blocks.setdefault(int(found[1]), {})[int(found[2])] = tensor.detach().float()[:, 0, :, 0]
    if not blocks:
        raise ValueError(
            'there are no cross-layer depthwise convolutions (stages.*.cross_layers.*.weight): this is no DelugeNet, '
            'or one with residual sums, or one that was reparameterised')
    if not all(tensor.isfinite().all() for tensors in blocks.values() for tensor in tensors.values()):
        raise ValueError('there are cross-layer weights that are not finite: the training has diverged')
    if any(tensor.shape[1] != 2 + i for tensors in blocks.values() for i, tensor in tensors.items()):
        raise ValueError(
            'a convolution has fewer sources than there are layers before it, and the file does not say which. For a '
            "pruned network, name its folder, local-dir:FOLDER; with aggregation='last' there is nothing to compare")
    return [
        BlockConnectivity(
            block=1 + index,
            norms=[weights[i].norm(dim=0).tolist() for i in sorted(weights)],
            dead_weights=[float((w.abs() <= DEAD * w.abs().max()).float().mean()) for _, w in sorted(weights.items())],
        )
        for index, weights in sorted(blocks.items())
    ]


def read_state_dict(source: str) -> dict[str, torch.Tensor]:
    """Get the tensors of a checkpoint.

    Args:
        source: A checkpoint file of train.py or a safetensors file, which may be the first of several parts; or a name
            that `timm.create_model` takes: a model, `model.tag`, `hf-hub:USER/REPO` or `local-dir:FOLDER`, whose
            pretrained weights are loaded.

    Returns:
        The tensors by name. For a checkpoint of train.py, these are the weights themselves, not their moving average.
        The pruned connections of a model have zeros.

    Raises:
        CheckpointError: If there is neither such a file nor such a model with weights, or the file is damaged.
    """
    if Path(source).is_file():
        return read_tensors(source, use_ema=False)
    if Path(source).suffix in FILE_SUFFIXES and not source.startswith(SOURCES):
        raise CheckpointError(f'{source}: no such file')
    if not names_model(source):
        raise CheckpointError(
            f'{source}: neither a file nor a model of timm. Name a checkpoint file, a model such as delugenet146, '
            f'hf-hub:USER/REPO or local-dir:FOLDER')
    model = timm.create_model(source, pretrained=True)
    return with_pruned(model.state_dict(), model)


def names_model(source: str) -> bool:
    """Tell whether `timm.create_model` takes a name: one of timm's registry, or one with another source's prefix."""
    return source.startswith(SOURCES) or timm.is_model(source)


def with_pruned(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Fill in the pruned connections of a network's cross-layer convolutions with zeros.

    Args:
        tensors: The network's weights by name, or tensors of the same shapes for some of them, such as gradients.
        model: A network of the same structure.

    Returns:
        The tensors by name.
    """
    whole = dict(tensors)
    for name, module in model.named_modules():
        if isinstance(module, CrossLayerDepthwiseConv2d) and f'{name}.weight' in tensors:
            weight = tensors[f'{name}.weight']
            if f'{name}.mask' in tensors:
                weight = weight * tensors[f'{name}.mask']
            whole[f'{name}.weight'] = spread(weight, module.sources, module.num_layers)
    return whole


def draw_connectivity(blocks: list[BlockConnectivity], title: str) -> 'Figure':
    """Plot for each block the norms of its last convolution (paper, Fig. 3), and all of its connections below.

    Args:
        blocks: See `block_connectivity`.
        title: Title of the figure, such as the name of the model.

    Returns:
        A matplotlib figure, nine inches wide.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need the package matplotlib: pip install matplotlib') from error
    figure = Figure(figsize=(9, 5), layout='constrained')
    axes = figure.subplots(2, len(blocks), squeeze=False, height_ratios=(1, 1.6))
    for block, last, matrix in zip(blocks, *axes):
        last.bar(range(len(block.last)), block.last, color='#0072B2')
        last.set(title=f'block {block.block}', ylim=(0, 1.05), xlim=(-0.6, len(block.last) - 0.4))
        triangle = [
            [norm / (max(norms) or 1.) for norm in norms] + [float('nan')] * (len(block.last) - len(norms))
            for norms in block.norms]
        image = matrix.imshow(triangle, cmap='viridis', vmin=0, vmax=1, aspect='auto', extent=(
            -0.5, len(block.last) - 0.5, len(block.norms) + 1.5, 1.5))
        matrix.set(xlabel='source layer i')
        for axis in last, matrix:
            axis.xaxis.get_major_locator().set_params(integer=True)
        matrix.yaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel('norm, of the largest')
    axes[1, 0].set_ylabel('input $x_l$')
    figure.colorbar(image, ax=axes[1].tolist(), label='norm, of the largest in the row')
    figure.suptitle(title)
    return figure
