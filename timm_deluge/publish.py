"""Turn a run of timm's train.py into a checkpoint of the manifest."""
import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import yaml
from timm.data import create_dataset, resolve_data_config
from timm.models import load_state_dict, resolve_pretrained_cfg

from .recipes import recipe_path
from .validate import create_validation_loader, list_classes, validate
from .weights import Checkpoint, list_checkpoints, weights_dir, write_manifest

__all__ = ['add_checkpoint']


def add_checkpoint(
        run_dirs: Sequence[Path],
        tag: str,
        data_dir: Path,
        recipe: str,
        dataset_name: str,
        provenance: str,
        hardware: str,
) -> Checkpoint:
    """Publish the last checkpoint of a training run: fp16 file, measured accuracy, manifest entry.

    The last epoch's weights are taken, not those with the best accuracy on the test images.

    Args:
        run_dirs: Output folder of train.py, with `args.yaml`, `summary.csv` and `last.pth.tar`; several for a run that
            was resumed, in order. The hours are those from each one's first file to its last checkpoint.
        tag: Pretrained tag, `<recipe>_<dataset>`.
        data_dir: The data set, with train and validation folders as train.py read them.
        recipe: Name of the recipe it was trained with.
        dataset_name: Name of the data set.
        provenance: Where exactly the images come from.
        hardware: What it was trained on.

    Returns:
        The new entry, already written; one of the same name is replaced.

    Raises:
        FileNotFoundError: If a file of the run or the data set is missing.
        ValueError: If the run is not complete, or of a model that is not the package's as it stands.
        LookupError: If there is no such recipe.
    """
    recipe_path(recipe)
    run_dir = run_dirs[-1]
    args: dict[str, Any] = yaml.safe_load((run_dir / 'args.yaml').read_text())
    if args['model'] not in timm.list_models(module='delugenet') or args.get('model_kwargs'):
        raise ValueError(f'{run_dir}: a run of {args["model"]} with model_kwargs {args.get("model_kwargs")}; only '
                         f'models of this package, without further arguments, can be published')
    with (run_dir / 'summary.csv').open() as f:
        epochs_done = 1 + int(list(csv.DictReader(f))[-1]['epoch'])
    if epochs_done < args['epochs']:
        raise ValueError(f'{run_dir}: {epochs_done} of {args["epochs"]} epochs are done; resume the run with '
                         f'train.py --resume {run_dir / "last.pth.tar"}')

    state_dict = load_state_dict(str(run_dir / 'last.pth.tar'))
    train_set = create_dataset('', root=str(data_dir / args['train_split']))
    class_names = list_classes(train_set)
    config = resolve_data_config(args, pretrained_cfg=resolve_pretrained_cfg(args['model']).to_dict())
    input_config = dict(
        input_size=list(config['input_size']), mean=list(config['mean']), std=list(config['std']),
        interpolation=config['interpolation'], crop_pct=config['crop_pct'], label_names=class_names,
    )
    path = weights_dir() / f'{args["model"]}.{tag}.safetensors'
    partial = path.with_suffix('.partial')
    safetensors.torch.save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state_dict.items()}, partial)
    try:
        model = timm.create_model(args['model'], num_classes=len(class_names), pretrained_cfg_overlay=input_config)
        model.load_state_dict(safetensors.torch.load_file(partial))
        loader = create_validation_loader(model, data_dir / args['val_split'], batch_size=250, workers=1)
        accuracy = validate(model.eval(), loader)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

    data = path.read_bytes()
    checkpoint = Checkpoint(
        model=args['model'],
        tag=tag,
        file=path.name,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        num_params=sum(p.numel() for p in model.parameters()),
        class_names=input_config.pop('label_names'),
        **input_config,
        dataset=dict(
            name=dataset_name,
            train_images=len(train_set),
            test_images=accuracy.num_images,
            provenance=provenance,
        ),
        recipe=recipe,
        epochs=args['epochs'],
        seed=args['seed'],
        hardware=hardware,
        hours=round(sum(
            (d / 'last.pth.tar').stat().st_mtime - (d / 'args.yaml').stat().st_mtime for d in run_dirs) / 3600, 2),
        metrics=dict(top1=round(accuracy.top1, 2), top5=round(accuracy.top5, 2), num_images=accuracy.num_images),
        command=f'timm-deluge validate {args["model"]}.{tag} --data-dir DIR/{args["val_split"]}',
    )
    entries = {c.name: c for c in list_checkpoints()}
    write_manifest(list({**entries, checkpoint.name: checkpoint}.values()))
    return checkpoint
