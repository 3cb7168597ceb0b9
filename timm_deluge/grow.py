"""Make a trained network deeper or wider, so that it computes the same until it is trained further.

`insert_layers` undoes `timm_deluge.remove_layers`: at first all weights for an additional layer's output are zero, and
the cross-layer convolution after it gives that layer's own input again. `widen_layers` replaces a channel by several
copies; each layer that takes them splits its weight for that channel among the copies.
"""
import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from .aggregation import CrossLayerDepthwiseConv2d, spread
from .delugenet import DelugeNet
from .prune import find_blocks, record_model_args
from .reparameterize import InferenceConv2d

__all__ = ['insert_layers', 'widen_layers']


def insert_layers(model: nn.Module, deeper: nn.Module, layers: Sequence[Collection[int]]) -> nn.Module:
    """Insert composite layers of another network, each with a cross-layer convolution after it.

    Args:
        model: A DelugeNet, not reparameterised; left as it is.
        deeper: A DelugeNet of the same widths and `output_stride` that has the wanted number of layers, and from which
            the additional ones are copied; left as it is.
        layers: For each block, the numbers of the additional layers in the deeper network, 1 or larger: layer 0 is the
            only one that takes h_0 before it is normalised.

    Returns:
        The deeper network. Its outputs are those of `model`, also in training, except for random operations such as
        dropout. The additional layers keep their stochastic depth rates. They begin to learn once the weights for
        their outputs, zero at first, have changed.

    Raises:
        ValueError: If the networks or the layers do not fit together, or a cross-layer convolution does not take all
            layers before it.
    """
    grown = copy.deepcopy(model)
    blocks, donors = find_blocks(grown).values(), find_blocks(deeper).values()
    if not blocks or not len(blocks) == len(donors) == len(layers):
        raise ValueError(
            f'layers: expected one list for each block of two DelugeNets, got {len(layers)} lists for {len(blocks)} '
            f'blocks and {len(donors)} of the deeper network; a reparameterised network has no such blocks')
    for i, (block, donor, additional) in enumerate(zip(blocks, donors, layers)):
        depth, additional = len(donor.layers), set(additional)
        if depth < len(block.layers):
            raise ValueError(f'block {i} has {len(block.layers)} layers, but {depth} in the deeper network')
        if not additional <= set(range(1, depth)) or len(block.layers) + len(additional) != depth:
            raise ValueError(
                f'layers: block {i} has {len(block.layers)} layers, and {depth} in the deeper network: expected '
                f'{depth - len(block.layers)} numbers from 1 to {depth - 1}, got {sorted(additional)}')
        if block.norm.num_features != donor.norm.num_features:
            raise ValueError(
                f'block {i} has {block.norm.num_features} channels, in the deeper network {donor.norm.num_features}')
        if len({layer.conv2.dilation for layer in (*block.layers, *donor.layers)}) > 1:
            raise ValueError(f'block {i} has another dilation in the deeper network: give both the same output_stride')
        if any(conv.mask is not None or len(conv.sources) != conv.num_layers for conv in block.cross_layers):
            raise ValueError(
                f'block {i} has cross-layer convolutions that do not take all layers: insert layers before pruning, '
                f"and not with aggregation='last'")
        for number in sorted(additional):
            for name in ('layers', 'norms', 'drop_paths'):
                part = copy.deepcopy(getattr(donor, name)[number]).to(block.cross_layers[0].weight)
                getattr(block, name).insert(number, part.train(block.training))
            block.cross_layers.insert(number, copy.deepcopy(block.cross_layers[number - 1]))
        sources = [0, *(number + 1 for number in range(depth) if number not in additional)]
        for number, conv in enumerate(block.cross_layers):
            _listen_to(conv, sources[:conv.num_layers], number + 2)
    record_model_args(grown)
    return grown


@torch.no_grad()
def _listen_to(conv: CrossLayerDepthwiseConv2d, sources: list[int], num_layers: int) -> None:
    """Give a cross-layer convolution more sources: `sources` numbers its present ones, all others weigh zero."""
    for name, parameter in list(conv.named_parameters()):
        setattr(conv, name, nn.Parameter(spread(parameter, sources, num_layers), parameter.requires_grad))
    conv.sources, conv.num_layers = list(range(num_layers)), num_layers


