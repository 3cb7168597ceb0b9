"""What each connection and each layer is worth: the loss without it, measured and not estimated.

The loss is measured once for each removed connection. The layers before a connection are computed once for all
connections, and only those after it again for each; batch normalisation is folded away where that changes nothing.
"""
import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

from .prune import Connection, find_cross_layers, remove_layers

__all__ = ['layer_removal_losses', 'removal_losses']


@torch.no_grad()
def removal_losses(
        model: Any,
        images: torch.Tensor,
        targets: torch.Tensor,
        keep_mean: bool = True,
) -> tuple[float, dict[Connection, float]]:
    """Measure the loss without each of a network's connections.

    Args:
        model: A DelugeNet in eval mode, not reparameterised; left as it is.
        images: ``[N, in_chans, H, W]``, all at once.
        targets: ``[N]``.
        keep_mean: Keep the connection's bias, which is what it contributes on average; otherwise remove it, too.

    Returns:
        The mean cross entropy of the network as it is, and without each connection.

    Raises:
        ValueError: If the model has no connections, or is in training mode.
    """
    if model.training:
        raise ValueError('the model is in training mode, in which a loss depends on the batch: call model.eval() first')
    find_cross_layers(model)  # raises if there are none
    fused: Any = reparameterize_model(model)

    def loss_of(x: torch.Tensor, number: int) -> float:
        logits = fused.forward_head(fused.norm(fused.stages[number:](x)))
        return _loss(logits, targets)

    losses: dict[Connection, float] = {}
    x = model.stem(images)
    loss = loss_of(x, 0)
    for number, block in enumerate(model.stages):
        inference_layers: Any = reparameterize_model(block.layers)
        layers = list(zip(inference_layers, block.norms, block.cross_layers))
        x = block.transition(x)
        outputs = [block.norm(x)]
        for k, (layer, norm, cross_layer) in enumerate(layers):
            outputs.append(norm(layer(x)))
            x = cross_layer(outputs)
            for row, source in enumerate(cross_layer.sources):
                contribution = outputs[source] * cross_layer.masked_weight()[:, :, row]
                if not keep_mean:
                    contribution += cross_layer.bias[:, :, row]
                result = _finish_block(layers[k + 1:], outputs, x - contribution)
                losses[Connection(f'stages.{number}.cross_layers.{k}', source)] = loss_of(result, number + 1)
    return loss, losses


def _finish_block(layers: list[tuple[Any, Any, Any]], outputs: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Run a block's remaining layers, each with its normalisation and cross-layer convolution, from another input x."""
    outputs = list(outputs)
    for layer, norm, cross_layer in layers:
        outputs.append(norm(layer(x)))
        x = cross_layer(outputs)
    return x


@torch.no_grad()
def layer_removal_losses(
        model: nn.Module,
        images: torch.Tensor,
        targets: torch.Tensor,
) -> tuple[float, dict[tuple[int, int], float]]:
    """Measure the loss without each of a network's composite layers, as `timm_deluge.remove_layers` removes them.

    All losses are with the statistics of these images: the running statistics do not fit a network without a layer.

    Args:
        model: A DelugeNet, not reparameterised; left as it is.
        images: ``[N, in_chans, H, W]``, all at once, a hundred or more.
        targets: ``[N]``.

    Returns:
        The mean cross entropy of the network as it is, and without each layer, keyed by the numbers of block and layer,
        both from 0. In a pruned network, a layer that is the only source of a later one cannot be removed and is left
        out.

    Raises:
        ValueError: If the model has no connections.
    """
    find_cross_layers(model)  # raises if there are none
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 0.
    depths = [len(stage.layers) for stage in model.stages]  # type: ignore
    losses = {}
    for block, depth in enumerate(depths):
        for layer in range(depth):
            removed = [{layer} if i == block else set() for i in range(len(depths))]
            try:
                shallower = remove_layers(model, removed)
            except ValueError:  # the only source of a later layer
                continue
            losses[block, layer] = _loss(shallower(images), targets)
    return _loss(model(images), targets), losses


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets).item()
