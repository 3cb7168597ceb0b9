"""Turn a run of timm's train.py into a checkpoint of the manifest, and its log into one of the reports."""
import csv
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import save_torch_state_dict
from timm.data import resolve_data_config

from .recipes import recipe_path
from .settle import settle_on_folder
from .validate import (
    BATCH_SIZE,
    accuracy,
    create_validation_loader,
    image_names,
    list_classes,
    open_folder,
    rank_targets,
)
from .weights import (
    Checkpoint,
    find_checkpoint,
    joined_bytes,
    list_checkpoints,
    load_checkpoint,
    read_tensors,
    read_training_state,
    weights_dir,
    write_manifest,
)

__all__ = ['add_checkpoint', 'write_weights']

PART_BYTES = 44 * 2 ** 20  # of tensors: with its header, a file stays below 45 MiB
INPUT_OPTIONS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')
LOGS = Path(__file__).resolve().parent.parent / 'reports' / 'training'


def add_checkpoint(
        run_dirs: Sequence[Path],
        tag: str,
        data_dir: Path,
        recipe: str,
        dataset_name: str,
        provenance: str,
        hardware: str,
        inexact: Sequence[str] = (),
        class_descriptions: dict[str, str] | None = None,
        base_model: str | None = None,
        img_size: int | None = None,
        settled_images: int | None = None,
        split: str = 'test',
) -> Checkpoint:
    """Publish the last checkpoint of a training run: fp16 file, measured accuracy, log, manifest entry.

    The last epoch's weights are taken, not those with the best accuracy on the test images. If train.py kept a moving
    average of the weights (`--model-ema`), it is taken instead. A file larger than 45 MiB is split, by the Hugging Face
    Hub's convention.

    Args:
        run_dirs: Output folder of train.py, with `args.yaml`, `summary.csv` and `last.pth.tar`; several, in order, for
            a run that was resumed, or that started from another run's checkpoint (`--initial-checkpoint`). The hours
            of each run are counted from its start, or its last resumption in its folder, to its summary's last row.
        tag: Pretrained tag, `<recipe>_<dataset>`.
        data_dir: The data set, with train and validation folders as train.py read them.
        recipe: Name of the recipe it was trained with.
        dataset_name: Name of the data set.
        provenance: Where exactly the images come from.
        hardware: What it was trained on.
        inexact: Test images, named by their paths in the validation folder, that are not pixel by pixel those of the
            data set's authors; the accuracy is measured with and without them.
        class_descriptions: What the names of the class folders stand for; may contain further names.
        base_model: Name of the published checkpoint from which the first run's `--initial-checkpoint` was made, such as
            by `timm_deluge.remove_layers`, `insert_layers` or `widen_layers`; if there were two, the one that supplied
            the classifier.
        img_size: Image size that the checkpoint is for, and is measured at; the run's if None.
        settled_images: Number of training images, preprocessed as in inference at that size, on which the running
            statistics are re-estimated; None keeps the run's statistics.
        split: What the data set's authors call the images that the checkpoint is measured on, 'test' or 'validation'.

    Returns:
        The new entry, already in the manifest, where it replaces one of the same name.

    Raises:
        FileNotFoundError: If a file of the run is missing, or there is no checkout to publish to.
        ValueError: If the run is not complete, if its model is not an unchanged one of the package, if the data
            set is missing or cannot be read, if a class has no description, if the run's initial checkpoint was not
            made from the base model, or if a run's options were written after its summary, which hides its hours.
        LookupError: If there is no such recipe.
        CheckpointError: If there is no such base model.
    """
    recipe_path(recipe)
    if not re.fullmatch(r'\w+_[a-z\d]+', tag):
        raise ValueError(f'tag={tag!r}: expected letters, digits and underscores, as in muon40_cifar100')
    if split not in ('test', 'validation'):
        raise ValueError(f'split={split!r}: must be test or validation')
    if not LOGS.parent.is_dir():
        raise FileNotFoundError(f'{LOGS.parent}: no such folder; publish from a checkout (`pip install -e .`)')
    run_dir = run_dirs[-1]
    all_args = [_read_args(folder) for folder in run_dirs]
    for folder, options in zip(run_dirs, all_args):
        _check_options(folder, options)
    first_args, args = all_args[0], all_args[-1]
    base, start = _pretrained_checkpoint(args), _pretrained_checkpoint(first_args)
    made_of = find_checkpoint(base_model) if base_model else None
    known_start = first_args.get('initial_checkpoint') if made_of else None
    if made_of:
        _check_made_of(made_of, known_start)
    teacher = _read_teacher(all_args)
    log, epochs_done = _read_log(run_dirs, known_start)
    ema_decay = args['model_ema_decay'] if args.get('model_ema') else None
    state_dict = _read_last_weights(run_dir, epochs_done, args['epochs'], use_ema=ema_decay is not None)
    hours = sum(map(_hours, run_dirs))

    train_folder, test_folder = data_dir / args['train_split'], data_dir / args['val_split']
    train_set = open_folder(train_folder)
    model = _create_model(args, base, list_classes(train_set), img_size)
    class_names = model.pretrained_cfg['label_names']
    if class_descriptions is not None:
        try:
            class_descriptions = {name: class_descriptions[name] for name in class_names}
        except KeyError as error:
            raise ValueError(f'the class folder {error} has no description') from None
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(
            f'{run_dir / "last.pth.tar"}: these are no weights of {args["model"]} with 3 input channels and the '
            f'{len(class_names)} classes of {train_folder}, for which alone a checkpoint can be published; give the '
            f'images that the run was trained on') from error
    if settled_images:
        settled_images = min(settled_images, len(train_set))
        settle_on_folder(model, train_folder, settled_images, args['seed'])
    published = {
        k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict(published)
    loader = create_validation_loader(model, test_folder, BATCH_SIZE, workers=1)
    test_images = image_names(loader)
    missing = sorted(set(inexact) - set(test_images))
    if missing:
        raise ValueError(f'{test_folder}: no image {missing[0]!r}, which should be inexact; name images from this '
                         f'folder on, such as {test_images[0]!r}')
    metrics = accuracy(rank_targets(model.eval(), loader), test_images, inexact)

    model_name = args['model'].partition('.')[0]
    name = f'{model_name}.{tag}'
    origin = made_of or start
    partial = LOGS / f'{name}.partial'
    try:
        _write_log(log, partial)
        files = write_weights(published, name)
        partial.replace(LOGS / f'{name}.csv')
    finally:
        partial.unlink(missing_ok=True)
    checkpoint = Checkpoint(
        model=model_name,
        tag=tag,
        **files,
        num_params=sum(p.numel() for p in model.parameters()),
        class_names=class_names,
        class_descriptions=class_descriptions,
        **{option: model.pretrained_cfg[option] for option in INPUT_OPTIONS},
        dataset=dict(
            name=dataset_name,
            split=split,
            train_images=len(train_set),
            test_images=len(test_images),
            provenance=provenance,
            **(dict(inexact=sorted(inexact)) if inexact else {}),
        ),
        base_model=origin.name if origin else None,
        teacher=teacher,
        recipe=recipe,
        epochs=1 + max(log),
        seed=args['seed'],
        ema_decay=ema_decay,
        settled_images=settled_images,
        hardware=hardware,
        hours=round(hours, 2),
        metrics=metrics,
        command=f'timm-deluge validate {name} --data-dir DIR/{args["val_split"]}',
        hf_hub_id=None,
    )
    entries = {c.name: c for c in list_checkpoints()}
    write_manifest(list({**entries, name: checkpoint}.values()))
    written = {part['file'] for part in checkpoint.parts} or {checkpoint.file}
    for file in entries.get(name, checkpoint).file_names - written:
        (weights_dir() / file).unlink(missing_ok=True)
    return checkpoint


def _check_options(run_dir: Path, args: dict[str, Any]) -> None:
    """Check that a run's options are those of a run that can be published."""
    if args['model'].partition('.')[0] not in timm.list_models(module='delugenet') or args.get('model_kwargs'):
        raise ValueError(f'{run_dir}: a run of {args["model"]} with model_kwargs {args.get("model_kwargs")}; only '
                         f'models of this package, without further arguments, can be published')
    for option in ('gp', 'pretrained_path', 'bn_eps', 'class_map', 'start_epoch'):
        if args.get(option) not in (None, '', 'avg'):
            raise ValueError(f'{run_dir}: a run with {option}: {args[option]}, which cannot be published')
    if args.get('cooldown_epochs') or args.get('warmup_prefix') or args.get('lr_cycle_limit', 1) != 1:
        raise ValueError(f'{run_dir}: a run with cooldown_epochs, warmup_prefix or lr_cycle_limit: how many epochs it '
                         f'was to have is not known, so that it cannot be published')


def _read_teacher(all_args: Sequence[dict[str, Any]]) -> str | None:
    """Get the name of the last teacher that the parts of a run had."""
    name = next((args['kd_model_name'] for args in reversed(all_args) if args.get('kd_model_name')), None)
    if name in timm.list_models(module='delugenet'):
        raise ValueError(f'kd_model_name: {name}: the checkpoint that was the default then is not known; write its '
                         f'name with the tag into args.yaml, and give this file its time back (touch -d)')
    return name


def _read_last_weights(run_dir: Path, epochs_done: int, epochs: int, use_ema: bool) -> dict[str, torch.Tensor]:
    """Read the weights, or their moving average, that a complete run left after its last epoch."""
    last = run_dir / 'last.pth.tar'
    if epochs_done < epochs:
        raise ValueError(f'{run_dir}: {epochs_done} of {epochs} epochs are done; resume the run with '
                         f'train.py --resume {last}')
    state_dict = read_tensors(str(last), use_ema=use_ema)
    epoch = read_training_state(last).get('epoch', epochs_done - 1)  # averaged checkpoints have none
    if epoch != epochs_done - 1:
        raise ValueError(f'{last}: has the weights of epoch {epoch}, and the last of the summaries is epoch '
                         f'{epochs_done - 1}; resume the run with train.py --resume {last}')
    return state_dict


def _create_model(args: dict[str, Any], base: Checkpoint | None, class_names: list[str], img_size: int | None) -> Any:
    """Make a run's model, with the input that the checkpoint is for in its pretrained configuration."""
    model: Any = timm.create_model(
        base.model if base else args['model'], num_classes=len(class_names),
        pretrained_cfg_overlay=base.pretrained_cfg() if base else None)
    size = {'input_size': None, 'img_size': img_size} if img_size else {}
    config = resolve_data_config({**args, **size}, model=model)
    sequences = {option: list(config[option]) for option in ('input_size', 'mean', 'std')}
    model.pretrained_cfg.update(
        {option: config[option] for option in INPUT_OPTIONS}, **sequences, label_names=class_names)
    return model


def write_weights(state_dict: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Write tensors to the weights folder, in parts if they are large.

    Args:
        state_dict: The tensors by name.
        name: Name of the checkpoint.

    Returns:
        The manifest's `file`, `bytes`, `sha256` and `parts`.
    """
    with TemporaryDirectory(dir=weights_dir()) as folder:
        save_torch_state_dict(
            state_dict, folder, filename_pattern=f'{name}{{suffix}}.safetensors', max_shard_size=PART_BYTES)
        written = sorted(Path(folder).iterdir())  # the index last
        parts = [_account(path.name, path.read_bytes()) for path in written]
        split = len(parts) > 1
        whole = _account(f'{name}.safetensors', joined_bytes(state_dict)) if split else parts[0]
        for path in written:
            path.chmod(0o644)  # safetensors leaves a file to its owner alone
            path.replace(weights_dir() / path.name)
    return {**whole, 'parts': parts if split else []}


def _account(file: str, data: bytes) -> dict[str, Any]:
    return dict(file=file, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read_args(run_dir: Path) -> dict[str, Any]:
    path = run_dir / 'args.yaml'
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f'{path}: this is no YAML: {" ".join(str(error).split())}') from error
    missing = {'model', 'epochs', 'train_split', 'val_split', 'seed'}.difference(args if isinstance(args, dict) else ())
    if missing:
        raise ValueError(f'{path}: expected the options of a run of train.py, there is no {sorted(missing)[0]}')
    for name, expected in ('model', str), ('train_split', str), ('val_split', str), ('epochs', int), ('seed', int):
        if not isinstance(args[name], expected):
            raise ValueError(f'{path}: {name}: {args[name]}: expected {expected.__name__}')
    return args


def _pretrained_checkpoint(args: dict[str, Any]) -> Checkpoint | None:
    """Get the published checkpoint that a run's `--pretrained` loaded, if it has that option."""
    if not args.get('pretrained'):
        return None
    model_name, _, tag = args['model'].partition('.')
    if not tag:
        raise ValueError(f'the run started from the checkpoint of {model_name} that was the default then; write which '
                         f'that was, {model_name}.TAG, as the model into its args.yaml, and give this file its time '
                         f'back (touch -d)')
    return find_checkpoint(args['model'])


def _hours(run_dir: Path) -> float:
    seconds = (run_dir / 'summary.csv').stat().st_mtime - (run_dir / 'args.yaml').stat().st_mtime
    if seconds < 0:
        raise ValueError(f'{run_dir / "args.yaml"}: was written after summary.csv, so that the hours of the run are '
                         f'unknown; give it the time of the start (touch -d)')
    return seconds / 3600


def _check_made_of(base: Checkpoint, initial_checkpoint: str | None) -> None:
    """Check that a run's initial checkpoint was made from a published one: the stem and the classifier must agree."""
    if not initial_checkpoint:
        raise ValueError(
            f'the run had no --initial-checkpoint that could have been made of {base.name}; if it was resumed without '
            f'that option, write initial_checkpoint into its args.yaml, and give this file its time back (touch -d)')
    if not Path(initial_checkpoint).is_file():
        raise FileNotFoundError(f'{initial_checkpoint}: the run started from this file, which is not there; make it of '
                                f'{base.name} again, or go to the folder in which the run was started')
    tensors, of_base = read_tensors(initial_checkpoint), load_checkpoint(base)
    for name in ('stem.conv.weight', 'head.fc.bias'):
        expected = of_base[name].float()
        if name not in tensors or not torch.equal(tensors[name][:len(expected)].float(), expected):
            raise ValueError(f'{initial_checkpoint}: was not made of {base.name}, whose {name} is another one')


def _read_log(run_dirs: Sequence[Path], known_start: str | None) -> tuple[dict[int, dict[str, str]], int]:
    """Read each epoch's row of train.py's summaries; where folders of a resumed run overlap, the later one counts.

    Args:
        run_dirs: See `add_checkpoint`.
        known_start: The first run's `--initial-checkpoint`, if it is known from what it was made.

    Returns:
        The rows by epoch, and the number of epochs that the last run did. The epochs of a run that started from another
        one's checkpoint are numbered on from there.

    Raises:
        ValueError: If a run started from a checkpoint that is not in any of the folders before it, or does not go on
            from them, no epoch is done, or earlier epochs are missing.
    """
    log: dict[int, dict[str, str]] = {}
    before = 0
    for i, run_dir in enumerate(run_dirs):
        args = _read_args(run_dir)
        start, resumed = args.get('initial_checkpoint'), args.get('resume')
        goes_on = resumed and Path(resumed).resolve().parent in [folder.resolve() for folder in run_dirs[:i]]
        if start and not goes_on and start != known_start:
            if not Path(start).exists() or not any(Path(start).samefile(d / 'last.pth.tar') for d in run_dirs[:i]):
                raise ValueError(f'{run_dir}: the run started from {start}, which is not published; give the folder of '
                                 f'the run that left it, too, or publish it, and start from it with --pretrained, or '
                                 f'name the published one that it was made of (--base-model)')
            before = 1 + max(log)
        summary = run_dir / 'summary.csv'
        try:
            with summary.open(newline='') as f:
                # where a run was resumed in its folder, the header is repeated
                rows = {before + int(row['epoch']): row for row in csv.DictReader(f) if row['epoch'] != 'epoch'}
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{summary}: expected a summary of train.py, with the number of an epoch in each row '
                             f'({error!r})') from error
        if before in rows.keys() & log.keys() and not goes_on:
            raise ValueError(f'{run_dir}: the run has a first epoch, as one of a folder before it has, and its '
                             f'args.yaml does not say that it goes on from there. If it started from what that left, '
                             f'and was resumed without --initial-checkpoint, write initial_checkpoint into args.yaml, '
                             f'and give this file its time back (touch -d)')
        log.update({epoch: {**row, 'epoch': str(epoch)} for epoch, row in rows.items()})
        if not log:
            raise ValueError(f'{summary}: no epoch is done yet')
        first = min(rows, default=before)
        if resumed and first >= before + args.get('val_interval', 1) and not any(before <= e < first for e in log):
            raise ValueError(f'{run_dir}: epoch {first - 1} is not there, as the run goes on from {resumed}; give '
                             f'the folder of the run that left this, too')
    return log, 1 + max(log) - before


def _write_log(log: dict[int, dict[str, str]], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, list(next(iter(log.values()))), extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(log[epoch] for epoch in sorted(log))
