"""The checkpoints: what the manifest says about them, and checks that their files agree with it.

`weights/manifest.json` is the one source of truth. timm's pretrained configurations, the model card and the README's
accuracies are derived from it, and every file is checked against its SHA-256 before a tensor is read from it.
"""
import hashlib
import json
import os
import re
import struct
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.constants import HF_ASSETS_CACHE
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from timm.models import load_state_dict

__all__ = [
    'HUB_FILE', 'Checkpoint', 'CheckpointError', 'downloads_dir', 'find_checkpoint', 'join_parts', 'joined_bytes',
    'list_checkpoints', 'load_checkpoint', 'load_download', 'read_tensors', 'read_training_state',
    'verify_checkpoint', 'weights_dir', 'write_manifest',
]

MANIFEST = 'manifest.json'
MAX_PACKAGED_PARAMS = 7_000_000  # pyproject.toml leaves out larger checkpoints
REMEDY = 'Restore it with `git checkout` or reinstall timm-deluge.'
_DAMAGE = (  # errors that reading a damaged checkpoint can raise
    AttributeError, EOFError, LookupError, RuntimeError, SafetensorError, struct.error, TypeError, UnpicklingError,
    ValueError)
INSTALLED = 'checkpoints'  # the folder in an installed package
HUB_FILE = 'model.safetensors'  # timm's name of a checkpoint in a repository of the Hugging Face Hub


class CheckpointError(RuntimeError):
    """A checkpoint does not exist, or its file is not what the manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """One trained checkpoint, as the manifest describes it.

    Attributes:
        model: Name in timm's registry.
        tag: What timm calls the pretrained tag, `<recipe>_<dataset>`.
        file: Name of the safetensors file with all tensors: the one in the weights folder or, if there are `parts`, the
            one into which they are joined for the Hugging Face Hub.
        bytes: Size of that file.
        sha256: SHA-256 of that file.
        parts: `file`, `bytes` and `sha256` of each file of the weights folder that has some of the tensors, and of the
            index by the Hub's convention, `<file>.index.json`, that says where each tensor is. Empty if one file has
            all tensors.
        num_params: Number of parameters, buffers excluded.
        class_names: Name of each class, in the order of the logits.
        class_descriptions: What each name stands for, such as WordNet's words for its identifiers, or None.
        input_size: Channels, height and width the metrics were measured at.
        mean: Channel means that the input, with values in [0, 1], is normalised with.
        std: Channel standard deviations that it is normalised with.
        interpolation: Interpolation the images are resized with.
        crop_pct: Side of the centre crop over that of the resized image.
        dataset: `name`, `train_images`, `test_images` and `provenance` of the data; `split` is what its authors call
            the images that the metrics were measured on, 'test' or 'validation'; `inexact` names those
            that are not pixel by pixel what the authors published.
        base_model: Name of the checkpoint that training started from, or None.
        teacher: Name of the model that training imitated (distillation), or None.
        recipe: Name of the recipe, see `timm-deluge recipe`.
        epochs: Passes over the training images, since `base_model`.
        seed: Random seed; for a run in parts, that of the last part.
        ema_decay: Decay of the weights' moving average if this average was published, or None.
        settled_images: Number of training images on which the running statistics were re-estimated after training, or
            None.
        hardware: Hardware that it was trained on.
        hours: Wall-clock hours of training.
        metrics: `top1` and `top5`, the accuracies in percent, and `num_images`, the number of images they were measured
            on; `exact` has the same without the inexact images.
        command: The command that reproduces the metrics.
        hf_hub_id: Repository of the Hugging Face Hub that it was published in, or None.
    """
    model: str
    tag: str
    file: str
    bytes: int
    sha256: str
    parts: Sequence[dict[str, Any]]
    num_params: int
    class_names: Sequence[str]
    class_descriptions: dict[str, str] | None
    input_size: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str
    crop_pct: float
    dataset: dict[str, Any]
    base_model: str | None
    teacher: str | None
    recipe: str
    epochs: int
    seed: int
    ema_decay: float | None
    settled_images: int | None
    hardware: str
    hours: float
    metrics: dict[str, Any]
    command: str
    hf_hub_id: str | None

    @property
    def name(self) -> str:
        """Name as `timm.create_model` takes it, `<model>.<tag>`."""
        return f'{self.model}.{self.tag}'

    @property
    def dataset_key(self) -> str:
        """Short name of the data set, as the tag ends with it."""
        return self.tag.rsplit('_', 1)[-1]

    @property
    def files(self) -> list[dict[str, Any]]:
        """Path, size and SHA-256 of the file on this machine, or of each of its parts; empty if it is not here."""
        whole: dict[str, Any] = dict(file=self.file, bytes=self.bytes, sha256=self.sha256)
        for folder in weights_dirs().values():
            for files in self.parts, [whole]:
                found = [{**file, 'path': folder / file['file']} for file in files]
                if found and all(os.path.isfile(file['path']) for file in found):
                    return found
        return []

    @property
    def file_names(self) -> set[str]:
        """Names of the file and of its parts."""
        return {self.file, *(part['file'] for part in self.parts)}

    @property
    def has_connections(self) -> bool:
        """Whether the model is a DelugeNet, and not a network with residual sums."""
        return 'delugenet' in self.model

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is large, so that the package leaves it out, and none of its files is on this machine."""
        is_large = bool(self.parts) or self.num_params > MAX_PACKAGED_PARAMS
        return is_large and not any(
            os.path.exists(folder / name) for folder in weights_dirs().values() for name in self.file_names)

    @property
    def path(self) -> Path:
        """Path on this machine of the file or of its first part; where it would be, if it is not here."""
        files = self.files
        return files[0]['path'] if files else weights_dir() / (self.parts[0]['file'] if self.parts else self.file)

    def pretrained_cfg(self) -> dict[str, Any]:
        """The part of timm's pretrained configuration that the checkpoint decides."""
        return dict(
            file=None if self.is_elsewhere and not self.hf_hub_id else str(self.path),  # timm lists tags with a file
            num_classes=len(self.class_names),
            label_names=tuple(self.class_names),
            label_descriptions=self.class_descriptions,
            input_size=tuple(self.input_size),
            mean=tuple(self.mean),
            std=tuple(self.std),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )


