"""Measure what a network's connections are worth: one JSON file and one figure.

    pip install -e '.[benchmark]'
    python benchmarks/pruning.py --train-dir cifar100/train --test-dir cifar100/validation

Three things are measured: how well the norm of a connection's weights, and a first-order estimate, rank connections by
how much the loss on training images changes without each; the accuracy on all test images without the weakest
connections, before any fine-tuning; and the inference time that is left, a ratio of medians of interleaved rounds.
"""
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import run
import timm
import torch
import typer
from rich.progress import track
from timm.utils import reparameterize_model
from torch import nn

from timm_deluge import connection_scores, prune_connections
from timm_deluge.importance import removal_losses
from timm_deluge.prune import CRITERIA, Connection
from timm_deluge.validate import accuracy, create_validation_loader, rank_targets

FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
BATCHES = (1, 64)
FINE_TUNED = run.FOLDER / 'fine_tuning'
RESULTS = run.FOLDER / 'pruning.json'


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Get Spearman's rank correlation: how alike two lists order the same things, -1 to 1."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def measure_importance(
        model: nn.Module, images: torch.Tensor, targets: torch.Tensor, scores: dict[str, dict[Connection, float]],
) -> dict[str, Any]:
    """Compare scores with how much the loss changes without each connection, for each block and for all of them.

    The changes are compared in absolute value, as both scores are: the loss can also be lower without a connection.
    """
    found: dict[str, Any] = {'num_images': len(images)}
    for what, keep_mean in (('replaced by its mean', True), ('set to zero', False)):
        loss, losses = removal_losses(model, images, targets, keep_mean)
        found['loss'] = loss
        blocks = sorted({connection.consumer.split('.')[1] for connection in losses})
        for block, chosen in [
                *((f'block {int(b) + 1}', [c for c in losses if c.consumer.split('.')[1] == b]) for b in blocks),
                ('all', list(losses))]:
            changes = [losses[c] - loss for c in chosen]
            found.setdefault(block, {'connections': len(chosen)})[what] = {
                'largest increase': max(changes),
                'share of lower losses': sum(change < 0 for change in changes) / len(changes),
                **{by: rank_correlation([scores[by][c] for c in chosen], [abs(change) for change in changes])
                   for by in ('norm', 'taylor')}}
    return found


def inference_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return reparameterize_model(model).to(dtype, memory_format=torch.channels_last)


