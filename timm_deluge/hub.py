"""Publish a checkpoint on the Hugging Face Hub, in the form that timm and transformers' timm wrapper load."""
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import save_config_for_hf

from .card import model_card
from .delugenet import checkpoint_cfg
from .weights import (
    HUB_FILE,
    INSTALLED,
    Checkpoint,
    CheckpointError,
    joined_bytes,
    list_checkpoints,
    load_checkpoint,
    weights_dir,
    write_manifest,
)

__all__ = ['hub_files', 'push_to_hub']


def hub_files(checkpoint: Checkpoint, repo_id: str) -> dict[str, bytes | Path]:
    """Gather a repository's files.

    Args:
        checkpoint: The manifest's entry.
        repo_id: The repository, `USER/REPO`.

    Returns:
        The configuration, the model card and the weights by file name, each as its content or as a file that has it.

    Raises:
        huggingface_hub.errors.HFValidationError: If the Hub would not take such a name.
        CheckpointError: If the checkpoint's file is not what the manifest says, or the repository holds another one.
    """
    validate_repo_id(repo_id)
    if '/' not in repo_id:
        raise HFValidationError(f"Repo id must be in the form 'USER/REPO': {repo_id!r}.")
    for other in list_checkpoints():
        if other.hf_hub_id == repo_id and other.name != checkpoint.name:
            raise CheckpointError(
                f'{repo_id} holds {other.name}, as the manifest says, and a repository holds one checkpoint: name '
                f'another one')
    weights = _one_file(checkpoint)
    model = timm.create_model(
        checkpoint.model, num_classes=len(checkpoint.class_names),
        pretrained_cfg_overlay={**checkpoint_cfg(checkpoint), 'tag': checkpoint.tag})
    with TemporaryDirectory() as folder:
        path: Any = Path(folder, 'config.json')  # timm's annotation is str, but some of its versions need a Path
        save_config_for_hf(model, path, model_config={
            'label_names': list(checkpoint.class_names), 'label_descriptions': checkpoint.class_descriptions})
        config = json.loads(path.read_text(encoding='utf-8'))
    config.pop('model_args', None)  # the architecture's own, which transformers would pass twice
    return {
        'README.md': model_card([checkpoint], repo_id).encode(),
        'config.json': json.dumps(config, indent=2).encode(),
        HUB_FILE: weights,
    }


def _one_file(checkpoint: Checkpoint) -> bytes | Path:
    """Join a checkpoint's parts, if it lies in parts: timm looks for one file on the Hub."""
    state_dict = load_checkpoint(checkpoint)
    if len(checkpoint.files) == 1:
        return checkpoint.path
    data = joined_bytes(state_dict)
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != checkpoint.sha256:
        raise CheckpointError(f'{checkpoint.file}: joined, the parts have the SHA-256 {sha256}, but the manifest says '
                              f'{checkpoint.sha256}. Join them with the safetensors version that split them.')
    return data


def push_to_hub(checkpoint: Checkpoint, repo_id: str) -> str:
    """Publish a checkpoint in one commit, in a repository that is created if need be.

    What an interrupted call has uploaded is not uploaded again. The token is that of `hf auth login`, or `HF_TOKEN`.

    Args:
        checkpoint: The manifest's entry; the repository is then recorded in it.
        repo_id: The repository, `USER/REPO`.

    Returns:
        Address of the commit.

    Raises:
        huggingface_hub.errors.HFValidationError: If the Hub would not take such a name.
        CheckpointError: If the checkpoint's file is not what the manifest says, the manifest belongs to an installed
            package, or it cannot be written after the checkpoint was published.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    files = hub_files(checkpoint, repo_id)
    if weights_dir().name == INSTALLED:
        raise CheckpointError(f'{weights_dir()}: what is published is recorded in the manifest, and this one goes with '
                              f'the installed package; publish from a checkout (`pip install -e .`)')
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=f'Publish {checkpoint.name}',
    )
    published = replace(checkpoint, hf_hub_id=repo_id)
    try:
        write_manifest([published if c.name == checkpoint.name else c for c in list_checkpoints()])
    except OSError as error:
        raise CheckpointError(
            f'{checkpoint.name} was published, {commit.commit_url}, but the manifest could not be updated: '
            f'{error}. Fix that and run this again: files that are unchanged on the Hub stay as they are.') from error
    return str(commit.commit_url)
