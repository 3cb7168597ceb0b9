"""Two processes find the gradients that one does with the double batch, on crops of a photograph."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_steps import create_model, take_steps
from PIL import Image
from torch import nn

from timm_deluge import set_implementation
from timm_deluge.cli import EXAMPLE_IMAGE

STEPS, BATCH = 2, 8
MODES = ['frozen', 'local', 'synchronised']


@pytest.fixture(scope='module')
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images ``[8, 3, 32, 32]`` and targets for each step."""
    photograph = torch.from_numpy(np.array(Image.open(EXAMPLE_IMAGE).convert('RGB'))).permute(2, 0, 1) / 255
    crops = photograph.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
    torch.manual_seed(0)
    chosen = crops[torch.randperm(len(crops))[:STEPS * BATCH]].sub(0.5).div(0.25)
    targets = torch.randint(3, (STEPS * BATCH,))
    return list(zip(chosen.split(BATCH), targets.split(BATCH)))


@pytest.fixture(scope='module')
def in_two_processes(batches, tmp_path_factory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Each mode's gradients, a dictionary for each step."""
    folder = tmp_path_factory.mktemp('distributed')
    torch.save(batches, folder / 'images.pt')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
               Path(__file__).with_name('distributed_steps.py'), folder / 'images.pt', folder, *MODES]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return {mode: torch.load(folder / f'{mode}.pt') for mode in MODES}


def in_one_process(mode: str, batches) -> list[dict[str, torch.Tensor]]:
    """Whole batches; or each half on its own and the mean of both, where normalisation knows its own half only."""
    set_implementation('reference')
    model = create_model(mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if mode != 'local':
        return take_steps(model, optimizer, batches)

    class MeanOfHalves(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return torch.cat([self.model(half) for half in images.chunk(2)])

    gradients = take_steps(MeanOfHalves().train(), optimizer, batches)
    return [{name.removeprefix('model.'): g for name, g in step.items()} for step in gradients]


@pytest.mark.slow
@pytest.mark.parametrize('mode', MODES)
def test_gradients_are_those_of_the_double_batch(mode, batches, in_two_processes):
    found, expected = in_two_processes[mode], in_one_process(mode, batches)
    assert len(found) == len(expected) == STEPS
    for step, (f, e) in enumerate(zip(found, expected)):
        assert f.keys() == e.keys()
        for name in f:
            difference = (f[name] - e[name]).norm() / e[name].norm().clamp(min=1e-6)
            assert difference < 1e-6, f'step {step}, {name}: {difference}'