@torch.no_grad()
def widen_layers(model: DelugeNet, wider: DelugeNet) -> DelugeNet:
    """Give the layers of a trained network more channels, copies of their present ones.

    Net2WiderNet (Chen, Goodfellow and Shlens, 2016: https://arxiv.org/abs/1511.05641, section 2.2).

    Args:
        model: A DelugeNet, of any aggregation, not reparameterised; left as it is.
        wider: A DelugeNet that differs only in its widths, none of them smaller; left as it is.

    Returns:
        A copy of the wider network whose outputs are those of `model`, also in training, except for random operations
        such as dropout. The copies of a channel get different shares of each filter's weight, drawn at random, so that
        they learn different things.

    Raises:
        ValueError: If the networks are not DelugeNets, were reparameterised, have a global pooling that gives each
            channel more than once, differ in more than their widths, or the wider network has a smaller width.
    """
    for network in model, wider:
        if not isinstance(network, DelugeNet):
            raise ValueError(f'expected two DelugeNets, got a {type(network).__name__}')
        if any(isinstance(module, InferenceConv2d) for module in network.modules()):
            raise ValueError('expected two networks for training, got one that was reparameterised')
        if network.head.global_pool.feat_mult() != 1:
            raise ValueError(
                f'expected a global pooling that gives each channel once, got {network.head.global_pool.pool_type!r}')
    for option in 'num_classes', 'in_chans':
        if getattr(model, option) != getattr(wider, option):
            raise ValueError(
                f'wider: expected {option}={getattr(model, option)}, as in the model, got {getattr(wider, option)}')
    tensors, sizes = model.state_dict(), {name: tensor.shape for name, tensor in wider.state_dict().items()}
    differing = sorted(tensors.keys() ^ sizes.keys())
    if differing:
        raise ValueError(f'wider: expected a network that differs in its widths alone; only one has {differing[0]}')
    for name, tensor in tensors.items():
        size = sizes[name]
        if tensor.dim() != len(size) or tensor.shape[2:] != size[2:] or any(a > b for a, b in zip(tensor.shape, size)):
            raise ValueError(
                f'wider: {name} is {list(size)}; expected as many channels as in {list(tensor.shape)} or more, and '
                f'the rest alike')
        tensors[name] = _with_copies(tensor, size)
    if _wiring(model) != _wiring(wider):
        raise ValueError(
            'wider: expected a network that differs in its widths alone; a stride, a dilation, the pooling, or '
            'the kind or the sources of a cross-layer convolution differ')
    grown: Any = copy.deepcopy(wider).to(next(model.parameters())).train(model.training)
    grown.load_state_dict(tensors)
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    if cfg and hasattr(grown, 'pretrained_cfg'):  # the same classes and input
        source = 'tag', 'source', 'file', 'url', 'hf_hub_id', 'hf_hub_filename'
        grown.pretrained_cfg = grown.default_cfg = {
            **{name: value for name, value in cfg.items() if name not in source},
            'architecture': grown.pretrained_cfg['architecture']}
    return grown


def _wiring(network: DelugeNet) -> list[Any]:
    """Get what a network's function depends on besides its tensors."""
    return [network.head.global_pool.pool_type, *(
        (type(module), module.sources) if isinstance(module, CrossLayerDepthwiseConv2d)
        else (module.stride, module.dilation)
        for module in network.modules() if isinstance(module, (CrossLayerDepthwiseConv2d, nn.Conv2d)))]


def _with_copies(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Repeat a tensor's channels up to a size; in dimension 1, which is summed over, copies share the weight."""
    for dim in range(min(2, tensor.dim())):
        channels = tensor.shape[dim]
        if size[dim] == channels:
            continue
        source = torch.arange(size[dim], device=tensor.device) % channels
        total_size = tensor.shape
        tensor = tensor.index_select(dim, source)
        if dim == 1:
            share = 1 - torch.rand_like(tensor)  # never 0
            total = share.new_zeros(total_size).index_add_(1, source, share)
            tensor = tensor * share / total.index_select(1, source)
    return tensor
