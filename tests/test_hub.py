"""A checkpoint goes to the Hugging Face Hub and comes back as it was, or not at all; the real client on our side."""
import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from test_cli import invoke

from timm_deluge import weights
from timm_deluge.card import model_card
from timm_deluge.hub import hub_files
from timm_deluge.weights import CheckpointError, list_checkpoints

REPO = 'somebody/delugenet146'


LOAD = f"""
model = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()
print(model.pretrained_cfg['label_names'][7], *model.pretrained_cfg['mean'], float(model.stem.conv.weight.sum()))
"""


def test_checkpoint_comes_back_as_it_was(server, call, publish, scratch_weights):
    result = publish()
    assert result.returncode == 0, result.stderr
    assert f'{server.url}/{REPO}/commit/' in result.stdout
    files = server.repos[REPO]
    assert files.keys() == {'README.md', 'config.json', 'model.safetensors'}
    assert files['model.safetensors'] == scratch_weights.read_bytes()
    assert weights.find_checkpoint('delugenet146').hf_hub_id == REPO

    loaded = call(LOAD)
    assert loaded.returncode == 0, loaded.stderr
    total = safetensors.torch.load_file(scratch_weights)['stem.conv.weight'].float().sum()
    assert loaded.stdout.split() == ['class_7', '0.5', '0.5', '0.5', str(float(total))]


def test_parts_are_published_as_one_file(server, call, publish, split_weights):
    checkpoint = weights.find_checkpoint('delugenet146')
    total = weights.load_checkpoint(checkpoint)['stem.conv.weight'].float().sum()
    result = publish()
    assert result.returncode == 0, result.stderr
    files = server.repos[REPO]
    assert files.keys() == {'README.md', 'config.json', 'model.safetensors'}
    assert hashlib.sha256(files['model.safetensors']).hexdigest() == checkpoint.sha256
    loaded = call(LOAD)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-1] == str(float(total))


def test_parts_that_join_to_another_file_are_not_published(split_weights, monkeypatch):
    monkeypatch.setattr('timm_deluge.hub.joined_bytes', lambda state_dict: b'another')
    with pytest.raises(CheckpointError, match='joined, the parts have the SHA-256'):
        hub_files(weights.find_checkpoint('delugenet146'), REPO)


def test_a_whole_file_is_not_joined_again(split_weights, monkeypatch):
    checkpoint = weights.find_checkpoint('delugenet146')
    joined = weights.joined_bytes(weights.load_checkpoint(checkpoint))
    for part in checkpoint.parts:
        (split_weights[0].parent / part['file']).unlink()
    whole = split_weights[0].parent / checkpoint.file
    whole.write_bytes(joined)
    monkeypatch.setattr('timm_deluge.hub.joined_bytes', None)
    assert hub_files(checkpoint, REPO)['model.safetensors'] == whole


def test_config_and_card_are_those_of_the_checkpoint(scratch_weights):
    checkpoint = weights.find_checkpoint('delugenet146')
    files = hub_files(checkpoint, REPO)
    config = json.loads(files['config.json'])
    assert (config['architecture'], config['num_classes']) == ('delugenet146', 100)
    assert config['label_names'] == checkpoint.class_names and config['pretrained_cfg']['tag'] == 'test_random'
    assert config['label_descriptions'] == checkpoint.class_descriptions
    assert not config['pretrained_cfg'].keys() & {'file', 'url'}
    of_larger_images = hub_files(replace(checkpoint, input_size=[3, 64, 64]), REPO)['config.json']
    assert json.loads(of_larger_images)['pretrained_cfg']['pool_size'] == [16, 16]
    assert 'model_args' not in config  # transformers' wrapper of timm would pass them twice
    card = ModelCard(files['README.md'].decode())
    assert card.data.library_name == 'timm' and f"'hf-hub:{REPO}', pretrained=True" in card.text
    assert '# DelugeNets' in card.text and 'install the package `timm-deluge`' in card.text


def test_card_of_a_baseline_claims_no_connections():
    checkpoints = list_checkpoints()
    of_baselines, of_others = ([c for c in checkpoints if c.has_connections == has] for has in (False, True))
    assert 'cross-layer' not in model_card(of_baselines[:1], REPO) and 'cross-layer' in model_card(of_others[:1], REPO)


def test_card_says_what_was_averaged_and_what_is_gone():
    for checkpoint in list_checkpoints():
        card = model_card([checkpoint])
        assert ('averaged with those it started from' in card) == ('_avg_' in checkpoint.tag)
        gone = checkpoint.base_model not in {None, *(c.name for c in list_checkpoints())}
        assert ('(in git’s history)' in card) == gone


