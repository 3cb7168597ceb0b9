"""Batch normalisation's running statistics, taken anew from images as they are in inference.

In training they are those of augmented images, often of another size, of the last few batches, in which a channel that
is rarely active may not have been.
"""
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ['settle_batch_norm']


@torch.no_grad()
def settle_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set all running statistics to their mean over some batches.

    Args:
        model: The model; in the mode it was in afterwards.
        batches: Images ``[N, in_chans, H, W]``, a hundred or more in each, of all classes mixed.
    """
    was_training = model.training
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None
    for images in batches:
        model(images)
    model.train(was_training)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
