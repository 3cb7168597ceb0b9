"""Prune a DelugeNet: score its connections, and remove some of them, or whole layers.

A connection is one source layer's weights, one per channel, in one cross-layer convolution. It is removed as a whole.
Its bias, which is what it contributes on average, moves to a connection that stays: the sources are normalised, so a
removed one is in effect replaced by its mean. A layer whose output nothing uses any more is left out for inference by
`timm.utils.reparameterize_model`.

Single weights can be removed, too: masks hold them at zero. That makes a network sparse but not faster, because a
layer's channels lie side by side in memory and are read together. Only a connection that has lost all of its weights
saves time.

A composite layer is removed together with the cross-layer convolution after it: whatever took that convolution's
result then takes the layer's own input. The result has the structure of a shallower variant.
"""
import copy
import math
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models._hub import save_for_hf
from torch import nn

from .aggregation import CrossLayerDepthwiseConv2d, LastLayerScale, WeightedLayerSum
from .delugenet import CompositeLayer, DelugeBlock

__all__ = [
    'CRITERIA', 'Connection', 'connection_scores', 'find_blocks', 'find_cross_layers', 'prune_connections',
    'pruned_connections', 'record_model_args', 'remove_layers', 'save_pruned',
]

CRITERIA = ('norm', 'taylor', 'random')
UNITS = ('connection', 'channel')


class Connection(NamedTuple):
    """A connection.

    Attributes:
        consumer: Name of the cross-layer convolution, such as 'stages.1.cross_layers.3'.
        source: Number i of the source layer h_i in its block.
    """
    consumer: str
    source: int


def pruned_connections(model: nn.Module) -> list[list[list[int]]]:
    """Get the pruned connections, as the entrypoints' argument `pruned_connections` takes them.

    Args:
        model: A DelugeNet.

    Returns:
        For each block, and each of its cross-layer convolutions, the source layers that take no part.
    """
    return [
        [[i for i in range(conv.num_layers) if i not in conv.sources] for conv in block.cross_layers]
        for block in find_blocks(model).values()]


def connection_scores(
        model: nn.Module,
        by: str = 'norm',
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]] | None = None,
        seed: int = 0,
) -> dict[Connection, float]:
    """Estimate how much a network depends on each of its connections.

    Args:
        model: A DelugeNet, not reparameterised.
        by: One of

            * 'norm': L2 norm of the connection's weights, relative to the norm of all weights of its convolution, whose
              scale the batch normalisation that follows undoes.
            * 'taylor': first-order estimate of how much the loss changes, in absolute value, if the connection's output
              is replaced by its mean: ``|sum of weight * gradient|``.
            * 'random': a random number.
        batches: Images ``[N, in_chans, H, W]`` and targets ``[N]`` for 'taylor', on the model's device; the model's
            parameters and statistics stay as they are.
        seed: For 'random'.

    Returns:
        A score for each remaining connection, larger for those that the network depends on more.

    Raises:
        ValueError: If the model has no connections, there is no such criterion, or 'taylor' has no batches.
    """
    consumers = find_cross_layers(model)
    scores = _scores(model, consumers, 'connection', by, batches, seed)
    return {
        Connection(name, source): score
        for name, conv in consumers.items() for source, score in zip(conv.sources, scores[name][0].tolist())}


def find_blocks(model: nn.Module) -> dict[str, Any]:
    """Get a network's Deluge blocks by name; there are none in a reparameterised one, or one of residual sums."""
    return {name: block for name, block in model.named_modules() if isinstance(block, DelugeBlock)}


def find_cross_layers(model: nn.Module) -> dict[str, CrossLayerDepthwiseConv2d]:
    """Get a network's cross-layer convolutions by name.

    Raises:
        ValueError: If there are none.
    """
    consumers = {n: m for n, m in model.named_modules() if isinstance(m, CrossLayerDepthwiseConv2d)}
    if not consumers:
        raise ValueError('there are no cross-layer convolutions: this is no DelugeNet, or it was reparameterised')
    return consumers


def _scores(
        model: nn.Module,
        consumers: dict[str, CrossLayerDepthwiseConv2d],
        unit: str,
        by: str,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]] | None,
        seed: int,
) -> dict[str, torch.Tensor]:
    """Score each convolution's connections, ``[1, number of sources]``, or single weights, ``[C, …]``."""
    if by == 'norm':
        weights = {name: conv.masked_weight().detach().float()[:, 0, :, 0] for name, conv in consumers.items()}
        sizes = {n: w.abs() if unit == 'channel' else w.norm(dim=0, keepdim=True) for n, w in weights.items()}
        return {
            name: size / size.norm(dim=1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
            for name, size in sizes.items()}
    if by == 'taylor':
        changes = _taylor(model, consumers, batches)
        return {n: (c if unit == 'channel' else c.sum(0, keepdim=True)).abs() for n, c in changes.items()}
    if by == 'random':
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.rand(
                len(conv.weight) if unit == 'channel' else 1, len(conv.sources), generator=generator, device='cpu')
            for name, conv in consumers.items()}
    raise ValueError(f'by={by!r}: must be one of {", ".join(map(repr, CRITERIA))}')


