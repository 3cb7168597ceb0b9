"""The command line, `timm-deluge`: predict, report, connectivity, prune, demo, validate, weights, publish, recipe."""
import ast
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import timm
import torch
import typer
from huggingface_hub.errors import HFValidationError, HTTPError
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors import SafetensorError
from timm.utils import reparameterize_model

from .connectivity import block_connectivity, draw_connectivity, names_model, read_state_dict
from .download import as_clause, download_checkpoint
from .hub import hub_files, push_to_hub
from .images import find_images
from .predict import EXAMPLE_IMAGE, Prediction, predict
from .prune import CRITERIA, find_cross_layers, prune_connections, save_pruned
from .recipes import list_recipes, recipe_path, recipe_summary
from .report import create_report, format_reports
from .training_connectivity import EpochConnectivity, training_connectivity
from .training_run import add_checkpoint
from .validate import BATCH_SIZE, accuracy, create_validation_loader, image_names, rank_targets
from .weights import HUB_FILE, Checkpoint, CheckpointError, find_checkpoint, list_checkpoints, verify_checkpoint

app = typer.Typer(no_args_is_help=True, add_completion=False, help='DelugeNets for timm.')
weights_app = typer.Typer(no_args_is_help=True, help='The pretrained checkpoints.')
app.add_typer(weights_app, name='weights')
console = Console(highlight=False, emoji=False, soft_wrap=True)
err_console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

T = TypeVar('T')

# errors that creating a model and loading its weights can raise
LOADING_ERRORS = (
    AssertionError, AttributeError, EOFError, HTTPError, LookupError, OSError, RuntimeError, SafetensorError, TypeError,
    ValueError)


def _fail(message: object) -> NoReturn:
    if str(message).startswith('Caught '):  # in a loader process: the message is its traceback
        message = str(message).splitlines()[-1].partition(': ')[2]
    err_console.print(f'[bold red]error:[/] {escape(str(message))}')
    raise typer.Exit(2)


def _check_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f'cannot run on {device!r}: {str(error).splitlines()[0]}') from error
    return device


Device = Annotated[str, typer.Option(callback=_check_device, help="Where to run, such as 'cuda'.")]


