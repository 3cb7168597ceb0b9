"""Text made from the manifest and the reports: the README's tables, and the Hugging Face model card."""
import math
import re
from collections.abc import Sequence
from functools import partial

from huggingface_hub import EvalResult, ModelCardData
from tabulate import tabulate

from .paper import published
from .report import ModelReport
from .weights import Checkpoint, list_checkpoints

__all__ = ['best_table', 'checkpoint_table', 'markdown_table', 'model_card', 'model_table']

markdown_table = partial(tabulate, headers='keys', tablefmt='github', disable_numparse=True)
DATA_SETS = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100', 'imagenet': 'ImageNet'}
CITATION = '''```bibtex
@inproceedings{kuen2017delugenets,
  title     = {DelugeNets: Deep Networks with Efficient and Flexible Cross-layer Information Inflows},
  author    = {Kuen, Jason and Kong, Xiangfei and Wang, Gang and Tan, Yap-Peng},
  booktitle = {IEEE International Conference on Computer Vision Workshops},
  year      = {2017},
}
```'''

DELUGENETS = (
    '# DelugeNets',
    'Convolutional networks whose layers see every earlier layer of their block through learned cross-layer depthwise '
    'convolutions, trained by the timm-deluge project. The paper published no weights; these are ours. '
    'The `resnetlike` networks are residual baselines that the paper compares with.')
BASELINE = (
    '# ResNet-like baseline',
    'A residual network that the DelugeNet paper compares with, trained by the timm-deluge project. The paper '
    'published no weights; these are ours.')


def _error(checkpoint: Checkpoint) -> str:
    return f'{100 - checkpoint.metrics["top1"]:.2f}'


def _standard_error(checkpoint: Checkpoint) -> float:
    top1 = checkpoint.metrics['top1']
    return math.sqrt(top1 * (100 - top1) / checkpoint.metrics['num_images'])


def _published_error(checkpoint: Checkpoint) -> str:
    error = published(checkpoint.model).top1_error.get(checkpoint.dataset_key)
    return f'{error:.2f}' if error else ''


def _start(checkpoint: Checkpoint) -> str:
    if not checkpoint.base_model:
        return 'scratch'
    is_gone = checkpoint.base_model not in {c.name for c in list_checkpoints()}
    return f'`{checkpoint.base_model}`' + is_gone * ' (in git’s history)'


def _data(checkpoint: Checkpoint) -> str:
    return f'{checkpoint.dataset["name"]}, {checkpoint.input_size[1]}²'


def model_table(reports: Sequence[ModelReport], checkpoints: Sequence[Checkpoint]) -> str:
    """The models beside the paper's figures for them, in Markdown.

    Args:
        reports: A report of each model.
        checkpoints: The manifest. For each model and data set, only the best checkpoint is shown.

    Returns:
        The table.
    """
    rows = []
    from_worst_to_best = sorted(checkpoints, key=lambda c: c.metrics['top1'])
    for report in reports:
        printed = published(report.name)
        ours = {c.dataset_key: f'{_error(c)} ({_data(c)})' for c in from_worst_to_best if c.model == report.name}
        rows.append({
            'model': f'`{report.name}`',
            'default input': f'{report.input_size[1]}²',
            'parameters': f'{report.params:,}',
            'paper: M': f'{printed.params:g}' if printed.params else '',
            'GFLOPs, fvcore': f'{report.flops / 1e9:.2f}',
            'GFLOPs, paper’s way': f'{report.paper_flops / 1e9:.2f}',
            'paper: GFLOPs': f'{printed.gflops:g}' if printed.gflops else '',
            'our best checkpoint: error %': ', '.join(error for _, error in sorted(ours.items())) or 'none',
            'paper: error %': ', '.join(f'{e:.2f} ({DATA_SETS[d]})' for d, e in printed.top1_error.items()),
        })
    return markdown_table(rows)


