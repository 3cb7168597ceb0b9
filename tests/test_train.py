"""timm's unmodified scripts train, resume and measure these models."""
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from timm_scripts import SCRIPTS, TORCHRUN, needs_scripts, run, train, train_command

from timm_deluge.recipes import list_recipes, recipe_path

pytestmark = needs_scripts


@pytest.mark.parametrize('recipe', list_recipes())
@pytest.mark.timeout(1800)  # of Muon in bfloat16, a step takes minutes where the processor has none
def test_recipe_trains(recipe, images, tmp_path):
    epochs = train(recipe, images, tmp_path / 'out', '--epochs', 1, '--warmup-epochs', 0)
    assert len(epochs) == 1 and 0 < float(epochs[0]['train_loss']) < 20


def test_recipes_use_options_of_train_py():
    """A misspelt one would be ignored without a word."""
    code = ('import runpy, sys; sys.argv = sys.argv[1:]; '
            'print(*(a.dest for a in runpy.run_path(sys.argv[0])["parser"]._actions))')
    known = set(run('-c', code, SCRIPTS / 'train.py').split())
    assert 'smoothing' in known
    for recipe in list_recipes():
        assert yaml.safe_load(recipe_path(recipe).read_text(encoding='utf-8')).keys() <= known, recipe


def test_recipe_trains_in_two_processes(images, tmp_path):
    options = ('--epochs', 1, '--batch-size', 2)
    epochs = train('imagenet', images, tmp_path / 'out', *options, launcher=TORCHRUN)
    assert len(epochs) == 1 and 0 < float(epochs[0]['train_loss']) < 20


def test_training_resumes_after_its_last_epoch(images, tmp_path):
    options = ('--epochs', 3, '--warmup-epochs', 0)
    first = train('cifar100_delugenet146', images, tmp_path / 'out', *options)
    checkpoint = tmp_path / 'out' / 'run' / 'checkpoint-1.pth.tar'
    resumed = train('cifar100_delugenet146', images, tmp_path / 'resumed', *options, '--resume', checkpoint)
    assert [e['epoch'] for e in first] == ['0', '1', '2'] and [e['epoch'] for e in resumed] == ['2']


@pytest.mark.parametrize('launcher', [[], TORCHRUN], ids=['one process', 'two processes'])
def test_killed_training_loses_only_its_current_epoch(images, tmp_path, launcher):
    options = ('--epochs', 3, '--warmup-epochs', 0)
    last = tmp_path / 'out' / 'run' / 'last.pth.tar'
    command = train_command('cifar100_delugenet146', images, tmp_path / 'out', *options, launcher=launcher)
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not last.exists() and process.poll() is None:
        time.sleep(0.05)
    subprocess.run(['pkill', '-KILL', '-f', str(tmp_path / 'out')], check=True)  # torchrun's workers, too
    assert process.wait() == -signal.SIGKILL
    done = torch.load(last, weights_only=False)['epoch']
    assert done < 2
    options += ('--resume', last)
    resumed = train('cifar100_delugenet146', images, tmp_path / 'resumed', *options, launcher=launcher)
    assert [int(e['epoch']) for e in resumed] == list(range(done + 1, 3))


def test_validate_script_through_run(images):
    out = run('-m', 'timm_deluge.run', SCRIPTS / 'validate.py', '--model', 'delugenet146', '--pretrained',
              '--data-dir', images, '--split', 'validation', '--device', 'cpu', '--batch-size', 4, '--workers', 1)
    assert '"param_count": 6.71' in out