def _show_progress(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    columns = SpinnerColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    with Progress(*columns, console=err_console, transient=True, disable=total < 2) as progress:
        yield from progress.track(items, total=total)


@app.command('predict')
def predict_command(
        images: Annotated[list[str] | None, typer.Argument(
            help="Files, folders or glob patterns, '-' for paths on standard input; none: a photograph that comes "
                 'with the package.', show_default=False)] = None,
        model: Annotated[str, typer.Option(help='Model, or model.tag.')] = 'delugenet146',
        top: Annotated[int, typer.Option(min=1, help='Number of classes to show.')] = 5,
        as_json: Annotated[bool, typer.Option('--json', help='Print JSON.')] = False,
        batch_size: Annotated[int, typer.Option(min=1, help='Images classified at once.')] = 32,
        device: Device = 'cpu',
) -> None:
    """Classify images. Exits with 1 if any could not be read."""
    if '' in (images or ()):
        _fail('an empty name names no image')
    paths = list(find_images(images or [str(EXAMPLE_IMAGE)]))
    if not paths:
        _fail('standard input named no images')
    try:
        predictions = list(_show_progress(predict(paths, model, top, batch_size, device), len(paths), 'images'))
    except (OSError, RuntimeError) as error:
        _fail(error)
    if as_json:
        print(json.dumps([_as_dict(p) for p in predictions], indent=2))
    else:
        _print_predictions([p for p in predictions if p.error is None])
        for prediction in predictions:
            if prediction.error is not None:
                path = escape(_printable(prediction.path))
                err_console.print(f'[bold red]skipped[/] {path}: {escape(prediction.error)}')
    raise typer.Exit(int(any(p.error is not None for p in predictions)))


def _as_dict(prediction: Prediction) -> dict[str, object]:
    if prediction.error is not None:
        return {'path': prediction.path, 'error': prediction.error}
    return {'path': prediction.path, 'classes': [{'name': n, 'probability': p} for n, p in prediction.classes]}


def _shorten(path: str) -> str:
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def _printable(path: str) -> str:
    """Get a file's name with a replacement character for each byte that cannot be decoded."""
    return path.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def _print_predictions(predictions: list[Prediction]) -> None:
    table = Table(header_style='bold')
    table.add_column('image', overflow='fold')
    table.add_column('class')
    table.add_column('probability', justify='right')
    for prediction in predictions:
        image = escape(_printable(_shorten(prediction.path)))
        for name, probability in prediction.classes:
            table.add_row(image, escape(name.replace('_', ' ')), f'{probability:.1%}')
            image = ''
        table.add_section()
    if predictions:
        console.print(table, soft_wrap=False)


def _parse_model_kwarg(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not key or not equals:
        _fail(f'--model-kwargs {text}: expected KEY=VALUE, such as aggregation=scalar')
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, TypeError, ValueError):
        return key, value


@app.command()
def report(
        models: Annotated[list[str], typer.Argument(
            help='Any model names of timm, these included; hf-hub:USER/REPO, local-dir:FOLDER.')],
        fmt: Annotated[Literal['table', 'json', 'markdown', 'csv'], typer.Option(
            '--format', help='Output format.')] = 'table',
        model_kwargs: Annotated[list[str] | None, typer.Option(
            help='KEY=VALUE for the models, such as aggregation=scalar; may be repeated.')] = None,
) -> None:
    """Parameters, multiply-adds and FLOPs, by fvcore's and by the paper's convention."""
    for name in models:
        if not names_model(name):
            if '=' in name:
                _fail(f'{name}: no model; --model-kwargs takes one KEY=VALUE, and may be repeated')
            close = get_close_matches(name, timm.list_models(), 5)
            _fail(f'timm has no model {name!r}' + (f'; similar names: {", ".join(close)}' if close else ''))
    kwargs = dict(map(_parse_model_kwarg, model_kwargs or []))
    try:
        text = format_reports([create_report(name, **kwargs) for name in models], fmt)
    except LOADING_ERRORS as error:
        _fail(error)
    print(text)


@app.command()
def connectivity(
        source: Annotated[str, typer.Argument(
            metavar='MODEL_OR_CHECKPOINT',
            help='Model, model.tag, hf-hub:USER/REPO, local-dir:FOLDER, a checkpoint file, or the folder of a run.')],
        as_json: Annotated[bool, typer.Option('--json', help='Print JSON, with every connection.')] = False,
        output: Annotated[Path | None, typer.Option(
            help='Picture to write, .png or .svg, with every connection: needs matplotlib.',
            show_default=False)] = None,
) -> None:
    """How strongly each layer is connected: L2 norms of cross-layer weights, as in the paper's Fig. 3.

    The table has one column for each block: the norms in the convolution with the most source layers,
    relative to the largest.
    The sources are batch-normalised, so that their norms can be compared.

    For the folder of a run of train.py, the table has a row for each epoch and block: these relative norms of the first
    source, of the others (their mean) and of the last; the share of weights below a thousandth of the
    largest, averaged over all convolutions; and the norm of the mean gradient that the optimizer keeps, relative to the
    weights'.
    """
    if output is not None and output.suffix.lower() not in ('.png', '.svg'):
        _fail(f'{output}: pictures are written as .png or .svg')
    is_run = os.path.isdir(source) and source not in timm.list_models() + timm.list_models(pretrained=True)
    if is_run and output is not None:
        _fail(f'{source}: a picture is of one checkpoint; name a file of that folder')
    try:
        epochs = training_connectivity(Path(source)) if is_run else []
        blocks = [] if is_run else block_connectivity(read_state_dict(source))
        if output is not None:
            draw_connectivity(blocks, Path(source).name).savefig(output, dpi=150)
    except (ImportError, *LOADING_ERRORS) as error:
        _fail(f'{source}: {error}' if isinstance(error, (LookupError, TypeError, ValueError)) else error)
    if is_run:
        _print_training(epochs, as_json)
        return
    if as_json:
        print(json.dumps([block.as_dict() for block in blocks], indent=2))
        return
    table = Table('source', header_style='bold')
    for block in blocks:
        table.add_column(f'block {block.block}', justify='right')
    for i in range(max(len(block.last) for block in blocks)):
        table.add_row(f'h_{i}', *(f'{block.last[i]:.2f}' if i < len(block.last) else '' for block in blocks))
    console.print(table, soft_wrap=False)


def _print_training(epochs: list[EpochConnectivity], as_json: bool) -> None:
    if as_json:
        print(json.dumps([epoch.as_dict() for epoch in epochs], indent=2))
        return
    table = Table('epoch', header_style='bold')
    for column in ('block', 'h_0', 'others', 'last', 'below 1/1000', 'gradient'):
        table.add_column(column, justify='right')
    for epoch in epochs:
        for i, block in enumerate(epoch.weights):
            first, *others = block.last
            gradient = ''
            if epoch.gradients:
                gradient = f'{math.hypot(*epoch.gradients[i].norms[-1]) / (math.hypot(*block.norms[-1]) or 1.):.1e}'
            table.add_row(
                str(epoch.epoch), str(block.block), f'{first:.2f}', f'{mean(others):.2f}', f'{others[-1]:.2f}',
                f'{mean(block.dead_weights):.1%}', gradient)
    console.print(table, soft_wrap=False)


@app.command()
def prune(
        source: Annotated[str, typer.Argument(
            metavar='MODEL', help='Model, model.tag, hf-hub:USER/REPO or local-dir:FOLDER; its pretrained weights.')],
        output: Annotated[Path, typer.Option(help='Folder to create; load it as local-dir:FOLDER.')],
        fraction: Annotated[float, typer.Option(
            min=0, max=1,
            help="Share of the unpruned network's connections (or, by --unit, weights) to be removed in total.")],
        by: Annotated[str, typer.Option(
            help=f'How connections are scored: {", ".join(CRITERIA)}. taylor keeps the most accuracy.')] = 'norm',
        unit: Annotated[str, typer.Option(
            help='What is removed: connection, or channel (single weights, which saves no time).')] = 'connection',
        data_dir: Annotated[Path | None, typer.Option(
            help='Folder with one folder of training images per class, for --by taylor.', show_default=False)] = None,
        num_images: Annotated[int, typer.Option(min=1, help='Number of images for --by taylor.')] = 1000,
        seed: Annotated[int, typer.Option(help='Seed for --by random.')] = 0,
) -> None:
    """Remove the weakest connections of a network, and save the pruned network.

    Prints how many connections, weights and layers are left, and how many layers run in inference, which leaves out
    layers whose output nothing uses.
    """
    if os.path.lexists(output):
        _fail(f'{output} exists: name a folder that does not')
    if (by == 'taylor') != (data_dir is not None):
        _fail('--by taylor and --data-dir need each other')
    try:
        model = timm.create_model(source, pretrained=True)
        batches = None
        if data_dir is not None:
            loader = create_validation_loader(model, data_dir, 100, 1, num_images)
            batches = _show_progress(loader, len(loader), 'batches')
        pruned: Any = prune_connections(model, fraction, by, batches, seed, unit)
        fused: Any = reparameterize_model(pruned)
        save_pruned(pruned, output)
    except LOADING_ERRORS as error:
        _fail(error)
    before, after = (find_cross_layers(network).values() for network in (model, pruned))
    connections = [sum(len(conv.sources) for conv in convs) for convs in (before, after)]
    weights = [sum(int(conv.masked_weight().count_nonzero()) for conv in convs) for convs in (before, after)]
    layers = [sum(len(stage.layers) for stage in network.stages) for network in (pruned, fused)]
    print(json.dumps({
        'connections': connections[1], 'removed': connections[0] - connections[1], 'weights': weights[1],
        'removed weights': weights[0] - weights[1], 'layers': layers[0], 'layers in inference': layers[1],
        'model': f'local-dir:{output}'}, indent=2))


@app.command()
def demo(
        model: Annotated[str, typer.Option(help='Model, or model.tag, that is selected at first.')] = 'delugenet146',
        host: Annotated[str, typer.Option(help='Address to listen at; 0.0.0.0 for the whole network.')] = '127.0.0.1',
        port: Annotated[int, typer.Option(min=1, max=65535, help='Port to listen at.')] = 7860,
        open_browser: Annotated[bool, typer.Option('--open', help='Show it in the browser.')] = False,
) -> None:
    """Serve a page to try the checkpoints on pictures, see where they look, and remove connections."""
    checkpoint = _find(model)
    if not checkpoint.has_connections:
        _fail(f'{checkpoint.name} has no connections to show or to remove: name a DelugeNet, such as delugenet146')
    try:
        from .demo import create_page, launch_page
    except ImportError as error:
        _fail(f"the page needs more packages: in a checkout of timm-deluge, pip install '.[demo]' ({error})")
    try:
        page = create_page(checkpoint.name)
    except (OSError, RuntimeError) as error:
        _fail(error)
    try:
        launch_page(page, host, port, open_browser)
    except (OSError, RuntimeError) as error:
        _fail(f'cannot listen at {host}:{port}: choose another --port, or a --host of this machine ({error})')


@app.command('validate')
def validate_command(
        name: Annotated[str, typer.Argument(help='Model, or model.tag.')],
        data_dir: Annotated[Path, typer.Option(help='Folder with one folder of test images per class.')],
        batch_size: Annotated[int, typer.Option(min=1, help='Images in a batch.')] = BATCH_SIZE,
        workers: Annotated[int, typer.Option(min=0, help='Loader processes.')] = 1,
        device: Device = 'cpu',
) -> None:
    """Measure a checkpoint's accuracy, as JSON; exits with 1 if it is over 0.05 points off the manifest's figure."""
    checkpoint = _find(name)
    try:
        model = timm.create_model(checkpoint.name, pretrained=True).eval().to(device)
        loader = create_validation_loader(model, data_dir, batch_size, workers)
        ranks = rank_targets(model, _show_progress(loader, len(loader), 'batches'), device)
    except (OSError, RuntimeError, ValueError) as error:
        _fail(error)
    measured = accuracy(ranks, image_names(loader), checkpoint.dataset.get('inexact', ()))
    print(json.dumps({'checkpoint': checkpoint.name, 'measured': measured, 'manifest': checkpoint.metrics}, indent=2))
    differing = any(round(abs(measured[key] - checkpoint.metrics[key]), 2) > 0.05 for key in ('top1', 'top5'))
    raise typer.Exit(int(differing))


@weights_app.command('add')
def weights_add(
        run_dirs: Annotated[list[Path], typer.Argument(
            help="Output folder of timm's train.py; several for a resumed run, in order.")],
        tag: Annotated[str, typer.Option(help='Pretrained tag, <recipe>_<dataset>.')],
        data_dir: Annotated[Path, typer.Option(help='The data set, as train.py read it.')],
        recipe_name: Annotated[str, typer.Option('--recipe', help='Recipe it was trained with.')],
        dataset_name: Annotated[str, typer.Option('--dataset', help='Name of the data set.')],
        provenance: Annotated[str, typer.Option(help='Where exactly the images come from.')],
        hardware: Annotated[str, typer.Option(help='What it was trained on.')],
        inexact: Annotated[Path | None, typer.Option(
            help='Text file: names of test images, one per line, that differ from the published ones.')] = None,
        descriptions: Annotated[Path | None, typer.Option(
            '--class-descriptions',
            help="Text file: a class folder's name, a tab and what it stands for on each line, as in WordNet's "
                 'words.txt.')] = None,
        base_model: Annotated[str | None, typer.Option(
            help='Published checkpoint from which --initial-checkpoint of the run was made (remove_layers, '
                 'insert_layers, widen_layers); if two, the one that supplied the classifier.',
        )] = None,
        img_size: Annotated[int | None, typer.Option(
            help="Image size that the checkpoint is for; the run's if not given.", min=1)] = None,
        settled_images: Annotated[int | None, typer.Option(
            help='Re-estimate the BatchNorm statistics on that many training images.', min=1)] = None,
        split: Annotated[str, typer.Option(
            help="What the data set's authors call the images for measuring: test or validation.")] = 'test',
) -> None:
    """Turn a training run into a checkpoint: write fp16 file and log, measure the accuracy, add all to the manifest.

    Takes the last epoch's weights, or their moving average if it was trained with --model-ema, and says which.
    """
    try:
        checkpoint = add_checkpoint(
            run_dirs, tag, data_dir, recipe_name, dataset_name, provenance, hardware,
            _read_lines(inexact) if inexact else (),
            _read_descriptions(descriptions) if descriptions else None, base_model, img_size, settled_images, split)
    except (LookupError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        _fail(error)
    kind = 'last weights' if checkpoint.ema_decay is None else f'moving average, decay {checkpoint.ema_decay}'
    console.print(f'{checkpoint.path}, {kind}: {json.dumps(checkpoint.metrics)}', markup=False)


def _read_descriptions(path: Path) -> dict[str, str]:
    rows = [line.split('\t') for line in _read_lines(path)]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f'{path}: expected NAME, a tab and what it stands for on each line, got {" ".join(row)!r}')
    return dict(rows)


def _read_lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty."""
    try:
        return list(filter(None, path.read_text(encoding='utf-8').splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: this is no text in UTF-8: {error}') from error


@weights_app.command('list')
def weights_list() -> None:
    """List the checkpoints."""
    table = Table(header_style='bold', box=None, padding=(0, 1, 0, 0))
    table.add_column('checkpoint', no_wrap=True)
    table.add_column('data')
    for column in ('top-1 %', 'top-5 %', 'epochs', 'MB'):
        table.add_column(column, justify='right')
    for c in list_checkpoints():
        top1, top5 = (f'{c.metrics[key]:.2f}' for key in ('top1', 'top5'))
        table.add_row(c.name, escape(c.dataset['name']), top1, top5, str(c.epochs), f'{c.bytes / 1e6:.0f}')
    console.print(table, soft_wrap=False)


@weights_app.command('verify')
def weights_verify() -> None:
    """Verify the SHA-256 of every checkpoint that is here. Exits with 1 if any differs."""
    failed = False
    for checkpoint in list_checkpoints():
        if checkpoint.is_elsewhere:
            console.print(f'not here: {checkpoint.name}')
            continue
        try:
            verify_checkpoint(checkpoint)
            console.print(f'[green]ok[/]  {checkpoint.name}  {checkpoint.sha256}')
        except (CheckpointError, OSError) as error:
            failed = True
            err_console.print(f'[bold red]bad[/] {checkpoint.name}: {escape(str(error))}')
    raise typer.Exit(int(failed))


@weights_app.command('download')
def weights_download(
        name: Annotated[str, typer.Argument(help='Model, or model.tag.')],
        repo_id: Annotated[str | None, typer.Option(
            help='Where from: USER/REPO on the Hugging Face Hub; by default what the manifest records.',
            show_default=False)] = None,
) -> None:
    """Download a checkpoint that does not come with the package, unless it is here; resumes an interrupted download."""
    checkpoint = _find(name)
    source = repo_id or checkpoint.hf_hub_id
    try:
        if source and not checkpoint.files:
            download_checkpoint(checkpoint, source)
    except (CheckpointError, HFValidationError) as error:
        _fail(error)
    except Exception as error:  # see `publish`
        _fail(f'{as_clause(error)}. {checkpoint.name} is not here yet; run this again, and the download '
              f'resumes where it stopped.')
    try:
        verify_checkpoint(checkpoint)
    except (CheckpointError, OSError) as error:
        _fail(error)
    console.print(str(checkpoint.path), markup=False)


@weights_app.command('show')
def weights_show(name: Annotated[str, typer.Argument(help='Model, or model.tag.')]) -> None:
    """Print what the manifest says about one checkpoint, as JSON."""
    print(json.dumps(asdict(_find(name)), indent=2))


@app.command()
def publish(
        name: Annotated[str, typer.Argument(help='Model, or model.tag.')],
        repo_id: Annotated[str, typer.Option(help='Where to: USER/REPO on the Hugging Face Hub.')],
        dry_run: Annotated[bool, typer.Option('--dry-run', help='Show every file, and publish nothing.')] = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub, as `hf auth login` or HF_TOKEN identifies you."""
    checkpoint = _find(name)
    try:
        if not dry_run:
            console.print(push_to_hub(checkpoint, repo_id), markup=False)
            return
        for path, content in hub_files(checkpoint, repo_id).items():
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            console.print(f'==== {repo_id}/{path}, {size:,} bytes', markup=False)
            if isinstance(content, Path) or path == HUB_FILE:
                console.print(f'SHA-256 {checkpoint.sha256}', markup=False)
            else:
                console.print(content.decode(), markup=False)
    except (CheckpointError, HFValidationError) as error:
        _fail(error)
    except Exception as error:  # the Hub's client lets through errors of an HTTP library that depends on its version
        _fail(f'{as_clause(error)}. No file was published; run this again, and what was uploaded will not be '
              f'uploaded again. Do you need to log in (`hf auth login`, or HF_TOKEN), or another repository?')


def _find(name: str) -> Checkpoint:
    try:
        return find_checkpoint(name)
    except CheckpointError as error:
        _fail(error)


@app.command()
def recipe(
        name: Annotated[str | None, typer.Argument(
            help='Name of a recipe; none lists them.', show_default=False)] = None,
) -> None:
    """Print the path of an option file for timm's train.py, or list all of them."""
    if name is not None:
        try:
            print(recipe_path(name))
        except LookupError as error:
            _fail(error)
        return
    table = Table('recipe', 'what it is', header_style='bold', show_lines=True)
    for name in list_recipes():
        table.add_row(escape(name), escape(recipe_summary(name)))
    console.print(table, soft_wrap=False)


if __name__ == '__main__':
    app()