def weights_dir() -> Path:
    """Folder of the manifest: `checkpoints/` in an installed package, `weights/` in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / INSTALLED
    return installed if installed.is_dir() else package.parent / 'weights'


def downloads_dir() -> Path:
    """Folder of downloaded checkpoints, in the Hugging Face cache."""
    return Path(HF_ASSETS_CACHE) / 'timm_deluge'


def weights_dirs() -> dict[str, Path]:
    """Folders that may have a checkpoint's files, keyed by a description, in the order in which they are searched."""
    folders = {'the package': weights_dir()}
    checkout = _checkout()
    if checkout and (checkout / 'weights').resolve() != weights_dir():
        folders['the checkout that it was installed from'] = checkout / 'weights'
    return {**folders, 'the Hugging Face cache': downloads_dir()}


def _checkout() -> Path | None:
    """Get the folder from which pip installed the package, as recorded by pip (PEP 610)."""
    try:
        url = urlparse(json.loads(distribution('timm-deluge').read_text('direct_url.json') or '{}').get('url', ''))
    except PackageNotFoundError:
        return None
    return Path(url2pathname(url.path)) if url.scheme == 'file' else None


def list_checkpoints() -> list[Checkpoint]:
    """Read the manifest.

    Returns:
        The checkpoints in the manifest's order; a model's first one is its default.

    Raises:
        CheckpointError: If the manifest is missing or malformed.
    """
    path = weights_dir() / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding='utf-8'))['checkpoints']
        return [Checkpoint(**entry) for entry in entries]
    except FileNotFoundError:
        raise CheckpointError(f'{path}: the manifest of checkpoints is missing; reinstall timm-deluge.') from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f'{path}: not a manifest of checkpoints ({error}); reinstall timm-deluge.') from error


