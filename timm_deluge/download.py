"""Download a checkpoint's file from the Hugging Face Hub, and keep it only if it is what the manifest says."""
import hashlib
from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from .weights import HUB_FILE, Checkpoint, CheckpointError, downloads_dir

__all__ = ['as_clause', 'download_checkpoint']


def as_clause(error: Exception) -> str:
    """Get what an error says without its full stop, so that a sentence can follow; its type if it says nothing."""
    return str(error).rstrip('. \n') or type(error).__name__


def download_checkpoint(checkpoint: Checkpoint, repo_id: str) -> Path:
    """Download a checkpoint into the Hugging Face cache; an interrupted download resumes where it stopped.

    Processes that want the same file wait for the first one.

    Args:
        checkpoint: The manifest's entry.
        repo_id: Repository of the Hub that has it, `USER/REPO` or `USER/REPO@REVISION`.

    Returns:
        The file.

    Raises:
        huggingface_hub.errors.HFValidationError: If there can be no repository of that name.
        CheckpointError: If the repository's file is not what the manifest says; nothing of it is kept.
        huggingface_hub.errors.HTTPError: If the Hub refuses (HfHubHTTPError), or the connection is lost.
        OSError: If the file cannot be written, such as on a full disk.
    """
    repository, _, revision = repo_id.partition('@')
    url = hf_hub_url(repository, HUB_FILE, revision=revision or None)
    target = downloads_dir() / checkpoint.file
    incomplete = target.with_suffix(f'.{repo_id.replace("/", "--")}.incomplete')
    target.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(target.with_suffix('.lock')):
        if not target.is_file():
            with incomplete.open('ab') as file:
                while (begin := file.tell()) < checkpoint.bytes:
                    try:
                        http_get(
                            url, file, resume_size=begin, headers=build_hf_headers(),
                            displayed_filename=checkpoint.file)
                        break
                    except HTTPError as error:  # not every huggingface_hub version resumes after a lost connection
                        if isinstance(error, HfHubHTTPError) or file.tell() <= begin:
                            raise
            sha256 = hashlib.sha256(incomplete.read_bytes()).hexdigest()
            if sha256 != checkpoint.sha256:
                incomplete.unlink()
                raise CheckpointError(
                    f'{HUB_FILE} of {repo_id} has the SHA-256 {sha256}, but the manifest says {checkpoint.sha256} of '
                    f'{checkpoint.name}. Nothing of it was kept. Try again, or name another repository.')
            incomplete.replace(target)
            for other in target.parent.glob(f'{target.stem}.*.incomplete'):  # of other repositories
                other.unlink()
    return target