def test_dry_run_shows_every_file_and_publishes_nothing(server, publish, scratch_weights):
    result = publish('--dry-run')
    assert result.returncode == 0, result.stderr
    for shown in (f'{REPO}/README.md', f'{REPO}/config.json', '"architecture": "delugenet146"',
                  f'{REPO}/model.safetensors, {scratch_weights.stat().st_size:,} bytes',
                  weights.find_checkpoint('delugenet146').sha256):
        assert shown in result.stdout
    assert not server.repos and not server.requests


@pytest.mark.parametrize('repo_id', ['bad repo id', 'a/b/c', '', 'somebody/', 'somebody/x--y', 'delugenet146'])
def test_a_name_that_the_hub_refuses_is_refused(scratch_weights, repo_id):
    with pytest.raises(HFValidationError, match=f'{repo_id!r}'):
        hub_files(weights.find_checkpoint('delugenet146'), repo_id)


def test_a_repository_holds_one_checkpoint(scratch_weights):
    checkpoint = weights.find_checkpoint('delugenet146')
    other = replace(checkpoint, tag='test_other', hf_hub_id=REPO)
    weights.write_manifest([checkpoint, other])
    with pytest.raises(weights.CheckpointError, match=f'{REPO} holds delugenet146.test_other'):
        hub_files(checkpoint, REPO)
    assert hub_files(other, REPO)


def test_dry_run_refuses_what_the_hub_refuses(server, publish):
    result = publish('--dry-run', '--repo-id', 'a/b/c')
    assert result.returncode == 2 and "'a/b/c'" in result.stderr and 'No file was published' not in result.stderr
    assert result.stdout == '' and not server.requests


def test_an_installed_packages_manifest_records_nothing(server, call, scratch_weights):
    installed = scratch_weights.parent.rename(scratch_weights.parent.with_name('checkpoints'))
    code = f'''
from pathlib import Path
from timm_deluge import hub, weights
weights.weights_dir = hub.weights_dir = lambda: Path({str(installed)!r})
hub.push_to_hub(weights.find_checkpoint('delugenet146'), {REPO!r})'''
    result = call(code)
    assert 'publish from a checkout (`pip install -e .`)' in result.stderr and not server.repos, result.stderr


def test_a_manifest_that_cannot_be_written_does_not_hide_that_it_was_published(server, call):
    full_disk = """
import timm_deluge.hub
from timm_deluge.cli import app
def write_manifest(_): raise OSError(28, 'No space left on device')
timm_deluge.hub.write_manifest = write_manifest
app()
"""
    result = call(full_disk, 'publish', 'delugenet146', '--repo-id', REPO)
    assert result.returncode == 2 and server.repos[REPO]
    assert 'was published' in result.stderr and 'No space left on device' in result.stderr
    assert 'No file was published' not in result.stderr


def test_interrupted_publishing_uploads_nothing_twice(server, publish):
    server.refuse_commits = 1
    result = publish()
    assert result.returncode == 2 and 'No file was published; run this again' in result.stderr
    assert server.repos[REPO] == {} and weights.find_checkpoint('delugenet146').hf_hub_id is None
    result = publish()
    assert result.returncode == 0, result.stderr
    assert server.requests == {'upload': 1, 'commit': 1}


def test_a_lost_connection_is_no_traceback(scratch_weights, monkeypatch):
    class ProtocolError(Exception):
        """Neither an OSError nor a RuntimeError, as that of an HTTP library."""

    def lose(*args):
        raise ProtocolError('the server disconnected')

    monkeypatch.setattr('timm_deluge.cli.push_to_hub', lose)
    result = invoke('publish', 'delugenet146', '--repo-id', REPO)
    assert result.exit_code == 2 and 'No file was published; run this again' in result.stderr


def test_wrong_token_is_refused_with_advice(server, publish):
    result = publish(token='hf_wrong')
    assert result.returncode == 2 and 'hf auth login' in result.stderr and 'hf_wrong' not in result.stderr
    assert not server.repos


def test_altered_checkpoint_is_not_published(server, publish, scratch_weights):
    scratch_weights.write_bytes(scratch_weights.read_bytes()[:-1] + b'\0')
    result = publish()
    assert result.returncode == 2 and 'SHA-256' in result.stderr
    assert not server.repos


