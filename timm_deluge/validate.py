"""Measure a checkpoint's accuracy on a labelled image folder."""
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_dataset, create_loader, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader

__all__ = ['Accuracy', 'create_validation_loader', 'list_classes', 'validate']


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a data set.

    Attributes:
        top1: Images whose most probable class is the right one, in percent.
        top5: Images whose five most probable classes contain the right one, in percent.
        num_images: Number of images.
    """
    top1: float
    top5: float
    num_images: int


def list_classes(dataset: ImageDataset) -> list[str]:
    """Names of an image folder's classes, in the order in which timm numbers them."""
    class_to_idx = dataset.reader.class_to_idx
    return sorted(class_to_idx, key=class_to_idx.__getitem__)


def create_validation_loader(model: nn.Module, folder: Path, batch_size: int, workers: int) -> DataLoader:
    """Batches of a folder that holds one folder of images per class.

    Args:
        model: A model of timm, whose pretrained configuration names the classes and says how to prepare the images.
        folder: The images.
        batch_size: Number of images in a batch.
        workers: Number of loader processes.

    Returns:
        timm's loader of ``(images, targets)`` on the CPU, every image once.

    Raises:
        ValueError: If the folder is missing or its classes are not the model's.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder}: no such folder; it should hold one folder of images per class')
    config = resolve_data_config(model=model)
    dataset = create_dataset('', root=str(folder))
    pretrained_cfg: Any = model.pretrained_cfg
    found, expected = list_classes(dataset), list(pretrained_cfg['label_names'])
    if found != expected:
        differing = sorted(set(found) ^ set(expected))
        raise ValueError(f'{folder}: its {len(found)} class folders are not the {len(expected)} classes that the model '
                         f'knows; {len(differing)} are only on one side, such as {differing[0]}')
    return create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=False,
    )


@torch.inference_mode()
def validate(model: nn.Module, batches: Iterable, device: str = 'cpu') -> Accuracy:
    """Count right answers.

    Args:
        model: The model, in eval mode, on `device`.
        batches: Pairs of images ``[N, C, H, W]`` and class indices ``[N]``.
        device: Where to run, such as 'cpu' or 'cuda'.

    Returns:
        The accuracy.
    """
    num_images = top1 = top5 = 0
    for images, targets in batches:
        logits = model(images.to(device))
        ranked = logits.topk(min(5, logits.shape[-1])).indices
        hits = ranked.eq(targets.to(device)[:, None])
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.any(1).sum())
        num_images += len(targets)
    return Accuracy(100 * top1 / num_images, 100 * top5 / num_images, num_images)
