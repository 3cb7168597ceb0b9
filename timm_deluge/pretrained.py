"""Choose the checkpoint that a model is created with, and check that it is what was published."""
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from timm.models import get_arch_pretrained_cfgs, resolve_pretrained_cfg
from torch import nn

from .download import as_clause, download_checkpoint
from .paper import published
from .weights import (
    HUB_FILE,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    join_parts,
    list_checkpoints,
    load_checkpoint,
    load_download,
)

__all__ = ['checkpoint_filter_fn', 'choose_checkpoint', 'is_default_cfg']

_logger = logging.getLogger(__name__)


def is_default_cfg(variant: str, cfg: Any) -> bool:
    """Tell whether a model takes its default configuration: none was given, or the one that newer timm scripts pass.

    Args:
        variant: The model's name in timm's registry.
        cfg: What `timm.create_model` was given as `pretrained_cfg`.
    """
    if not cfg or isinstance(cfg, str):
        return not cfg
    return bool(resolve_pretrained_cfg(variant, cfg) == resolve_pretrained_cfg(variant))


def choose_checkpoint(
        variant: str,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Read the checkpoint that a model is to be created with, check it against the manifest, and log what it is.

    Args:
        variant: The model's name in timm's registry.
        pretrained_cfg, pretrained_cfg_overlay, cache_dir: What `timm.create_model` was given.

    Returns:
        The overlay, with the tensors if the checkpoint is the package's or comes from the Hugging Face Hub.

    Raises:
        CheckpointError: If there is no such checkpoint, it is not what was published, or it could not be downloaded.
        huggingface_hub.errors.HTTPError, OSError: If another repository's file could not be downloaded; as in timm.
    """
    cfg, overlay = pretrained_cfg or '', pretrained_cfg_overlay or {}
    own_source = overlay.keys() & {'file', 'url', 'hf_hub_id', 'state_dict'}
    if cfg and not isinstance(cfg, str):
        given = resolve_pretrained_cfg(variant, cfg)
        if given in get_arch_pretrained_cfgs(variant).values():
            cfg = given.tag or ''  # newer timm scripts pass the registry's configuration
    checkpoint: Checkpoint | None
    if isinstance(cfg, str) and not own_source:
        checkpoint = find_checkpoint(f'{variant}.{cfg}')
    else:
        if own_source:
            overlay = {'file': None, **overlay}  # instead of the registry's
        source = resolve_pretrained_cfg(variant, cfg, overlay)
        if source.hf_hub_id and (source.source == 'hf-hub' or not (source.file or source.state_dict)):
            state_dict = load_download(source.hf_hub_id, source.hf_hub_filename or HUB_FILE, cache_dir)
            return {**overlay, 'source': None, 'state_dict': state_dict}  # so that timm does not load it again
        checkpoint = None if source.state_dict else next(
            (c for c in list_checkpoints() if source.file == str(c.path)), None)
    if checkpoint:
        state_dict = _load_or_download(checkpoint, cache_dir)
        overlay = {**overlay, 'file': str(checkpoint.path), 'state_dict': state_dict}
        _say_what_it_is(checkpoint.name)
    return overlay


def _load_or_download(checkpoint: Checkpoint, cache_dir: str | Path | None) -> dict[str, torch.Tensor]:
    if checkpoint.hf_hub_id and not checkpoint.files:
        try:
            if cache_dir:
                return load_download(checkpoint.hf_hub_id, cache_dir=cache_dir)
            download_checkpoint(checkpoint, checkpoint.hf_hub_id)
        except (HTTPError, OSError) as error:
            raise CheckpointError(
                f'{checkpoint.name} is not here and could not be downloaded from {checkpoint.hf_hub_id}: '
                f'{as_clause(error)}. Once it can: timm-deluge weights download {checkpoint.name}') from error
    return load_checkpoint(checkpoint)


@cache
def _say_what_it_is(name: str) -> None:
    """Log once what a checkpoint is, as a warning if the paper does not report its model on the same data set."""
    checkpoint = find_checkpoint(name)
    level = logging.INFO if checkpoint.dataset_key in published(checkpoint.model).top1_error else logging.WARNING
    _logger.log(
        level, '%s knows the %d classes of %s and takes %dx%d pixels; %.2f %% of %d %s images are classified right.',
        name, len(checkpoint.class_names), checkpoint.dataset['name'], *checkpoint.input_size[:0:-1],
        checkpoint.metrics['top1'], checkpoint.metrics['num_images'], checkpoint.dataset['split'])


def _without_neutral(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Leave out the ones and zeros that `timm.utils.freeze` gives a batch normalisation without parameters."""
    neutral = {
        f'{name}.{parameter}': value
        for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.affine
        for parameter, value in (('weight', 1.), ('bias', 0.))}
    return {k: v for k, v in state_dict.items() if k not in neutral or not bool((v == neutral[k]).all())}


def checkpoint_filter_fn(
        state_dict: dict[str, torch.Tensor],
        model: nn.Module,
        strict: bool = True,
) -> dict[str, torch.Tensor]:
    """Check a checkpoint's tensors against the model before any is copied.

    Args:
        state_dict: The tensors of the checkpoint, or of its first part if the model's `pretrained_cfg` names that file.
            If `choose_checkpoint` has put tensors into `pretrained_cfg`, those are the checkpoint instead.
        model: The model it is meant for; its numbers of classes and of input channels may differ.
        strict: Whether missing and unexpected tensors are errors, as in `torch.nn.Module.load_state_dict`.

    Returns:
        The whole checkpoint.

    Raises:
        CheckpointError: If a tensor is missing, unexpected or of another shape.
    """
    cfg: Any = model.pretrained_cfg
    verified = cfg.pop('state_dict', None)  # need not be kept with the configuration
    if verified:  # regardless of what timm has read
        state_dict = verified
    elif cfg.get('file'):
        state_dict = join_parts(state_dict, cfg['file'])
    state_dict = _without_neutral(state_dict, model)
    other_head = model.num_classes != len(state_dict.get('head.fc.weight', ()))

    def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int | str, ...]]:
        found: dict[str, tuple[int | str, ...]] = {
            k: tuple(getattr(v, 'shape', ()))  # a value need not be a tensor
            for k, v in tensors.items() if not (other_head and k.startswith('head.fc.'))}
        if len(stem := found.get('stem.conv.weight', ())) == 4:
            found['stem.conv.weight'] = (stem[0], 'in_chans', *stem[2:])
        return found

    expected, found = shapes(model.state_dict()), shapes(state_dict)
    for name in expected.keys() ^ found.keys():
        if not strict or (name in expected and name.endswith('.num_batches_tracked')):  # frozen norms have none
            (expected if name in expected else found).pop(name)
    differing = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    if differing:
        key = differing[0]
        raise CheckpointError(
            f'The checkpoint does not fit this model: {len(differing)} tensors differ, the first one is {key} '
            f'(model: {expected.get(key, "absent")}, checkpoint: {found.get(key, "absent")}). '
            f'Create the model with the arguments it was trained with.')
    return state_dict
