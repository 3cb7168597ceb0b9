"""Classify images with a pretrained checkpoint."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import timm
import torch
from timm.data import create_transform, resolve_data_config

from .images import ImageError, read_image
from .weights import Checkpoint, find_checkpoint

__all__ = ['EXAMPLE_IMAGE', 'Prediction', 'class_labels', 'predict']

EXAMPLE_IMAGE = Path(__file__).parent / 'assets' / 'rocket.jpg'


@dataclass(frozen=True)
class Prediction:
    """What the model sees in one image.

    Attributes:
        path: The image's file.
        classes: Name and probability of the most probable classes, most probable first.
        error: Why the image could not be read; None if it was.
    """
    path: str
    classes: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None


def class_labels(checkpoint: Checkpoint) -> list[str]:
    """Get the readable names of a checkpoint's classes, in the order of its logits."""
    descriptions = checkpoint.class_descriptions or {}
    return [descriptions.get(name, name) for name in checkpoint.class_names]


def predict(
        paths: Iterable[Path],
        model_name: str,
        top: int = 5,
        batch_size: int = 32,
        device: str = 'cpu',
) -> Iterator[Prediction]:
    """Classify images, a batch at a time.

    Args:
        paths: The images' files.
        model_name: A model with a checkpoint, `<model>` or `<model>.<tag>`.
        top: Number of classes to report; all if the model has fewer.
        batch_size: Number of images classified at once.
        device: Where to run, such as 'cpu' or 'cuda'.

    Yields:
        One prediction per path, in the paths' order; that of an unreadable image has an error.

    Raises:
        CheckpointError: If the model has no such checkpoint or its file is damaged.
    """
    checkpoint = find_checkpoint(model_name)
    model = timm.create_model(checkpoint.name, pretrained=True).eval().to(device)
    transform = create_transform(**resolve_data_config(model=model))
    labels = class_labels(checkpoint)
    top = min(top, len(labels))
    paths = iter(paths)
    while batch := list(islice(paths, batch_size)):
        inputs: dict[Path, torch.Tensor] = {}
        errors: dict[Path, str] = {}
        for path in batch:
            try:
                inputs[path] = transform(read_image(path))
            except ImageError as error:
                errors[path] = str(error)
        classes = {}
        if inputs:
            with torch.inference_mode():
                probabilities = model(torch.stack(list(inputs.values())).to(device)).softmax(-1).cpu()
            for path, values, indices in zip(inputs, *probabilities.topk(top), strict=True):
                classes[path] = [(labels[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]
        for path in batch:
            yield Prediction(str(path), classes.get(path, []), errors.get(path))
