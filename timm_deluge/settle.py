"""Re-estimate batch normalisation's running statistics on images preprocessed as in inference.

Training leaves averages over the last few batches of augmented images, often of another size. In so few images, a
rarely active channel may never have been active.
"""
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from .validate import create_validation_loader

__all__ = ['settle_batch_norm', 'settle_on_folder']

BATCH_SIZE = 250


@torch.no_grad()
def settle_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Set all running statistics to their mean over some batches, with the same weight for every image.

    Args:
        model: The model. Afterwards, each of its modules is in training or eval mode as before.
        batches: Images ``[N, in_chans, H, W]`` of all classes mixed, a hundred or more in nearly all batches.

    Raises:
        ValueError: If there are no batches. After this or any other error, the old statistics are restored.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    before = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers()}
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    num_images = 0
    try:
        for images in batches:
            num_images += len(images)
            for norm in norms:
                norm.momentum = len(images) / num_images
            model(images)
        if not num_images:
            raise ValueError('batches: expected images to estimate the running statistics on, got none')
    except BaseException:
        for buffer, value in before.items():
            buffer.copy_(value)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


def settle_on_folder(model: nn.Module, folder: Path, num_images: int, seed: int) -> None:
    """Set all running statistics to their mean over some of a folder's images, preprocessed as in inference.

    Args:
        model: A model of timm, on the CPU.
        folder: Training images; see `create_validation_loader`.
        num_images: Number of images, evenly from all classes.
        seed: Seed of the shuffle that mixes the classes.

    Raises:
        ValueError: See `create_validation_loader`.
    """
    batches: Any = create_validation_loader(model, folder, BATCH_SIZE, workers=1, num_images=num_images)
    Random(seed).shuffle(batches.dataset.reader.samples)
    settle_batch_norm(model.to(memory_format=torch.channels_last), (images for images, _ in batches))
