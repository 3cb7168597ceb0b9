"""How the connections develop while a network trains: norms of weights and of gradients, epoch by epoch.

train.py writes a checkpoint after each epoch, and keeps the best ones and the last, with the optimizer's state. This
state has, for each weight, a mean of its gradients over the latest steps: the momentum.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch import nn

from .connectivity import BlockConnectivity, block_connectivity, with_pruned
from .weights import CheckpointError, read_training_state

__all__ = ['EpochConnectivity', 'training_connectivity']

MOMENTA = ('momentum_buffer', 'exp_avg')  # names of the momentum in the optimizers' states


@dataclass(frozen=True)
class EpochConnectivity:
    """The connections after an epoch.

    Attributes:
        epoch: Number of the epoch, counted from 0 as in train.py.
        weights: Norms of the weights, for each block.
        gradients: Norms of the weights' mean gradients, for each block; None if the optimizer has no momentum, or its
            parameter groups are not those that timm makes. With SGD, the gradients include the weight decay; RMSprop,
            LARS, Adafactor and NovoGrad scale them before they average. A weight without gradients has zeros.
    """
    epoch: int
    weights: list[BlockConnectivity]
    gradients: list[BlockConnectivity] | None

    def as_dict(self) -> dict[str, Any]:
        return {
            'epoch': self.epoch,
            'weights': [block.as_dict() for block in self.weights],
            'gradients': self.gradients and [block.as_dict() for block in self.gradients],
        }


def training_connectivity(run_dir: Path) -> list[EpochConnectivity]:
    """Measure the connections of each checkpoint that a run of train.py has left.

    Args:
        run_dir: The run's folder. train.py keeps the `--checkpoint-hist` best checkpoints and the last one. If
            avg_checkpoints.py has overwritten the last one with an average, it is skipped.

    Returns:
        The epochs in their order.

    Raises:
        CheckpointError: If there are no checkpoints, or one is not train.py's.
        ValueError: If the network has no cross-layer convolutions.
    """
    paths = [*run_dir.glob('last.pth.tar'), *run_dir.glob('checkpoint-*.pth.tar')]
    if not paths:
        raise CheckpointError(
            f'{run_dir}: there is no last.pth.tar and no checkpoint-*.pth.tar; name the folder of a run of train.py, '
            f'or, of a saved model, local-dir:{run_dir}')
    epochs = {}
    for path in paths:
        checkpoint = read_training_state(path)
        if missing := {'args', 'epoch', 'optimizer', 'state_dict'} - checkpoint.keys():
            if path.name == 'last.pth.tar' and len(paths) > 1:  # averaged by avg_checkpoints.py: belongs to no epoch
                continue
            raise CheckpointError(f'{path}: this is no checkpoint of train.py, it lacks {", ".join(sorted(missing))}')
        try:
            model = _untrained(checkpoint['args'])
            gradients = _mean_gradients(checkpoint, model)
        except AttributeError as error:
            raise CheckpointError(f'{path}: its args are not the options of train.py: {error}') from error
        epochs[checkpoint['epoch']] = EpochConnectivity(
            epoch=checkpoint['epoch'],
            weights=block_connectivity(with_pruned(checkpoint['state_dict'], model)),
            gradients=block_connectivity(with_pruned(gradients, model)) if gradients else None,
        )
    return [epochs[number] for number in sorted(epochs)]


def _untrained(args: Any) -> nn.Module:
    """Make a run's network, on the meta device, also if the checkpoint that it started from is gone."""
    name = args.model if ':' in args.model else args.model.partition('.')[0]
    return timm.create_model(
        name, num_classes=args.num_classes, in_chans=args.in_chans or (args.input_size or [3])[0],
        device=torch.device('meta'), **args.model_kwargs)


def _mean_gradients(checkpoint: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Get the momenta by parameter name: the optimizer numbers the parameters, in the order of its groups."""
    args = checkpoint['args']
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer: Any = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    groups = [group['params'] for group in optimizer.param_groups]
    saved_groups = [group['params'] for group in checkpoint['optimizer']['param_groups']]
    if [len(group) for group in groups] != [len(saved) for saved in saved_groups]:
        return {}  # the run had its own groups: which parameter has which number is not known
    gradients = {}
    for parameters, saved in zip(groups, checkpoint['optimizer']['param_groups']):
        share = 1 - saved['momentum'] if saved.get('dampening') == 0 else 1  # SGD keeps a sum, the others a mean
        for parameter, number in zip(parameters, saved['params']):
            state = checkpoint['optimizer']['state'].get(number, {})
            gradients.update({names[id(parameter)]: share * state[key] for key in MOMENTA if key in state})
    if not gradients:
        return {}
    return {name: gradients.get(name, torch.zeros(parameter.shape)) for name, parameter in model.named_parameters()}
