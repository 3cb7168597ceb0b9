"""A user's script is checked against the package's types: what they promise holds, and what they forbid is found."""
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = '''
import timm_deluge
import torch
from timm_deluge import connectivity, importance, ops, prune, report, weights
from torch import nn
from typing_extensions import assert_type

model = timm_deluge.DelugeNet(depths=(1, 2), widths=(8, 16), num_classes=10, stem_type='cifar', drop_path_rate=0.1)
images, targets = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)

assert_type(model.forward_features(images), torch.Tensor)
assert_type(model.prune_intermediate_layers(1), list[int])
assert_type(timm_deluge.explain_implementation(model, images), dict[str, ops.Decision])
assert_type(timm_deluge.get_implementation(), str)
assert_type(timm_deluge.prune_connections(model, 0.5, by='taylor', batches=[(images, targets)]), nn.Module)
assert_type(timm_deluge.pruned_connections(model), list[list[list[int]]])
assert_type(timm_deluge.connection_scores(model), dict[prune.Connection, float])
assert_type(importance.layer_removal_losses(model, images, targets), tuple[float, dict[tuple[int, int], float]])
assert_type(report.create_report('delugenet146').paper_flops, int)
assert_type(weights.find_checkpoint('delugenet146').name, str)
assert_type(connectivity.block_connectivity(model.state_dict())[0], connectivity.BlockConnectivity)

timm_deluge.prune_connections(model, 'half')
timm_deluge.set_implementation(None)
weights.find_checkpoint(146)
timm_deluge.DelugeNet(depths=(1, 2), widths='wide')
'''
ERRORS = 4  # the last lines


@pytest.mark.slow
def test_a_typed_script_is_checked_by_mypy(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    process = subprocess.run(
        [sys.executable, '-m', 'mypy', '--strict', path], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = SCRIPT.splitlines()
    errors = {line.split(':')[1] for line in process.stdout.splitlines() if ': error:' in line}
    assert errors == {str(number) for number in range(len(lines) - ERRORS + 1, len(lines) + 1)}, process.stdout
    assert process.stdout.count('[arg-type]') == ERRORS, process.stdout
