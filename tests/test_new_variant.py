"""A variant more is two edits, in one file; everything that lists networks follows."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ENTRYPOINT = '''
@register_model
def delugenet74(pretrained: bool = False, **kwargs) -> DelugeNet:
    """DelugeNet-74 for 224x224 images."""
    model_args = dict(depths=(6, 6, 6, 6), **_IMAGENET)
    return _create_delugenet('delugenet74', pretrained=pretrained, **dict(model_args, **kwargs))
'''


@pytest.fixture(scope='module')
def checkout(tmp_path_factory) -> Path:
    checkout = tmp_path_factory.mktemp('checkout')
    shutil.copytree(REPOSITORY / 'timm_deluge', checkout / 'timm_deluge', ignore=shutil.ignore_patterns('__pycache__'))
    (checkout / 'weights').mkdir()
    shutil.copy(REPOSITORY / 'weights' / 'manifest.json', checkout / 'weights')
    shutil.copy(REPOSITORY / 'hubconf.py', checkout)
    source = checkout / 'timm_deluge' / 'delugenet.py'
    text, edits = re.subn(r"(dict.fromkeys\(\()('delugenet92')", r"\1'delugenet74', \2", source.read_text())
    assert edits == 1
    source.write_text(text + '\n' + ENTRYPOINT)
    return checkout


def run(checkout, *args) -> str:
    environment = {**os.environ, 'PYTHONPATH': str(checkout), 'TORCH_BACKEND': ''}
    process = subprocess.run(
        [sys.executable, *args], cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_timm_and_torch_hub_have_it(checkout):
    found = json.loads(run(checkout, '-c', '''
import json, timm, torch, timm_deluge
from timm_deluge.weights import CheckpointError
try:
    timm.create_model("delugenet74", pretrained=True)
except CheckpointError as error:
    message = str(error)
model = timm.create_model("delugenet74", num_classes=7, device="meta")
features = timm.create_model("delugenet74", features_only=True, device="meta")
from_hub = torch.hub.load(".", "delugenet74", source="local", device="meta")
print(json.dumps(dict(
    file=timm_deluge.__file__, listed=timm.list_models("*74", module="delugenet"), message=message,
    shape=model(torch.empty(1, 3, 64, 64, device="meta")).shape, reductions=features.feature_info.reduction(),
    input_size=model.default_cfg["input_size"], hub=len(from_hub.stages[3].layers))))
'''))
    assert found['file'].startswith(str(checkout))
    assert found['listed'] == ['delugenet74'] and found['hub'] == 6
    assert found['message'].startswith('delugenet74 has no pretrained checkpoint yet.')
    assert (found['shape'], found['reductions'], found['input_size']) == ([1, 7], [2, 4, 8, 16, 32], [3, 224, 224])


@pytest.mark.slow
def test_reports_and_tables_have_it(checkout):
    (report,) = json.loads(run(checkout, '-m', 'timm_deluge.cli', 'report', 'delugenet74', '--format', 'json'))
    assert report['name'] == 'delugenet74' and 30e6 < report['params'] < 43_404_072
    shutil.copytree(REPOSITORY / 'reports', checkout / 'reports')
    shutil.copytree(REPOSITORY / 'benchmarks', checkout / 'benchmarks')
    shutil.copy(REPOSITORY / 'README.md', checkout)
    rows = json.loads(run(checkout, '-c', '''
import dataclasses, json, sys
sys.path.insert(0, "reports")
import generate
generate.list_checkpoints, generate.PEERS = lambda: [], []
counts = generate.create_report("delugenet74")
generate.create_report = lambda name, **_: dataclasses.replace(counts, name=name)  # the others take half a minute
texts = generate.generate()
print(json.dumps([texts[generate.REPOSITORY / page] for page in ("README.md", "reports/zoo.md")]))
'''))
    (row,) = (line for line in rows[0].splitlines() if line.startswith('| `delugenet74`'))
    cells = [cell.strip() for cell in row.split('|')[1:-1]]
    assert (cells[0], cells[1], cells[7]) == ('`delugenet74`', '224²', 'none')
    assert (cells[3], cells[6], cells[8]) == ('', '', '')  # the paper has none
    assert 'delugenet74' in rows[1]
