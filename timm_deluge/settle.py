"""Re-estimate batch normalisation's running statistics on images preprocessed as in inference ("precise BN").

Training leaves averages over the last few batches of augmented images, often of another size. In so few images, a
rarely active channel may never have been active.
"""
import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from .validate import create_validation_loader

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)  # raised where fvcore scripts its functions
    from fvcore.nn.precise_bn import update_bn_stats

__all__ = ['settle_on_folder']

BATCH_SIZE = 250


@torch.no_grad()
def settle_on_folder(model: nn.Module, folder: Path, num_images: int, seed: int) -> None:
    """Set all BatchNorm2d's running statistics to those of some of a folder's images, preprocessed as in inference.

    Args:
        model: A model of timm, on the CPU; in eval mode and channels_last afterwards.
        folder: Training images; see `create_validation_loader`.
        num_images: Number of images, evenly from all classes.
        seed: Seed of the shuffle that mixes the classes.

    Raises:
        ValueError: See `create_validation_loader`. After this or any other error, load the model again.
    """
    batches: Any = create_validation_loader(model, folder, BATCH_SIZE, workers=1, num_images=num_images)
    Random(seed).shuffle(batches.dataset.reader.samples)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.eval().to(memory_format=torch.channels_last)
    for norm in norms:
        norm.train()  # and nothing else, such as dropout
    update_bn_stats(model, (images for images, _ in batches), len(batches))
    for norm in norms:
        norm.running_var.clamp_(min=0)  # it is a difference of means, which rounding can make negative
    model.eval()
