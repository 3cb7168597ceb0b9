"""timm's train.py, two processes without augmentation, killed and resumed, ends with the weights it would have had."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from timm_scripts import TORCHRUN, needs_scripts, run, train_command

KILLS = int(os.environ.get('NUM_KILLS', '2'))
EPOCHS = 6

pytestmark = needs_scripts


@pytest.mark.timeout(3600)
def test_resumes_to_the_same_weights(images, tmp_path, monkeypatch, record_property):
    # images in the order of seed and epoch, which train.py has in several processes only, and with no chance beside it
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    options = ('--opt', 'nadamw', '--opt-kwargs', 'eps=1e-8', '--lr', 0.001, '--epochs', EPOCHS,
               '--train-img-sizes', 16, 24, 32, '--batch-size', 3, '--no-aug')

    def command(output, *more) -> list[str]:
        return train_command(
            'cifar10_delugenet146_scratch', images, tmp_path / output, *options, *more, launcher=TORCHRUN)

    def weights(output) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / output / 'run' / 'last.pth.tar', weights_only=False)['state_dict']

    def start(output) -> subprocess.Popen:
        """Start to train, and wait for the folder that is made before the first step."""
        process = subprocess.Popen(
            [sys.executable, *command(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / output / 'run').exists() and process.poll() is None:
            time.sleep(0.05)
        return process

    process, began = start('whole'), time.monotonic()
    assert process.wait() == 0
    duration = time.monotonic() - began
    whole = weights('whole')

    done: list[int] = []  # epochs, when a run was killed
    while len(done) < KILLS:
        killed, resumed = f'killed{len(done)}', f'resumed{len(done)}'
        process, began = start(killed), time.monotonic()
        try:
            process.wait(random.uniform(0, duration))
        except subprocess.TimeoutExpired:
            subprocess.run(['pkill', '-KILL', '-f', str(tmp_path / killed)], check=True)  # torchrun's workers, too
            assert process.wait() == -signal.SIGKILL
        else:  # it was faster than the first one, and ended
            duration = time.monotonic() - began
            shutil.rmtree(tmp_path / killed)
            continue
        last = tmp_path / killed / 'run' / 'last.pth.tar'
        done.append(torch.load(last, weights_only=False)['epoch'] + 1 if last.exists() else 0)
        run(*command(resumed, *(['--resume', last] if last.exists() else [])))
        end = weights(resumed if done[-1] < EPOCHS else killed)  # there may be nothing left to do
        different = [name for name, tensor in end.items() if not torch.equal(tensor, whole[name])]
        assert not different, f'killed after {done[-1]} epochs: {len(different)} tensors differ'
    print('epochs done when killed:', done)
    record_property('cases', KILLS)
