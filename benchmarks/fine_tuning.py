"""Fine-tune a pruned network for one epoch with timm's train.py: how much accuracy it regains, as one JSON file.

    TIMM_SCRIPTS=path/to/pytorch-image-models python benchmarks/fine_tuning.py taylor 0.3 --data-dir cifar100

The network is pruned and trained with the recipe cifar100_fine_tuning. Its BatchNorm statistics are then re-estimated
on training images prepared as in inference, and it is tested on all test images. If `benchmarks/pruning.py` has
measured the same checkpoint, its figure is drawn again with all fine-tuning results of that checkpoint.
"""
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import pruning
import run
import timm
import torch
import typer
from timm.models import load_state_dict
from torch import nn

from timm_deluge import prune_connections
from timm_deluge.prune import save_pruned
from timm_deluge.recipes import recipe_path
from timm_deluge.settle import settle_on_folder
from timm_deluge.validate import accuracy, create_validation_loader, rank_targets

SETTLED_IMAGES = 5000


def fine_tune(pruned: nn.Module, data_dir: Path) -> None:
    """Fine-tune a network with train.py, and re-estimate its BatchNorm statistics."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch, 'pruned')
        save_pruned(pruned, folder)
        subprocess.run([
            sys.executable, Path(os.environ['TIMM_SCRIPTS'], 'train.py'),
            '--config', recipe_path('cifar100_fine_tuning'), '--data-dir', data_dir,
            '--model', f'local-dir:{folder}', '--pretrained', '--output', scratch, '--experiment', 'run'], check=True)
        pruned.load_state_dict(load_state_dict(str(Path(scratch, 'run', 'last.pth.tar'))))
    settle_on_folder(pruned, data_dir / 'train', SETTLED_IMAGES, seed=42)


def main(
        by: Annotated[str, typer.Argument(help='Criterion: norm, taylor or random.')],
        fraction: Annotated[float, typer.Argument(help='Share of all connections that goes.')],
        data_dir: Annotated[Path, typer.Option(help='CIFAR-100: train/ and validation/, a folder for each class.')],
        model_name: Annotated[str, typer.Option('--model', help='Model, or model.tag, of CIFAR-100.')] = 'delugenet146',
        num_images: Annotated[int, typer.Option(help='Training images for the first-order estimate.')] = 1000,
        dtype_name: Annotated[str, typer.Option('--dtype', help='In the test.')] = 'float32',
        threads: Annotated[int, typer.Option(help='Threads of all but the training.')] = 2,
) -> None:
    """Prune, train on, test."""
    if 'TIMM_SCRIPTS' not in os.environ:
        raise typer.BadParameter('set TIMM_SCRIPTS to a checkout of pytorch-image-models, which has train.py')
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    model = timm.create_model(model_name, pretrained=True).eval()
    checkpoint = f'{model.pretrained_cfg["architecture"]}.{model.pretrained_cfg["tag"]}'
    batches = create_validation_loader(model, data_dir / 'train', 100, 1, num_images)
    pruned = prune_connections(model, fraction, by, batches)
    fine_tune(pruned, data_dir)
    test = pruning.test_batches(pruned, data_dir / 'validation', dtype)
    row = {
        'checkpoint': checkpoint, 'by': by, 'fraction': fraction, 'dtype': dtype_name,
        **accuracy(rank_targets(pruning.inference_model(pruned, dtype), test)),
        'date': str(date.today()), 'machine': run.cpu_name(), 'torch': torch.__version__}
    pruning.FINE_TUNED.mkdir(exist_ok=True)
    (pruning.FINE_TUNED / f'{checkpoint}-{by}-{fraction}.json').write_text(json.dumps(row, indent=2) + '\n')
    results = json.loads(pruning.RESULTS.read_text()) if pruning.RESULTS.exists() else {}
    if results.get('checkpoint') == checkpoint:
        pruning.draw(results, pruning.RESULTS.with_suffix('.png'))


if __name__ == '__main__':
    typer.run(main)