def find_checkpoint(name: str) -> Checkpoint:
    """Look up a checkpoint.

    Args:
        name: `<model>.<tag>`, or `<model>` for the model's first checkpoint.

    Returns:
        The manifest's entry.

    Raises:
        CheckpointError: If there is none; the message lists those there are and, if the model has none, says how to
            train one.
    """
    model, _, tag = name.partition('.')
    checkpoints = list_checkpoints()
    for checkpoint in checkpoints:
        if checkpoint.model == model and tag in ('', checkpoint.tag):
            return checkpoint
    available = ', '.join(c.name for c in checkpoints) or 'none'
    if any(c.model == model for c in checkpoints):
        raise CheckpointError(f"{model} has no checkpoint with the tag '{tag}'. Available: {available}.")
    models = timm.list_models(module='delugenet')
    if model not in models:
        raise CheckpointError(f'{model} is no model of this package; the nearest name is '
                              f'{get_close_matches(model, models, 1, 0)[0]}. With checkpoints: {available}.')
    raise CheckpointError(
        f'{model} has no pretrained checkpoint yet. Available: {available}. '
        f'Use pretrained=False for random weights, or train one with timm: '
        f'python train.py --device-modules timm_deluge --model {model} --data-dir DIR '
        f'(`timm-deluge recipe` lists ready-made option files).')


def verify_checkpoint(checkpoint: Checkpoint) -> None:
    """Check a checkpoint's files against the manifest.

    Args:
        checkpoint: The manifest's entry.

    Raises:
        CheckpointError: If a file is missing, truncated or altered; the message says where it was looked for, and how
            to get it.
    """
    for _ in _verified_contents(checkpoint):
        pass


def _verified_contents(checkpoint: Checkpoint) -> Iterator[tuple[Path, bytes]]:
    """Read a checkpoint's files one by one, each checked against the manifest."""
    files = checkpoint.files
    if not files:
        raise CheckpointError(_where_it_is_not(checkpoint))
    for file in files:
        path = file['path']
        remedy = REMEDY if path.parent != downloads_dir() else (
            f'Delete it and get it anew: `timm-deluge weights download {checkpoint.name}`.')
        size = path.stat().st_size
        if size != file['bytes']:
            raise CheckpointError(f'{path}: {size} bytes, but the manifest says {file["bytes"]}. {remedy}')
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != file['sha256']:
            raise CheckpointError(f'{path}: SHA-256 {sha256}, but the manifest says {file["sha256"]}. {remedy}')
        yield path, content


def _where_it_is_not(checkpoint: Checkpoint) -> str:
    names = [part['file'] for part in checkpoint.parts] or [checkpoint.file]
    missing = next((name for name in names if not (weights_dir() / name).is_file()), names[0])
    places = ', '.join(f'{what} ({folder})' for what, folder in weights_dirs().items())
    if checkpoint.hf_hub_id:
        remedy = f'`timm-deluge weights download {checkpoint.name}` gets it from {checkpoint.hf_hub_id}.'
    else:
        remedy = (f'The manifest records no repository of the Hugging Face Hub that has it: install the package from a '
                  f'checkout, which has it, or name a repository: '
                  f'`timm-deluge weights download {checkpoint.name} --repo-id USER/REPO`.')
    return f'{missing}: the file of {checkpoint.name} is missing. Looked in {places}. {remedy}'


def load_checkpoint(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors, as they are stored, from the very bytes that were checked against the manifest.

    Args:
        checkpoint: The manifest's entry.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: If a file is not what the manifest says.
    """
    state_dict: dict[str, torch.Tensor] = {}
    for path, content in _verified_contents(checkpoint):
        if path.suffix == '.safetensors':
            state_dict.update(load(content))
    return state_dict


def read_tensors(path: str, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """Read a checkpoint file of any kind that timm knows.

    Args:
        path: The file. If it is one part of a checkpoint, the other parts must lie beside it, see `join_parts`.
        use_ema: Read the weights' moving average if train.py has kept one.

    Raises:
        OSError: If there is no such file.
        CheckpointError: If it is no checkpoint, or damaged.
    """
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(f'{path}: no such file')
        return join_parts(dict(load_state_dict(path, use_ema=use_ema)), path)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f'{path}: this is no checkpoint, or damaged: {error}') from error


def read_training_state(path: Path) -> dict[str, Any]:
    """Read everything that a checkpoint of train.py holds: weights, optimizer state, options and epoch number.

    Args:
        path: The file.

    Raises:
        OSError: If there is no such file.
        CheckpointError: If it is no checkpoint, or damaged.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):
            return dict(torch.load(path, map_location='cpu', weights_only=True))
    except _DAMAGE as error:
        raise CheckpointError(f'{path}: this is no checkpoint, or damaged: {error}') from error


