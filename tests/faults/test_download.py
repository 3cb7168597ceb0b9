"""What does not come with the package is downloaded whole, once and as the manifest says, or not at all."""
import json
import time
from pathlib import Path

import pytest
import safetensors.torch
from huggingface_hub.errors import HTTPError

from timm_deluge.download import download_checkpoint
from timm_deluge.weights import find_checkpoint

REPO = 'somebody/delugenet146'
NAME = 'delugenet146.test_random'
INCOMPLETE = f'{NAME}.somebody--delugenet146.incomplete'
CREATE = "print(timm.create_model('delugenet146', pretrained=True).pretrained_cfg['file'])"


@pytest.fixture
def published(server, scratch_weights):
    """What the scratch checkpoint has, in a repository that the manifest names and no longer here."""
    content = scratch_weights.read_bytes()
    server.repos[REPO] = {'model.safetensors': content}
    manifest_path = scratch_weights.parent / 'manifest.json'
    manifest = json.loads(manifest_path.read_text())
    manifest['checkpoints'][0]['hf_hub_id'] = REPO
    manifest_path.write_text(json.dumps(manifest))
    scratch_weights.unlink()
    return content


@pytest.fixture
def downloads(tmp_path):
    return tmp_path / 'cache' / 'assets' / 'timm_deluge'


def download(call, *options):
    return call('from timm_deluge.cli import app; app()', 'weights', 'download', NAME, *options)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob('*') if p.is_file() and p.suffix != '.lock')


def test_download(call, published, downloads, server):
    result = download(call)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(downloads / f'{NAME}.safetensors')
    assert (downloads / f'{NAME}.safetensors').read_bytes() == published
    assert files(downloads) == [f'{NAME}.safetensors']

    server.repos.clear()
    assert download(call).returncode == 0
    assert call(CREATE).stdout.strip() == result.stdout.strip()


def test_a_download_that_begins_anew_is_given_up(published, downloads, monkeypatch):
    lengths = [1000, 500, 800]

    def http_get(url, file, **options):  # as of a server that ignores where to resume
        file.truncate(0)
        file.seek(0)
        file.write(published[:lengths.pop(0)])
        raise HTTPError('lost')

    monkeypatch.setattr('timm_deluge.weights.HF_ASSETS_CACHE', str(downloads.parent))
    monkeypatch.setattr('timm_deluge.download.http_get', http_get)
    with pytest.raises(HTTPError, match='lost'):
        download_checkpoint(find_checkpoint(NAME), REPO)
    assert lengths == [800] and files(downloads) == [INCOMPLETE]


def test_a_revision_is_the_one_that_was_named(call, published, server):
    result = download(call, '--repo-id', f'{REPO}@v1')
    assert result.returncode == 0, result.stderr
    assert server.revisions == {'v1'}


