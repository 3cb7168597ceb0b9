"""Train by timm's train.py with other rules for cross-layer weights and biases: how they learn, and from which values.

    TIMM_SCRIPTS=path/to/pytorch-image-models python benchmarks/cross_layer_weights.py --lr-scale 0.1 \
        --config $(timm-deluge recipe cifar100_connections) --data-dir cifar100 --epochs 1

Options that this script does not know are passed to train.py.
"""
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import timm.optim
import torch
import typer
from timm.optim import muon
from torch import nn

import timm_deluge.run
from timm_deluge.aggregation import CrossLayerDepthwiseConv2d


def parameter_groups(
        model: nn.Module, weight_decay: float, lr_scale: float, cross_layer_decay: float | None,
) -> Iterator[dict[str, Any]]:
    """Split each of timm's groups of parameters into those of cross-layer convolutions and all others."""
    cross_layer = {id(p) for m in model.modules() if isinstance(m, CrossLayerDepthwiseConv2d) for p in m.parameters()}
    for group in timm.optim.param_groups_weight_decay(model, weight_decay):
        for chosen in (False, True):
            parameters = [p for p in group['params'] if (id(p) in cross_layer) == chosen]
            found = {**group, 'params': parameters, 'lr_scale': lr_scale if chosen else 1.}
            if chosen and cross_layer_decay is not None:
                found['weight_decay'] = cross_layer_decay
            yield found


def start_from_latest(self: CrossLayerDepthwiseConv2d) -> None:
    """Start from the latest source layer alone; replaces `reset_parameters`, which starts from the mean."""
    nn.init.zeros_(self.weight)
    nn.init.ones_(self.weight[:, :, -1:])
    nn.init.zeros_(self.bias)


def main(
        context: typer.Context,
        lr_scale: Annotated[float, typer.Option(help='Multiplies their learning rate.')] = 1.,
        weight_decay: Annotated[float | None, typer.Option(help="Of both alone; the recipe's by default.")] = None,
        start: Annotated[Literal['mean', 'latest'], typer.Option(
            help='From the mean of the source layers, or from the latest one alone.')] = 'mean',
        optimizer: Annotated[Literal['fallback', 'muon'], typer.Option(
            help="How timm's Muon updates them: by its fallback, as vectors, or orthogonalised.")] = 'fallback',
) -> None:
    """Run train.py."""
    if 'TIMM_SCRIPTS' not in os.environ:
        raise typer.BadParameter('set TIMM_SCRIPTS to a checkout of pytorch-image-models, which has train.py')
    create_optimizer = timm.optim.create_optimizer_v2

    def create(model: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
        for name, default in (('filter_bias_and_bn', True), ('layer_decay', None), ('fallback_list', ())):
            if kwargs.get(name, default) != default:
                raise typer.BadParameter(f'{name}: {kwargs[name]} would have no effect on the groups made here')
        groups = list(parameter_groups(model, kwargs['weight_decay'], lr_scale, weight_decay))
        return create_optimizer(model, **kwargs, param_group_fn=lambda _: groups)

    timm.optim.create_optimizer_v2 = create
    if start == 'latest':
        CrossLayerDepthwiseConv2d.reset_parameters = start_from_latest
    if optimizer == 'muon':
        is_suitable = muon._is_suitable_for_muon
        muon._is_suitable_for_muon = lambda p, **kwargs: is_suitable(
            p.flatten(1) if p.ndim == 4 and p.shape[1] == p.shape[3] == 1 else p, **kwargs)
    sys.argv = [sys.argv[0], str(Path(os.environ['TIMM_SCRIPTS'], 'train.py')), *context.args]
    timm_deluge.run.main()


if __name__ == '__main__':
    app = typer.Typer(add_completion=False)
    app.command(context_settings={'allow_extra_args': True, 'ignore_unknown_options': True})(main)
    app()