def test_what_is_loaded_is_what_was_checked(call, publish, scratch_weights):
    assert publish().returncode == 0
    loaded = call('from timm.models import _builder; _builder.load_state_dict_from_hf = None' + LOAD)  # reads once more
    assert loaded.returncode == 0, loaded.stderr
    total = safetensors.torch.load_file(scratch_weights)['stem.conv.weight'].float().sum()
    assert loaded.stdout.split()[-1] == str(float(total))


def test_a_pickle_is_refused():
    with pytest.raises(CheckpointError, match='pytorch_model.bin of somebody/delugenet146: only files of safetensors'):
        timm.create_model('delugenet146', pretrained=True, pretrained_cfg_overlay=dict(
            hf_hub_id=REPO, hf_hub_filename='pytorch_model.bin'))


@pytest.mark.parametrize('known', [True, False], ids=['in the manifest', 'known to the hub alone'])
def test_tampered_download_is_refused(server, call, publish, scratch_weights, known):
    assert publish().returncode == 0
    if not known:
        manifest = scratch_weights.parent / 'manifest.json'
        manifest.write_text(manifest.read_text().replace(REPO, 'somebody/else'))
    server.tamper = True
    result = call(LOAD)
    assert result.returncode == 1 and 'class_7' not in result.stdout
    assert 'CheckpointError' in result.stderr and 'not what was published' in result.stderr


def test_blobs_may_be_links_to_what_other_repositories_share(tmp_path, monkeypatch):
    content = safetensors.torch.save({'x': torch.ones(2)})
    snapshot, blob, shared = (tmp_path / path for path in (
        'models--a--b/snapshots/c/model.safetensors', f'models--a--b/blobs/{hashlib.sha256(content).hexdigest()}',
        f'blobs/ee/{"e" * 64}'))
    for path in (snapshot, blob, shared):
        path.parent.mkdir(parents=True)
    snapshot.symlink_to(blob)
    blob.symlink_to(shared)
    shared.write_bytes(content)
    monkeypatch.setattr(weights, 'hf_hub_download', lambda *args, **kwargs: str(snapshot))
    assert weights.load_download('a/b')['x'].tolist() == [1, 1]
    shared.write_bytes(content[:-1] + b'!')
    with pytest.raises(CheckpointError, match='not what was published as a/b'):
        weights.load_download('a/b')


def test_the_manifest_knows_the_published_revision_alone(tmp_path, monkeypatch):
    content = safetensors.torch.save({'x': torch.ones(2)})
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (tmp_path / 'model.safetensors').symlink_to(blob)
    monkeypatch.setattr(weights, 'hf_hub_download', lambda *args, **kwargs: str(tmp_path / 'model.safetensors'))
    checkpoints = [replace(list_checkpoints()[0], hf_hub_id='a/b')]
    monkeypatch.setattr(weights, 'list_checkpoints', lambda: checkpoints)
    assert weights.load_download('a/b@v1')['x'].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match='not what was published as a/b'):
        weights.load_download('a/b')


@pytest.mark.parametrize('offline', [True, False])
def test_a_cache_without_links_needs_the_hub(offline, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.HTTPError('no route to the Hub')
    path = tmp_path / 'model.safetensors'
    path.write_bytes(safetensors.torch.save({'x': torch.ones(2)}))
    monkeypatch.setattr(weights, 'hf_hub_download', lambda *args, **kwargs: str(path))
    if offline:
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    else:
        monkeypatch.setattr(weights, 'get_hf_file_metadata', refuse)
    with pytest.raises(CheckpointError, match='model.safetensors: without links in its cache, only the Hub can tell'):
        weights.load_download('a/b')


def test_a_cache_without_links_believes_the_hub(tmp_path, monkeypatch):
    content = safetensors.torch.save({'x': torch.ones(2)})
    path = tmp_path / 'model.safetensors'
    path.write_bytes(content)
    metadata = SimpleNamespace(etag=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(weights, 'hf_hub_download', lambda *args, **kwargs: str(path))
    monkeypatch.setattr(weights, 'get_hf_file_metadata', lambda url: metadata)
    assert weights.load_download('a/b')['x'].tolist() == [1, 1]
    path.write_bytes(content[:-1] + b'!')
    with pytest.raises(CheckpointError, match='not what was published as a/b'):
        weights.load_download('a/b')


def test_replaced_file_is_refused_by_the_manifest(server, call, publish):
    assert publish().returncode == 0
    content = server.repos[REPO]['model.safetensors']
    server.repos[REPO]['model.safetensors'] = content[:-1] + bytes([content[-1] ^ 1])  # and the hub's hash with it
    result = call(LOAD)
    assert result.returncode == 1 and 'CheckpointError' in result.stderr
