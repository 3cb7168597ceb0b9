import itertools
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

os.environ['OMP_WAIT_POLICY'] = 'PASSIVE'  # before PyTorch is imported: the workers' threads share the cores

import torch

os.environ['COLUMNS'] = '200'  # for tables, whose width is looked up at import; pytest-xdist says 80
os.environ['_TYPER_FORCE_DISABLE_TERMINAL'] = '1'  # GITHUB_ACTIONS and FORCE_COLOR would colour what tests read
os.environ.pop('FORCE_COLOR', None)
os.environ.pop('TIMM_DELUGE_IMPLEMENTATION', None)
os.environ['NO_PROXY'] = os.environ['no_proxy'] = '127.0.0.1,localhost'  # the tests' servers
os.environ['TRITON_INTERPRET'] = '1'  # the tests' tensors are on the CPU; Triton wants to know before it is imported

import safetensors.torch
import timm
from forked import Forked
from hub_server import TOKEN, HubServer
from PIL import Image

import timm_deluge
from timm_deluge import training_run, weights
from timm_deluge.cli import EXAMPLE_IMAGE


@pytest.fixture(autouse=True)
def start_afresh():
    torch.manual_seed(0)
    yield
    timm_deluge.set_implementation('auto')


@pytest.fixture(scope='session', autouse=True)
def cache_home(tmp_path_factory):
    """Keep compiled kernels out of the user's cache folder, in one for this session and all of its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'cache'
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
        yield folder


@pytest.fixture(scope='session')
def random_weights(tmp_path_factory) -> Path:
    """A weights folder with one untrained fp16 checkpoint, delugenet146.test_random."""
    torch.manual_seed(0)
    model = timm.create_model('delugenet146')
    path = tmp_path_factory.mktemp('weights') / 'delugenet146.test_random.safetensors'
    state_dict = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    safetensors.torch.save_file(state_dict, path)
    write_entry(path)
    return path


@pytest.fixture
def scratch_weights(random_weights, tmp_path, monkeypatch) -> Path:
    """The same in a folder of the test's own, as the package's."""
    torch.manual_seed(0)
    folder = shutil.copytree(random_weights.parent, tmp_path / 'weights')
    monkeypatch.setattr(weights, 'weights_dir', lambda: folder)
    return folder / random_weights.name


@pytest.fixture
def split_weights(scratch_weights, monkeypatch) -> list[Path]:
    """The same checkpoint in parts of at most 4 MiB; their paths."""
    folder = scratch_weights.parent
    monkeypatch.setattr(training_run, 'weights_dir', lambda: folder)
    monkeypatch.setattr(training_run, 'PART_BYTES', 4 * 2 ** 20)
    files = training_run.write_weights(safetensors.torch.load_file(scratch_weights), scratch_weights.stem)
    scratch_weights.unlink()
    manifest = json.loads((folder / 'manifest.json').read_text())
    manifest['checkpoints'][0].update(files)
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    return sorted(folder.glob('*-of-*.safetensors'))


def write_entry(path: Path) -> None:
    """Make the manifest beside a checkpoint describe the file as it is now."""
    import hashlib

    data = path.read_bytes()
    entry = dict(
        model='delugenet146', tag='test_random', file=path.name, bytes=len(data), num_params=6_709_380,
        sha256=hashlib.sha256(data).hexdigest(), parts=[], class_names=[f'class_{i}' for i in range(100)],
        class_descriptions={f'class_{i}': f'number {i}' for i in range(100)},
        input_size=[3, 32, 32], mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], interpolation='bilinear', crop_pct=1.0,
        dataset=dict(name='none', split='test', train_images=0, test_images=0, provenance='none'), base_model=None,
        teacher=None, recipe='none', epochs=0, seed=0, ema_decay=None, settled_images=None, hardware='none', hours=0.0,
        command='none', hf_hub_id=None,
        metrics=dict(top1=1.0, top5=5.0, num_images=100),
    )
    (path.parent / 'manifest.json').write_text(json.dumps({'checkpoints': [entry]}))


@pytest.fixture
def server():
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def call(server, scratch_weights, tmp_path):
    """Run Python where the Hub is our server, and the checkpoints are the scratch one; `call.start` does not wait."""
    processes = itertools.count()

    def start(code: str, *arguments: str, token: str = TOKEN) -> Forked:
        environment = {
            **os.environ, 'HF_ENDPOINT': server.url, 'HF_TOKEN': token, 'HF_HOME': str(tmp_path / 'cache'),
            'HF_HUB_DISABLE_XET': '1', 'HF_HUB_OFFLINE': '0', 'CUDA_VISIBLE_DEVICES': '', 'COLUMNS': '200'}
        prologue = (f'import pathlib, sys, timm, torch, timm_deluge.weights\n'
                    f'timm_deluge.weights.weights_dir = lambda: pathlib.Path({str(scratch_weights.parent)!r})\n')
        folder = tmp_path / f'process{next(processes)}'
        folder.mkdir()
        return Forked(prologue + code, arguments, environment, folder)

    def call(*args, **kwargs) -> subprocess.CompletedProcess:
        process = start(*args, **kwargs)
        output, errors = process.communicate()
        assert TOKEN not in output + errors
        return subprocess.CompletedProcess(args, process.returncode, output, errors)

    call.start = start
    return call


@pytest.fixture
def publish(call):
    def publish(*options: str, **kwargs):
        return call('from timm_deluge.cli import app; app()',
                    'publish', 'delugenet146', '--repo-id', 'somebody/delugenet146', *options, **kwargs)
    return publish


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve pieces of a photograph in two classes."""
    rng = np.random.default_rng(0)
    photograph = Image.open(EXAMPLE_IMAGE)
    for split in ('train', 'validation'):
        for i in range(12):
            path = tmp_path / 'images' / split / f'class_{i % 2}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            x, y = (int(rng.integers(size - 32)) for size in photograph.size)
            photograph.crop((x, y, x + 32, y + 32)).save(path)
    return tmp_path / 'images'