def best_table(checkpoints: Sequence[Checkpoint]) -> str:
    """Which checkpoint to load for which images: the best one of each data set, in Markdown.

    Args:
        checkpoints: The manifest.

    Returns:
        The table, the best checkpoint first.
    """
    best: dict[str, Checkpoint] = {}
    for checkpoint in sorted(checkpoints, key=lambda c: c.metrics['top1']):
        best[checkpoint.dataset_key] = checkpoint
    return markdown_table([{
        'data': _data(c),
        'classes': len(c.class_names),
        'checkpoint': f'`{c.name}`',
        'top-1 %': f'{c.metrics["top1"]:.2f}',
        'top-5 %': f'{c.metrics["top5"]:.2f}',
        'measured on': f'{c.metrics["num_images"]:,} {c.dataset["split"]} images',
        'paper: top-1 %': f'{100 - float(_published_error(c)):.2f}' if _published_error(c) else '',
    } for c in sorted(best.values(), key=lambda c: -c.metrics['top1'])])


def checkpoint_table(checkpoints: Sequence[Checkpoint]) -> str:
    """The checkpoints' errors beside the paper's, and what their training cost, in Markdown.

    Args:
        checkpoints: The manifest.

    Returns:
        The table.
    """
    return markdown_table([{
        'checkpoint': f'`{c.name}`',
        'data': _data(c),
        'error %': _error(c),
        'paper: error %': _published_error(c),
        'started from': _start(c),
        'epochs since': c.epochs,
        'hours': c.hours,
        'hardware': re.split(r' virtual machine| \(|,', c.hardware)[0],
    } for c in checkpoints])


def model_card(checkpoints: Sequence[Checkpoint], repo_id: str | None = None) -> str:
    """The model card of the whole zoo, or of a repository on the Hugging Face Hub, in the Hub's form.

    Args:
        checkpoints: The manifest, or the checkpoint that the repository holds.
        repo_id: The repository, `USER/REPO`.

    Returns:
        YAML header with a model-index, and Markdown.
    """
    name = f'hf-hub:{repo_id}' if repo_id else checkpoints[0].name if checkpoints else ''
    data = ModelCardData(
        model_name=checkpoints[0].name if repo_id else 'timm-deluge',
        license='apache-2.0',
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'image-classification', 'delugenet'],
        datasets=sorted({c.dataset_key for c in checkpoints}),
        eval_results=[
            EvalResult(
                task_type='image-classification', dataset_type=c.dataset_key, dataset_name=c.dataset['name'],
                dataset_split=c.dataset['split'], metric_type=metric_type, metric_name=f'{metric_name}, {c.name}',
                metric_value=c.metrics[key],
            )
            for c in checkpoints
            for key, metric_type, metric_name in (('top1', 'accuracy', 'Top-1 accuracy'),
                                                  ('top5', 'top-5-accuracy', 'Top-5 accuracy'))
        ],
    )
    sections = [
        f'---\n{data.to_yaml()}\n---',
        *(BASELINE if checkpoints and not any(c.has_connections for c in checkpoints) else DELUGENETS),
        '## Checkpoints',
        markdown_table([{
            'checkpoint': f'`{c.name}`', 'data': c.dataset['name'], 'classes': len(c.class_names),
            'top-1 %': f'{c.metrics["top1"]:.2f}', 'top-5 %': f'{c.metrics["top5"]:.2f}',
            'measured on': f'{c.metrics["num_images"]:,} {c.dataset["split"]} images', 'started from': _start(c),
            'epochs since': c.epochs, 'hours': c.hours,
            'MB': f'{c.bytes / 1e6:.1f}',
        } for c in checkpoints]),
        *(_checkpoint_section(c) for c in checkpoints),
        '## Use',
        'timm alone does not know these networks: install the package `timm-deluge` from a checkout of its repository.',
        '```python\nimport timm, timm_deluge\n\n'
        f"model = timm.create_model('{name}', pretrained=True).eval()\n```"
        if checkpoints else 'No checkpoint is published yet.',
        '## Intended use and limits',
        'For research on how layers connect, for feature extraction and fine-tuning on small images, and as a '
        'baseline for short training runs. The checkpoints know only the classes they were trained on and answer with '
        'one of them for any picture; their probabilities are not calibrated. No images were held out for model '
        'selection: image sizes, averaging, learning rates, and which run to keep and which to make the default, were '
        'chosen by the errors on the same images that are reported here, which makes the errors optimistic. The '
        'checkpoints carry the biases of their training images and are not meant for decisions about people.',
        '## Citation',
        CITATION,
    ]
    return '\n\n'.join(sections) + '\n'