def test_a_model_downloads_what_it_needs(call, published, downloads):
    result = call(CREATE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(downloads / f'{NAME}.safetensors')


def test_a_model_downloads_into_the_cache_that_is_named(call, published, downloads, tmp_path):
    cache = tmp_path / 'scratch'
    result = call(f"""
model = timm.create_model('delugenet146', pretrained=True, cache_dir={str(cache)!r})
print(float(model.stem.conv.weight.sum()))
""")
    assert result.returncode == 0, result.stderr
    total = safetensors.torch.load(published)['stem.conv.weight'].float().sum()
    assert result.stdout.strip() == str(float(total))
    assert 'model.safetensors' in files(cache) and not files(downloads)


def test_a_model_says_what_it_could_not_download(call, published, server):
    server.repos.clear()
    result = call('from timm_deluge.cli import app; app()', 'predict', '--model', NAME)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert f'{NAME} is not here and could not be downloaded from {REPO}' in ' '.join(result.stderr.split())


def test_a_repository_may_be_named(call, published, server, scratch_weights):
    server.repos['another/place'] = server.repos.pop(REPO)
    assert download(call).returncode == 2
    result = download(call, '--repo-id', 'another/place')
    assert result.returncode == 0, result.stderr


def test_a_download_that_lost_its_connection_goes_on(call, published, downloads, server):
    server.cut_at = len(published) * 9 // 10
    result = download(call)
    assert result.returncode == 0, result.stderr
    assert server.requests['resumed download'] == 1
    assert (downloads / f'{NAME}.safetensors').read_bytes() == published


def test_a_connection_that_was_reset_goes_on(call, published, downloads):
    """Of this the client raises an error of its HTTP library, other than of an answer that ends early."""
    code = f"""
from huggingface_hub import errors
import timm_deluge.download
get, begun = timm_deluge.download.http_get, []

def reset_once(url, file, **options):
    if not begun:
        begun.append(file.write(bytes.fromhex('{published[:1000].hex()}')))
        raise type('ReadError', (errors.HTTPError,), {{}})('reset')
    assert options['resume_size'] == 1000
    get(url, file, **options)

timm_deluge.download.http_get = reset_once
from timm_deluge.cli import app; app()
"""
    result = call(code, 'weights', 'download', NAME)
    assert result.returncode == 0, result.stderr
    assert (downloads / f'{NAME}.safetensors').read_bytes() == published


def test_a_killed_download_goes_on(call, published, downloads, server):
    server.stall_at = len(published) * 9 // 10
    process = download(call.start)
    deadline = time.monotonic() + 60
    while not server.requests['stalled download'] or not any(
            p.stat().st_size for p in downloads.rglob('*.incomplete') if p.is_file()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert not (downloads / f'{NAME}.safetensors').exists()

    result = download(call)
    assert result.returncode == 0, result.stderr
    assert server.requests['resumed download'] == 1
    assert (downloads / f'{NAME}.safetensors').read_bytes() == published


def test_wrong_bytes_are_not_kept(call, published, downloads, server):
    server.tamper = True
    for code in None, CREATE:
        result = call(code) if code else download(call)
        assert result.returncode != 0
        assert 'Nothing of it was kept' in result.stderr
        assert files(downloads) == []
    server.tamper = False
    assert download(call).returncode == 0


@pytest.mark.parametrize('change', [lambda content: content + b'more', lambda content: content[:-10]])
def test_a_file_of_another_size_is_not_kept(call, published, downloads, server, change):
    server.repos[REPO]['model.safetensors'] = change(published)
    result = download(call)
    assert result.returncode == 2 and 'Nothing of it was kept' in result.stderr
    assert files(downloads) == []


def test_what_was_downloaded_before_it_was_killed_is_not_asked_for_again(call, published, downloads, server):
    downloads.mkdir(parents=True)
    (downloads / INCOMPLETE).write_bytes(published)
    assert download(call).returncode == 0
    assert not server.requests['download'] and not server.requests['resumed download']


def test_a_download_from_another_repository_is_not_continued(call, published, downloads, server):
    downloads.mkdir(parents=True)
    (downloads / f'{NAME}.else--where.incomplete').write_bytes(b'other')
    assert download(call).returncode == 0
    assert files(downloads) == [f'{NAME}.safetensors'] and not server.requests['resumed download']


def test_a_spoiled_download_says_how_to_replace_it(call, published, downloads):
    assert download(call).returncode == 0
    path = downloads / f'{NAME}.safetensors'
    path.write_bytes(published[:-1])
    result = download(call)
    assert result.returncode == 2
    assert str(path) in result.stderr
    assert f'Delete it and get it anew: `timm-deluge weights download {NAME}`' in result.stderr


def test_a_full_disk(call, published, downloads):
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20)); '
    result = call(limit + 'from timm_deluge.cli import app; app()', 'weights', 'download', NAME)
    assert result.returncode == 2
    assert 'File too large' in result.stderr and 'run this again' in result.stderr
    assert not (downloads / f'{NAME}.safetensors').exists()
    assert download(call).returncode == 0


@pytest.mark.skipif(not Path('/sys').exists(), reason='needs a folder that even root may not write')
def test_a_folder_that_cannot_be_written(call, published, downloads):
    read_only = "timm_deluge.weights.HF_ASSETS_CACHE = '/sys'; "
    result = call(read_only + 'from timm_deluge.cli import app; app()', 'weights', 'download', NAME)
    assert result.returncode == 2
    assert "'/sys/timm_deluge'" in result.stderr and 'Traceback' not in result.stderr
    assert download(call).returncode == 0


def test_eight_at_once(call, published, downloads, server):
    processes = [download(call.start) if i % 2 else call.start(CREATE) for i in range(8)]
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert output.strip() == str(downloads / f'{NAME}.safetensors')
    assert server.requests['download'] == 1
    assert (downloads / f'{NAME}.safetensors').read_bytes() == published
    assert files(downloads) == [f'{NAME}.safetensors']


def test_offline_an_error_says_where_it_looked_and_what_gets_it(call, scratch_weights, downloads):
    scratch_weights.unlink()
    for result in call(CREATE), download(call):
        assert result.returncode != 0
        for place in scratch_weights.parent, downloads:
            assert str(place) in result.stderr
        assert f'timm-deluge weights download {NAME} --repo-id USER/REPO' in result.stderr