def join_parts(state_dict: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """Add the tensors that a file lacks because its checkpoint was split.

    Args:
        state_dict: The tensors of the file; those of the other parts are added to it.
        path: The file. A file named `<name>-<number>-of-<count>.safetensors` is a part by the Hugging Face Hub's
            convention, and the index beside it, `<name>.safetensors.index.json`, says which part has each tensor.

    Returns:
        The same dictionary. The tensors stay on the disk until they are used.

    Raises:
        CheckpointError: If the index is missing or invalid, or a part is missing or damaged.
    """
    path = Path(path)
    if part := re.fullmatch(r'(.+)-\d{5}-of-\d{5}\.safetensors', path.name):
        index = path.with_name(f'{part[1]}.safetensors.index.json')
        try:
            weight_map = json.loads(index.read_text(encoding='utf-8'))['weight_map']
            others = sorted({path.with_name(file) for name, file in weight_map.items() if name not in state_dict})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f'{index}: not an index of {path.name} and its other parts ({error}). '
                                  f'It has to lie beside them.') from error
        for other in others:
            try:
                state_dict.update(load_file(other))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f'{other}: a part of {path.name} is missing or damaged: {error}') from error
    return state_dict


def joined_bytes(state_dict: dict[str, torch.Tensor]) -> bytes:
    """Make the content of the single file into which a split checkpoint is joined for the Hugging Face Hub."""
    return save(state_dict, metadata={'format': 'pt'})


def load_download(
        hf_hub_id: str,
        filename: str = HUB_FILE,
        cache_dir: str | Path | None = None,
) -> dict[str, torch.Tensor]:
    """Read the tensors of a file from the Hugging Face Hub, from the very bytes that were checked against the manifest.

    If the manifest has no entry for the file, the SHA-256 that the Hub reports is used instead.

    Args:
        hf_hub_id: Repository, `USER/REPO` or `USER/REPO@REVISION`; its file is downloaded unless it is in the cache.
        filename: File in the repository.
        cache_dir: The Hub's cache on this machine, if it is not the usual one.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: If the file is truncated or altered, or is not a safetensors file.
        huggingface_hub.errors.HfHubHTTPError: If there is no such file.
    """
    if not filename.endswith('.safetensors'):
        raise CheckpointError(f'{filename} of {hf_hub_id}: only files of safetensors are loaded from the Hugging Face '
                              f'Hub. Name one, such as {HUB_FILE}, as hf_hub_filename.')
    repo_id, _, revision = hf_hub_id.partition('@')
    path = Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir))
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    blob = path.readlink().name if path.is_symlink() else ''  # its SHA-256; it may itself link to a shared file
    is_published = filename == HUB_FILE and not revision
    expected = next((c.sha256 for c in list_checkpoints() if is_published and c.hf_hub_id == repo_id), blob)
    if not re.fullmatch('[0-9a-f]{64}', expected):
        try:
            expected = str(get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision or None)).etag)
        except (HTTPError, OSError) as error:
            raise CheckpointError(f'{path}: without links in its cache, only the Hub can tell whether this is whole, '
                                  f'and it does not: {error}') from error
    if sha256 != expected:
        raise CheckpointError(f'{path}: SHA-256 {sha256} instead of {expected}. This is not what was published as '
                              f'{repo_id}: do not use it, delete {path.resolve()} and load the model again.')
    try:
        return load(content)
    except SafetensorError as error:
        raise CheckpointError(f'{filename} of {hf_hub_id}: this is no file of safetensors: {error}') from error


def write_manifest(checkpoints: Sequence[Checkpoint]) -> None:
    """Write the manifest, whole or not at all.

    Args:
        checkpoints: All entries, a model's default first.
    """
    path = weights_dir() / MANIFEST
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps({'checkpoints': [asdict(c) for c in checkpoints]}, indent=2) + '\n', encoding='utf-8')
    partial.replace(path)
