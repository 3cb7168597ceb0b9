"""What frozen features are worth: nearest neighbours and a linear probe on another data set, by scikit-learn.

    python examples/frozen_features.py delugenet146 cifar10/train cifar10/validation --num-train 10000

Prints JSON: top-1 accuracies in percent. The folders hold one folder of images per class, and their parent has the name
of the data set.
"""
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform, resolve_data_config
from timm.utils import reparameterize_model
from torch.utils.data import DataLoader, Subset

import timm_deluge  # noqa: F401 registers the models
from timm_deluge.validate import list_classes, open_folder

NEIGHBOURS = 20


@torch.inference_mode()
def extract(model: torch.nn.Module, folder: Path, num_images: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Get the features before the classifier.

    Args:
        model: A timm model without classifier, in eval mode.
        folder: One folder of images per class.
        num_images: Take that many, evenly from all classes; all if None.

    Returns:
        Features ``[N, num_features]`` and classes ``[N]``.
    """
    dataset = open_folder(folder)
    dataset.transform = create_transform(**resolve_data_config(model=model))
    count = min(num_images or len(dataset), len(dataset))
    loader = DataLoader(Subset(dataset, [i * len(dataset) // count for i in range(count)]), batch_size=100)
    fast = reparameterize_model(model).to(memory_format=torch.channels_last)
    batches = [(fast(images.contiguous(memory_format=torch.channels_last)), targets)
               for images, targets in track(loader, str(folder), console=Console(stderr=True))]
    features, targets = map(torch.cat, zip(*batches, strict=True))
    return features.numpy(), targets.numpy()


def main(
        model: str,
        train_dir: Annotated[Path, typer.Argument(exists=True, file_okay=False, help='A folder for each class.')],
        test_dir: Annotated[Path, typer.Argument(exists=True, file_okay=False, help='The same folders.')],
        num_train: Annotated[int | None, typer.Option(min=NEIGHBOURS, help='Training images; all by default.')] = None,
        num_test: Annotated[int | None, typer.Option(min=1, help='Test images; all by default.')] = None,
) -> None:
    """Classify frozen features of MODEL on another data set."""
    try:
        classes = [set(list_classes(open_folder(data_dir))) for data_dir in (train_dir, test_dir)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    differing = sorted(classes[0] ^ classes[1])
    if differing:
        raise typer.BadParameter(
            f'{test_dir}: expected images of the classes of {train_dir}, only one has any in {differing[0]}')
    network = timm.create_model(model, pretrained=True, num_classes=0).eval()
    train, test = extract(network, train_dir, num_train), extract(network, test_dir, num_test)
    classifiers = {
        'nearest neighbours': KNeighborsClassifier(min(NEIGHBOURS, len(train[1])), metric='cosine', weights='distance'),
        'linear probe': make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)),
    }
    accuracies = {name: round(100 * classifier.fit(*train).score(*test), 2) for name, classifier in classifiers.items()}
    print(json.dumps({
        'model': model, 'data': test_dir.resolve().parent.name, 'train images': len(train[1]),
        'test images': len(test[1]), **accuracies}))


if __name__ == '__main__':
    typer.run(main)