@torch.inference_mode(False)
def _taylor(
        model: nn.Module,
        consumers: dict[str, CrossLayerDepthwiseConv2d],
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]] | None,
) -> dict[str, torch.Tensor]:
    if batches is None:
        raise ValueError("by='taylor' needs batches of images and targets, whose loss it estimates")
    model = copy.deepcopy(model).eval().requires_grad_()
    weights = [conv.weight for conv in find_cross_layers(model).values()]
    totals = [torch.zeros_like(weight) for weight in weights]
    images = None
    for images, targets in batches:
        with torch.enable_grad():
            logits = model(images)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, targets, reduction='sum')
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        for total, gradient in zip(totals, gradients):
            total += gradient
    if images is None:
        raise ValueError("by='taylor' needs batches of images and targets, there is none: was an iterator used before?")
    return {
        name: (weight.detach() * total).float()[:, 0, :, 0]
        for name, weight, total in zip(consumers, weights, totals)}


def prune_connections(
        model: nn.Module,
        fraction: float,
        by: str = 'norm',
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]] | None = None,
        seed: int = 0,
        unit: str = 'connection',
) -> nn.Module:
    """Remove a network's weakest connections.

    Args:
        model: A DelugeNet, not reparameterised; left as it is. It may have been pruned before.
        fraction: Share of the unpruned network's connections that are to be gone in total, 0 to 1; their number is
            rounded down.
        by: Criterion, see `connection_scores`.
        batches: See `connection_scores`.
        seed: See `connection_scores`.
        unit: 'connection', or 'channel' for single weights: the fraction is then a share of all weights, each of which
            is scored by itself, within its channel. Only a connection that has lost all of its weights saves time.

    Returns:
        The pruned network. Every cross-layer convolution, or every channel of it, keeps at least its strongest
        connection. The network trains, saves and exports like any other; ``timm.create_model`` creates the same
        structure with ``pruned_connections=timm_deluge.pruned_connections(model)``, and for channels also
        ``channel_masks=True``. In the reference implementation, layers whose output nothing uses any more get no
        gradients: there, DistributedDataParallel needs ``find_unused_parameters=True``.

    Raises:
        ValueError: See `connection_scores`. Also with ``aggregation='last'``; if the fraction is not from 0 to 1, is
            less than what is gone already, or would remove the last source of a cross-layer convolution; if there is no
            such unit; or if single weights are to be removed where all channels share one.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f'fraction={fraction}: must be from 0 to 1')
    if unit not in UNITS:
        raise ValueError(f'unit={unit!r}: must be one of {", ".join(map(repr, UNITS))}')
    consumers = find_cross_layers(model)
    if any(isinstance(conv, LastLayerScale) for conv in consumers.values()):
        raise ValueError("with aggregation='last' there are no connections across layers")
    if unit == 'channel' and any(isinstance(conv, WeightedLayerSum) for conv in consumers.values()):
        raise ValueError("unit='channel': with aggregation='scalar' all channels of a connection have the same weight")
    scores = {n: score.cpu() for n, score in _scores(model, consumers, unit, by, batches, seed).items()}
    there = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    if unit == 'channel':
        there.update({n: conv.mask[:, 0, :, 0].cpu() for n, conv in consumers.items() if conv.mask is not None})
    weak = {
        name: there[name].scatter(1, score.masked_fill(~there[name], -1).argmax(1, keepdim=True), False)
        for name, score in scores.items()}
    total = sum(conv.num_layers * len(scores[name]) for name, conv in consumers.items())
    num_gone, num_weak = total - sum(int(t.sum()) for t in there.values()), sum(int(w.sum()) for w in weak.values())
    number = math.floor(fraction * total + 1e-6) - num_gone
    what, owner = ('weights', 'channel') if unit == 'channel' else ('connections', 'cross-layer convolution')
    if number < 0:
        raise ValueError(f'fraction={fraction}: {num_gone} of {total} {what} are gone already')
    if number > num_weak:
        raise ValueError(
            f'fraction={fraction}: of {total} {what} at most {num_gone + num_weak} can go, since each {owner} keeps '
            f'one')
    order = torch.cat([scores[name][weak[name]] for name in consumers]).argsort(stable=True)
    goes = torch.zeros(num_weak, dtype=torch.bool, device='cpu')
    goes[order[:number]] = True
    pruned = copy.deepcopy(model)
    for (name, conv), gone in zip(consumers.items(), goes.split([int(weak[name].sum()) for name in consumers])):
        kept = there[name].masked_scatter(weak[name], ~gone)
        rows = kept.any(0).nonzero().flatten().tolist()
        smaller = _with_rows(conv, rows)
        if unit == 'channel':
            smaller.mask = kept[:, None, rows, None].to(conv.weight.device)
            smaller.weight.data *= smaller.mask
        parent, _, index = name.rpartition('.')
        pruned.get_submodule(parent)[int(index)] = smaller  # type: ignore[operator]
    record_model_args(pruned)
    return pruned


def remove_layers(model: nn.Module, layers: Sequence[Collection[int]]) -> nn.Module:
    """Remove composite layers, each with the cross-layer convolution after it.

    Args:
        model: A DelugeNet, not reparameterised; left as it is.
        layers: For each block, the numbers of the layers to remove, from 0. A layer that gives h_0, such as the first
            one of the CIFAR networks, has no number and cannot be removed.

    Returns:
        The shallower network. Its running statistics are still the old ones, which are wrong until it has trained.

    Raises:
        ValueError: If the model is not such a network, there is no such layer, or a cross-layer convolution would lose
            its last source.
    """
    shallower = copy.deepcopy(model)
    blocks = find_blocks(shallower)
    if not blocks:
        raise ValueError(f'expected a DelugeNet, neither reparameterised nor of residual sums, got a '
                         f'{type(model).__name__} without Deluge blocks')
    if len(blocks) != len(layers):
        raise ValueError(f'layers: expected one list for each of {len(blocks)} blocks, got {len(layers)}')
    for (name, block), removed in zip(blocks.items(), layers):
        depth = len(block.layers)
        missing = set(removed) - set(range(depth))
        if missing:
            raise ValueError(f'layers: {name}.layers has the numbers 0 to {depth - 1}, got {sorted(missing)}')
        kept = [i for i in range(depth) if i not in removed]
        numbers = {source: number for number, source in enumerate([0, *(i + 1 for i in kept)])}
        for i in kept:
            conv = block.cross_layers[i]
            rows = [row for row, source in enumerate(conv.sources) if source in numbers]
            if not rows:
                raise ValueError(f'layers: {name}.cross_layers.{i} would lose its last source')
            block.cross_layers[i] = _with_rows(conv, rows)
            block.cross_layers[i].sources = [numbers[conv.sources[row]] for row in rows]
            block.cross_layers[i].num_layers = sum(source <= i + 1 for source in numbers)
        for i in sorted(set(removed), reverse=True):
            for parts in (block.layers, block.norms, block.drop_paths, block.cross_layers):
                del parts[i]
    record_model_args(shallower)
    return shallower


def record_model_args(model: Any) -> None:
    """Record the arguments with which `timm.create_model` makes a network of this structure, for timm to save."""
    blocks = find_blocks(model).values()
    convs = [conv for block in blocks for conv in block.cross_layers]
    model._model_args = {
        **getattr(model, '_model_args', {}),
        'depths': [
            len(block.layers) + isinstance(block.transition, CompositeLayer)  # `depths` includes such a transition
            for block in blocks]}
    if not any(isinstance(conv, LastLayerScale) for conv in convs):
        model._model_args['pruned_connections'] = pruned_connections(model)
    if any(conv.mask is not None for conv in convs):
        model._model_args['channel_masks'] = True


@torch.no_grad()
def _with_rows(conv: CrossLayerDepthwiseConv2d, rows: list[int]) -> CrossLayerDepthwiseConv2d:
    """Get a cross-layer convolution with only some of its sources; the last one takes over the others' biases."""
    smaller = copy.deepcopy(conv)
    smaller.sources = [conv.sources[row] for row in rows]
    weight, bias = conv.weight[:, :, rows], conv.bias[:, :, rows]
    bias[:, :, -1] += conv.bias.sum(2) - bias.sum(2)
    smaller.weight = nn.Parameter(weight, conv.weight.requires_grad)
    smaller.bias = nn.Parameter(bias, conv.bias.requires_grad)
    if conv.mask is not None:
        smaller.mask = conv.mask[:, :, rows]
    return smaller


def save_pruned(model: nn.Module, folder: str | Path) -> None:
    """Save a pruned network so that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` recreates it.

    Uploaded to a repository of the Hugging Face Hub, the folder's files can be loaded as ``hf-hub:USER/REPO``.

    Args:
        model: The network, made by `timm.create_model` or `torch.hub.load` and pruned by `prune_connections` or
            `remove_layers`.
        folder: The folder to create; it must not exist yet.

    Raises:
        ValueError: If the model has no connections: a reparameterised one could not be recreated.
        FileExistsError: If the folder exists.
    """
    find_cross_layers(model)
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f'{folder} exists: name a folder that does not')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        whole: Any = Path(scratch, folder.name)
        contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        save_for_hf(contiguous, whole, safe_serialization=True)
        for path in whole.iterdir():
            path.chmod(0o644)  # safetensors lets only the owner read a file
        whole.rename(folder)