def as_input(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return images.to(dtype, memory_format=torch.channels_last)


def test_batches(
        model: nn.Module, folder: Path, dtype: torch.dtype, num_images: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Get a folder's images, in channels_last, and targets."""
    for images, targets in create_validation_loader(model, folder, 250, 1, num_images):
        yield as_input(images, dtype), targets


def measure_speed(whole: nn.Module, pruned: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """Get the pruned network's inference time as a fraction of the whole network's, for each batch size."""
    input_size = timm.data.resolve_model_data_config(whole)['input_size']
    ratios = {}
    for batch in BATCHES:
        x = as_input(torch.randn(batch, *input_size), dtype)
        seconds = run.median_seconds({'whole': run.inference(whole, x), 'pruned': run.inference(pruned, x)})
        ratios[str(batch)] = seconds['pruned'] / seconds['whole']
    return ratios


def fine_tuned_rows(checkpoint: str) -> list[dict[str, Any]]:
    """Get what `fine_tuning.py` has measured for a checkpoint."""
    rows = [json.loads(path.read_text()) for path in FINE_TUNED.glob(f'{checkpoint}-*.json')]
    return sorted(rows, key=lambda row: row['fraction'])


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot accuracy and time against the share of connections that is gone."""
    trained = fine_tuned_rows(results['checkpoint'])
    figure, (top1, time) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    for by, colour, marker in zip(CRITERIA, ('#0072B2', '#D55E00', '#999999'), 'os^'):
        chosen = [row for row in results['rows'] if row['by'] in (by, None)]
        fractions = [row['fraction'] for row in chosen]
        top1.plot(fractions, [row['top1'] for row in chosen], color=colour, marker=marker, label=by)
        chosen = [row for row in trained if row['by'] == by]
        top1.plot([row['fraction'] for row in chosen], [row['top1'] for row in chosen], color=colour, marker=marker,
                  linestyle='--', markerfacecolor='white')
    timed = [row for row in results['rows'] if row['time']]
    for batch, colour, marker in zip(BATCHES, ('#0072B2', '#D55E00'), 'os'):
        ratios = [row['time'][str(batch)] for row in timed]
        time.plot([row['fraction'] for row in timed], ratios, color=colour, marker=marker, label=f'batch {batch}')
    title = 'top-1 on the test images, %' + ('; hollow: after an epoch' if trained else '')
    top1.set(title=title, xlabel='share of connections gone', ylim=(0, 100))
    time.set(title='time of inference, by norm', xlabel='share of connections gone', ylim=(0, 1.1))
    for axis in top1, time:
        axis.legend()
    figure.savefig(path, dpi=150)


def main(
        train_dir: Annotated[Path, typer.Option(help='Training images, a folder for each class.')],
        test_dir: Annotated[Path, typer.Option(help='Test images, a folder for each class.')],
        model_name: Annotated[str, typer.Option('--model', help='Model, or model.tag.')] = 'delugenet146',
        num_images: Annotated[int, typer.Option(help='Training images for the estimate.')] = 1000,
        num_loss_images: Annotated[int, typer.Option(help='Training images for the losses.')] = 250,
        num_test_images: Annotated[int | None, typer.Option(help='Test images; all by default.')] = None,
        dtype_name: Annotated[str, typer.Option('--dtype', help='Of pruned networks in inference.')] = 'float32',
        rounds: Annotated[int, typer.Option(help='Timed rounds of each side.')] = 15,
        threads: Annotated[int, typer.Option(help='Threads.')] = 2,
        output: Annotated[Path, typer.Option(help='JSON file.')] = RESULTS,
) -> None:
    """Measure one checkpoint's connections on this machine."""
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    run.rounds = rounds
    dtype = getattr(torch, dtype_name)
    model = timm.create_model(model_name, pretrained=True).eval()
    name = f'{model.pretrained_cfg["architecture"]}.{model.pretrained_cfg["tag"]}'

    test = list(test_batches(model, test_dir, dtype, num_test_images))
    batches = list(create_validation_loader(model, train_dir, 100, 1, num_images))
    scores = {by: connection_scores(model, by, batches) for by in CRITERIA}
    (images, targets), = create_validation_loader(model, train_dir, num_loss_images, 1, num_loss_images)
    importance = measure_importance(
        model.to(memory_format=torch.channels_last), as_input(images, torch.float32), targets, scores)

    consumers = {connection.consumer for connection in scores['norm']}  # each keeps one connection
    fractions = [fraction for fraction in FRACTIONS if fraction <= 1 - len(consumers) / len(scores['norm'])]
    whole = inference_model(model, dtype)
    rows = []
    for by, fraction in track([(None, 0.), *((by, fraction) for by in CRITERIA for fraction in fractions)]):
        pruned = whole if by is None else inference_model(prune_connections(model, fraction, by, batches), dtype)
        rows.append({
            'by': by, 'fraction': fraction, **accuracy(rank_targets(pruned, test)),
            'layers': sum(len(stage.layers) for stage in pruned.stages),
            'time': measure_speed(whole, pruned, dtype) if by in ('norm', None) else None})
    results = {
        'date': str(date.today()), 'machine': run.cpu_name(), 'threads': threads, 'torch': torch.__version__,
        'checkpoint': name, 'dtype': dtype_name, 'rounds': rounds, 'connections': len(scores['norm']),
        'importance': importance, 'rows': rows}
    output.write_text(json.dumps(results, indent=2) + '\n')
    draw(results, output.with_suffix('.png'))


if __name__ == '__main__':
    typer.run(main)