def _checkpoint_section(checkpoint: Checkpoint) -> str:
    printed, exact = _published_error(checkpoint), checkpoint.metrics.get('exact')
    paper = f' The paper reports an error of {printed} %.' if printed else ''
    without = (f' On the {exact["num_images"]:,} of these images that are exact copies of the official ones, the '
               f'error is {100 - exact["top1"]:.2f} %.') if exact else ''
    start = _start(checkpoint)
    if checkpoint.base_model and checkpoint.base_model.partition('.')[0] != checkpoint.model:
        start = f'a network made of {start}'
    other_data = [] if checkpoint.dataset_key in published(checkpoint.model).top1_error else [
        f'The paper trains `{checkpoint.model}` on other data: these weights are for the '
        f'{len(checkpoint.class_names)} classes of {checkpoint.dataset["name"]}, at '
        f'{"×".join(map(str, checkpoint.input_size[1:]))} pixels. Use them to try the architecture, to extract '
        'features of small images, or as a start for fine-tuning; how well they serve for the latter two has not been '
        'measured. They are not for recognising photographs, and do not show what the architecture can do.']
    rows = [
        ('architecture', f'`{checkpoint.model}`, {checkpoint.num_params:,} parameters'),
        ('data', f'{checkpoint.dataset["name"]}, {checkpoint.dataset["train_images"]:,} images; '
                 f'{checkpoint.dataset["provenance"]}'),
        ('training', f'recipe `{checkpoint.recipe}`, whose first lines have the commands or name the recipe that '
                     f'has them, {checkpoint.epochs} epoch{"s" * (checkpoint.epochs != 1)} '
                     f'from {start}, seed {checkpoint.seed} (the last part\'s if the run had several), '
                     f'{checkpoint.hours} hours on {checkpoint.hardware}; '
                     + (f'with `{checkpoint.teacher}` as teacher (distillation); ' if checkpoint.teacher else '')
                     + ('weights averaged with those it started from; '
                        if '_avg_' in checkpoint.tag and checkpoint.base_model else '')
                     + (f'weights averaged with decay {checkpoint.ema_decay}; ' if checkpoint.ema_decay else '')
                     + (f'BatchNorm statistics re-estimated on {checkpoint.settled_images:,} training images; '
                        if checkpoint.settled_images else '')
                     + f'log in `reports/training/{checkpoint.name}.csv`'),
        ('input', f'{"×".join(map(str, checkpoint.input_size))}, {checkpoint.interpolation} interpolation, '
                  f'mean {tuple(checkpoint.mean)}, std {tuple(checkpoint.std)}'),
        ('file', f'`{checkpoint.file}`, {checkpoint.bytes:,} bytes, SHA-256 `{checkpoint.sha256}`'
                 + (', joined from the parts' if checkpoint.parts else '')),
        *(('index' if part['file'].endswith('.json') else 'part',
           f'`{part["file"]}`, {part["bytes"]:,} bytes, SHA-256 `{part["sha256"]}`') for part in checkpoint.parts),
        ('reproduce', f'`{checkpoint.command}`'),
    ]
    return '\n\n'.join([
        f'### {checkpoint.name}',
        f'Error on {checkpoint.metrics["num_images"]:,} {checkpoint.dataset["split"]} images: {_error(checkpoint)} % '
        f'(standard error {_standard_error(checkpoint):.2f}, top-5 {100 - checkpoint.metrics["top5"]:.2f} %), '
        f'measured from the published fp16 file.{without}{paper}',
        *other_data,
        markdown_table(rows, headers=('', checkpoint.tag)),
    ])
