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

from .aggregation import CrossLayerDepthwiseConv2d
from .weights import CheckpointError, read_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    'BlockConnectivity', 'block_connectivity', 'draw_connectivity', 'names_model', 'read_state_dict', 'with_pruned',
]

FILE_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin')
DEAD = 1e-3  # of the largest weight of a convolution


@dataclass(frozen=True)
class BlockConnectivity:
    """The connections of a block.

    Attributes:
        block: Number of the block, the first is 1.
        norms: L2 norm of the weights of source h_i, in ``norms[k][i]`` for the convolution that gives x_{k+2}, which
            has k + 2 sources.
        dead_channels: Share of each convolution's weights, one for each source and channel, that are no more than a
            thousandth of its largest.
    """
    block: int
    norms: list[list[float]]
    dead_channels: list[float]

    @cached_property
    def last(self) -> list[float]:
        """Norm of each source layer in the convolution that has the most of them, of the largest (paper, Fig. 3)."""
        return [norm / (max(self.norms[-1]) or 1.) for norm in self.norms[-1]]

    def as_dict(self) -> dict[str, Any]:
        return {'block': self.block, 'last': self.last, 'norms': self.norms, 'dead_channels': self.dead_channels}


def block_connectivity(state_dict: dict[str, torch.Tensor]) -> list[BlockConnectivity]:
    """Measure the connections of each block.

    Args:
        state_dict: A DelugeNet's tensors by name.

    Returns:
        The blocks in their order.

    Raises:
        ValueError: If there are no cross-layer convolutions, their weights are not finite, or some have no weights for
            some of their sources.
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
            dead_channels=[float((w.abs() <= DEAD * w.abs().max()).float().mean()) for _, w in sorted(weights.items())],
        )
        for index, weights in sorted(blocks.items())
    ]


def read_state_dict(source: str) -> dict[str, torch.Tensor]:
    """Get the tensors of a checkpoint.

    Args:
        source: A file of train.py or in safetensors form, also the first of several parts; or what
            `timm.create_model` takes: a model, `model.tag`, `hf-hub:USER/REPO` or `local-dir:FOLDER`, with its
            pretrained weights.

    Returns:
        The tensors by name; of a run's checkpoint, the weights themselves, not their moving average. Connections that
        were pruned from a model are zeros.

    Raises:
        CheckpointError: If there is neither such a file nor such a model with weights, or the file is damaged.
    """
    if Path(source).is_file():
        return read_tensors(source, use_ema=False)
    if not names_model(source):
        if Path(source).suffix in FILE_SUFFIXES:
            raise CheckpointError(f'{source}: no such file')
        raise CheckpointError(
            f'{source}: neither a file nor a model of timm. Name a checkpoint file, a model such as delugenet146, '
            f'hf-hub:USER/REPO or local-dir:FOLDER')
    model = timm.create_model(source, pretrained=True)
    return with_pruned(model.state_dict(), model)


def names_model(source: str) -> bool:
    """Tell whether `timm.create_model` takes a name: of timm's registry, or with the prefix of another source."""
    return source.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')) or timm.is_model(source)


def with_pruned(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Give the cross-layer convolutions of a network the connections that were pruned: zeros.

    Args:
        tensors: The network's weights, or a tensor for each of some, by name.
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
            every = weight.new_zeros(*weight.shape[:2], module.num_layers, 1)
            every[:, :, module.sources] = weight
            whole[f'{name}.weight'] = every
    return whole


def draw_connectivity(blocks: list[BlockConnectivity], title: str) -> 'Figure':
    """Plot the last convolution's norms for each block (paper, Fig. 3), and below all connections of the block.

    Args:
        blocks: See `block_connectivity`.
        title: What they are of.

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
