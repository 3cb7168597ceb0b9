"""Calls of timm's unmodified scripts, which its packages do not have."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_deluge.recipes import recipe_path

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS', ''))
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
            Path(__file__).with_name('train_on_cpus.py')]
needs_scripts = pytest.mark.skipif(
    not os.environ.get('TIMM_SCRIPTS'),
    reason="TIMM_SCRIPTS does not name a checkout of timm's repository, which has train.py and validate.py")


def run(*command) -> str:
    """Run Python to a good end; return what it said."""
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


def train_command(recipe, images, output, *options, launcher=()) -> list[str]:
    """timm's train.py for a few steps of four images."""
    command = [
        *launcher, SCRIPTS / 'train.py', '--config', recipe_path(recipe), '--data-dir', images, '--output', output,
        '--experiment', 'run', '--device', 'cpu', '--batch-size', 4, '--workers', 1, *options]
    return list(map(str, command))


def train(recipe, images, output, *options, launcher=()) -> list[dict[str, str]]:
    """Train; return the epochs' summaries."""
    run(*train_command(recipe, images, output, *options, launcher=launcher))
    return list(csv.DictReader((output / 'run' / 'summary.csv').open()))
