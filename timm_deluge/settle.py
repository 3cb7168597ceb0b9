"""Re-estimate batch normalisation's running statistics on images preprocessed as in inference ("precise BN").

Training leaves averages over the last few batches of augmented images, often of another size. In so few images, a
rarely active channel may never have been active.
"""
from pathlib import Path
from random import Random
from typing import Any

import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import nn

from .validate import create_validation_loader

__all__ = ['settle_on_folder']

BATCH_SIZE = 250


@torch.no_grad()
def settle_on_folder(model: nn.Module, folder: Path, num_images: int, seed: int) -> None:
    """Set all running statistics to those of some of a folder's images, preprocessed as in inference.

    Args:
        model: A model of timm, on the CPU; in eval mode and channels_last afterwards.
        folder: Training images; see `create_validation_loader`.
        num_images: Number of images, evenly from all classes.
        seed: Seed of the shuffle that mixes the classes.

    Raises:
        ValueError: See `create_validation_loader`.
    """
    batches: Any = create_validation_loader(model, folder, BATCH_SIZE, workers=1, num_images=num_images)
    Random(seed).shuffle(batches.dataset.reader.samples)
    model.eval().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()  # these alone: update_bn_stats leaves out those in eval mode
    update_bn_stats(model, (images for images, _ in batches), len(batches))
    model.eval()
