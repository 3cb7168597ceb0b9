"""Turn a run of timm's train.py into a checkpoint of the manifest."""
import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import yaml
from timm.data import resolve_data_config
from timm.models import load_state_dict, resolve_pretrained_cfg

from .validate import create_validation_loader, validate
from .weights import Checkpoint, list_checkpoints, weights_dir, write_manifest

__all__ = ['add_checkpoint']


def add_checkpoint(
        run_dir: Path,
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
        run_dir: Output folder of train.py, with `args.yaml` and `last.pth.tar`.
        tag: Pretrained tag, `<recipe>_<dataset>`.
        data_dir: The data set, with train and validation folders as train.py read them.
        recipe: Name of the recipe it was trained with.
        dataset_name: Name of the data set.
        provenance: Where exactly the images come from.
        hardware: What it was trained on.

    Returns:
        The new entry, already written; one of the same name is replaced.

    Raises:
        FileNotFoundError: If the run is not complete.
    """
    args: dict[str, Any] = yaml.safe_load((run_dir / 'args.yaml').read_text())
    last = run_dir / 'last.pth.tar'
    state_dict = {k: v.half() if v.is_floating_point() else v for k, v in load_state_dict(str(last)).items()}
    class_names = sorted(p.name for p in (data_dir / args['train_split']).iterdir() if p.is_dir())
    file = f'{args["model"]}.{tag}.safetensors'
    path = weights_dir() / file
    safetensors.torch.save_file({k: v.contiguous() for k, v in state_dict.items()}, path)

    config = resolve_data_config(args, pretrained_cfg=resolve_pretrained_cfg(args['model']).to_dict())
    input_config = dict(
        input_size=list(config['input_size']), mean=list(config['mean']), std=list(config['std']),
        interpolation=config['interpolation'], crop_pct=config['crop_pct'],
    )
    model = timm.create_model(args['model'], num_classes=len(class_names), pretrained_cfg_overlay=input_config)
    model.load_state_dict(safetensors.torch.load_file(path))
    loader = create_validation_loader(model, data_dir / args['val_split'], batch_size=250, workers=1)
    accuracy = validate(model.eval(), loader)

    data = path.read_bytes()
    checkpoint = Checkpoint(
        model=args['model'],
        tag=tag,
        file=file,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        num_params=sum(p.numel() for p in model.parameters()),
        class_names=class_names,
        **input_config,
        dataset=dict(
            name=dataset_name,
            train_images=sum(1 for _ in (data_dir / args['train_split']).rglob('*.*')),
            test_images=accuracy.num_images,
            provenance=provenance,
        ),
        recipe=recipe,
        epochs=args['epochs'],
        seed=args['seed'],
        hardware=hardware,
        hours=round((last.stat().st_mtime - (run_dir / 'args.yaml').stat().st_mtime) / 3600, 2),
        metrics=dict(top1=round(accuracy.top1, 2), top5=round(accuracy.top5, 2), num_images=accuracy.num_images),
        command=f'timm-deluge validate {args["model"]}.{tag} --data-dir DIR/{args["val_split"]}',
    )
    write_manifest([c for c in list_checkpoints() if c.name != checkpoint.name] + [checkpoint])
    return checkpoint
