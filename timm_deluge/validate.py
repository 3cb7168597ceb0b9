"""Measure a checkpoint's accuracy on a labelled image folder."""
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, resolve_input_data_config
from torch import nn
from torch.utils.data import DataLoader

__all__ = [
    'BATCH_SIZE', 'accuracy', 'create_validation_loader', 'image_names', 'list_classes', 'open_folder', 'rank_targets']

BATCH_SIZE = 50  # larger tensors are returned to the system, which clears their pages each time


class _EveryImage(ImageDataset):
    """A folder's images, without skipping any: timm's class replaces an image that cannot be read by the next one."""

    def __getitem__(self, index: int) -> Any:
        path, target = self.reader.samples[index]
        try:
            with Image.open(path) as file:
                image: Any = file.convert(self.input_img_mode)
        except Exception as error:  # Pillow's decoders can raise anything on damaged data
            raise ValueError(f'{path}: cannot be read ({error})') from error
        return (image if self.transform is None else self.transform(image)), target


def open_folder(folder: Path, mode: str = 'RGB') -> ImageDataset:
    """Open a folder that holds one folder of images per class.

    Args:
        folder: The images.
        mode: Mode to convert the images to, 'RGB' or 'L'.

    Returns:
        timm's data set of ``(image, class index)``. It raises a ValueError where an image cannot be read.

    Raises:
        ValueError: If the folder is missing or without images, or an image does not lie in the folder of its class.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder}: no such folder; it should hold one folder of images per class')
    try:
        dataset = _EveryImage(str(folder), input_img_mode=mode)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f'{folder}: there are no images; it should hold one folder of images per class') from error
    stray = next((path for path, _ in dataset.reader.samples if Path(path).parent.parent != folder), None)
    if stray:
        raise ValueError(f'{folder}: {stray} is not in the folder of its class; name the folder that holds one folder '
                         f'of images per class, such as the validation folder of a data set')
    return dataset


def list_classes(dataset: ImageDataset) -> list[str]:
    """Names of an image folder's classes, in the order in which timm numbers them."""
    class_to_idx = dataset.reader.class_to_idx
    return sorted(class_to_idx, key=class_to_idx.__getitem__)


def create_validation_loader(
        model: nn.Module,
        folder: Path,
        batch_size: int,
        workers: int,
        num_images: int | None = None,
) -> DataLoader[Any]:
    """Batches of a folder that holds one folder of images per class.

    Args:
        model: A model of timm. Its pretrained configuration says how to prepare the images, and names the classes,
            unless it names more or fewer than the model has.
        folder: The images.
        batch_size: Number of images in a batch.
        workers: Number of loader processes.
        num_images: Take that many images, evenly spaced in the order of the classes; all if None.

    Returns:
        timm's loader of ``(images, targets)`` on the CPU, every image once. It raises a ValueError where one cannot be
        read.

    Raises:
        ValueError: If the folder is missing, its classes are not the model's, or an image does not lie in the folder of
            its class.
    """
    config = resolve_input_data_config(model)
    dataset = open_folder(folder, 'RGB' if config['input_size'][0] == 3 else 'L')
    pretrained_cfg: Any = model.pretrained_cfg
    found, expected = list_classes(dataset), pretrained_cfg.get('label_names')
    if expected is not None and len(expected) != getattr(model, 'num_classes', len(expected)):
        expected = None  # they are those of a checkpoint, whose classifier was replaced
    if expected is None and len(found) != model.num_classes:
        raise ValueError(f'{folder}: it has {len(found)} class folders, and the model {model.num_classes} classes')
    if expected is not None and found != list(expected):
        differing = sorted(set(found) ^ set(expected))
        if not differing:
            ours, its = next(pair for pair in zip_longest(found, expected) if pair[0] != pair[1])
            raise ValueError(f'{folder}: the model numbers its classes in another order than timm does, and has {its} '
                             f'in the place of {ours}')
        raise ValueError(f'{folder}: its {len(found)} class folders are not the {len(expected)} classes that the model '
                         f'knows; {len(differing)} are only on one side, such as {differing[0]}')
    if num_images is not None and num_images < len(dataset):
        samples = dataset.reader.samples
        dataset.reader.samples = [samples[i * len(samples) // num_images] for i in range(num_images)]
    return create_loader(
        dataset, batch_size=batch_size, num_workers=workers, use_prefetcher=False, persistent_workers=False, **config)


def image_names(loader: DataLoader[Any]) -> list[str]:
    """Paths of a validation loader's images in its folder, in the loader's order."""
    dataset: Any = loader.dataset
    return [Path(name).as_posix() for name in dataset.filenames()]


@torch.inference_mode()
def rank_targets(model: nn.Module, batches: Iterable[Any], device: str = 'cpu') -> torch.Tensor:
    """Count the classes that the model finds more probable than the right one, up to five.

    Args:
        model: The model, in eval mode, on `device`.
        batches: Pairs of images ``[N, C, H, W]`` and class indices ``[N]``.
        device: Where to run, such as 'cpu' or 'cuda'.

    Returns:
        For each image the right class's rank among the five most probable ones, from 0, or 5 if it is not among them.
    """
    ranks = []
    for images, targets in batches:
        logits = model(images.to(device))
        ranked = logits.topk(min(5, logits.shape[-1])).indices
        hits = ranked.eq(targets.to(device)[:, None])
        ranks.append(torch.where(hits.any(1), hits.int().argmax(1), 5).cpu())
    return torch.cat(ranks)


def accuracy(ranks: torch.Tensor, names: Sequence[str] = (), inexact: Collection[str] = ()) -> dict[str, Any]:
    """Count right answers.

    Args:
        ranks: Ranks of the right classes, see `rank_targets`.
        names: Names of the images.
        inexact: Names of images that are not what the data set's authors published.

    Returns:
        `top1` and `top5`, the percentages of images whose right class is the most probable one, or among the five most
        probable; `num_images`; and, if there are inexact images and `names` has all of them, `exact`, the same without
        these.
    """
    figures: dict[str, Any] = {
        'top1': round(100 * (ranks < 1).double().mean().item(), 2),
        'top5': round(100 * (ranks < 5).double().mean().item(), 2),
        'num_images': len(ranks),
    }
    if inexact and set(inexact) <= set(names):
        figures['exact'] = accuracy(ranks[torch.tensor([name not in inexact for name in names])])
    return figures
