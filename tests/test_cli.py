"""The command line, as a person and as a script use it."""
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from timm_deluge import cli
from timm_deluge.recipes import list_recipes, recipe_path
from timm_deluge.weights import find_checkpoint, list_checkpoints

REPOSITORY = Path(__file__).resolve().parent.parent


def invoke(*args, **kwargs):
    return CliRunner().invoke(cli.app, [str(a) for a in args], **kwargs)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('one.png', 'two.jpg', 'three.webp'):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def test_an_empty_name_is_not_the_current_folder(photos, monkeypatch):
    monkeypatch.chdir(photos)
    result = invoke('predict', 'one.png', '')
    assert result.exit_code == 2 and result.stdout == '' and 'an empty name' in result.stderr


def test_predict_without_an_image_shows_the_packaged_photograph():
    result = invoke('predict')
    assert result.exit_code == 0, result.output
    assert 'rocket.jpg' in result.stdout and result.stdout.count('%') == 5
    assert 'rocket' in result.stdout.replace('rocket.jpg', '')


def test_predict_shows_class_names_as_words():
    result = invoke('predict', '--top', 100)
    assert 'aquarium fish' in result.stdout and 'aquarium_fish' not in result.stdout


def test_predict_shows_what_the_class_names_stand_for():
    (prediction,) = json.loads(invoke('predict', '--model', 'delugenet92', '--json').stdout)
    assert {c['name'] for c in prediction['classes']} <= set(find_checkpoint('delugenet92').class_descriptions.values())


def test_predict_json_of_a_folder(photos):
    result = invoke('predict', photos, '--json', '--top', 3, '--batch-size', 2)
    assert result.exit_code == 0, result.output
    predictions = json.loads(result.stdout)
    assert [Path(p['path']).name for p in predictions] == ['one.png', 'three.webp', 'two.jpg']
    for prediction in predictions:
        probabilities = [c['probability'] for c in prediction['classes']]
        assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)


@pytest.mark.parametrize('name', ['clip.mpg', 'features.h5', 'page.eps'])
def test_what_pillow_knows_but_cannot_read_alone_is_no_image_of_a_folder(photos, name):
    (photos / name).write_bytes(b'not a picture')
    result = invoke('predict', photos, '--json', '--top', 1)
    assert result.exit_code == 0 and len(json.loads(result.stdout)) == 3


@pytest.mark.parametrize('name, meant', [('delugnet146', 'delugenet146'), ('reset50', 'resnet50')])
def test_a_misspelt_model_is_recognised(name, meant):
    result = invoke('report', name)
    assert result.exit_code == 2 and meant in result.stderr


def test_predict_agrees_with_timm(photos):
    model = timm.create_model('delugenet146', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    probabilities = model(transform(Image.open(photos / 'one.png'))[None]).softmax(-1)[0]
    best = json.loads(invoke('predict', photos / 'one.png', '--json', '--top', 1).stdout)[0]['classes'][0]
    assert best['name'] == model.pretrained_cfg['label_names'][probabilities.argmax()]
    assert best['probability'] == pytest.approx(probabilities.max().item(), abs=1e-5)


def test_predict_skips_what_it_cannot_read_and_says_so(photos):
    (photos / 'empty.png').touch()
    (photos / 'text.png').write_text('no image')
    result = invoke('predict', photos, '--top', 1)
    assert result.exit_code == 1
    assert 'empty.png: the file is empty' in result.stderr
    assert 'text.png: not an image that Pillow can read' in result.stderr
    assert all(name in result.stdout for name in ('one.png', 'two.jpg', 'three.webp'))
    as_json = invoke('predict', photos, '--json')
    assert as_json.exit_code == 1
    assert [e['path'] for e in json.loads(as_json.stdout) if 'error' in e] == [
        str(photos / 'empty.png'), str(photos / 'text.png')]


def test_predict_reads_paths_from_standard_input(photos):
    result = invoke('predict', '-', '--json', input=f'{photos / "one.png"}\n{photos / "two.jpg"}\n')
    assert len(json.loads(result.stdout)) == 2


def test_predict_caps_top_at_the_number_of_classes(photos):
    assert len(json.loads(invoke('predict', photos / 'one.png', '--json', '--top', 1000).stdout)[0]['classes']) == 100


def test_predict_with_a_model_that_has_no_checkpoint(photos):
    result = invoke('predict', photos, '--model', 'wide_resnetlike146_1x1')
    assert result.exit_code == 2
    assert 'wide_resnetlike146_1x1 has no pretrained checkpoint yet' in result.stderr


@pytest.mark.parametrize('name', ['delugenet164', 'local-dir:pruned'])
def test_predict_with_what_is_no_model_of_this_package(photos, name):
    result = invoke('predict', photos, '--model', name)
    assert result.exit_code == 2 and f'{name} is no model of this package; the nearest name is' in result.stderr


@pytest.mark.parametrize('command', [['report'], ['connectivity'], ['prune', '--output', 'new', '--fraction', '0.1']])
def test_a_repository_with_two_revisions_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*command, 'hf-hub:a/b@c@d')
    assert result.exit_code == 2 and 'error:' in result.stderr


def test_a_report_may_be_cut_off():
    command = ['-u', '-m', 'timm_deluge.cli', 'report', 'delugenet146', '--format', 'json']  # a buffer would hold it
    with subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert 'rror' not in process.stderr.read()  # an error of ours, or a traceback


def test_predict_on_a_device_that_is_not_there(photos):
    result = invoke('predict', photos, '--device', 'xpu:77')
    assert result.exit_code == 2 and "cannot run on 'xpu:77'" in result.stderr


def test_predict_of_an_empty_folder(tmp_path):
    result = invoke('predict', tmp_path)
    assert result.exit_code == 1 and 'a folder without images' in result.stderr


def test_predict_of_nothing_on_standard_input():
    result = invoke('predict', '-', input='\n')
    assert result.exit_code == 2 and 'standard input named no images' in result.stderr


def test_predict_shows_paths_as_they_are(photos):
    for name in ('a [edited].jpg', 'b :smile:.jpg', 'c [/x].jpg'):
        (photos / 'two.jpg').rename(photos / name.replace('/', ''))
        result = invoke('predict', photos / name.replace('/', ''))
        assert name.replace('/', '') in result.stdout
        (photos / name.replace('/', '')).rename(photos / 'two.jpg')
    assert 'd[/x].jpg: no such file' in invoke('predict', 'd[/x].jpg').stderr


def test_report_formats():
    assert json.loads(invoke('report', 'delugenet146', '--format', 'json').stdout)[0]['params'] == 6_709_380
    assert invoke('report', 'resnetlike146_1x1', '--format', 'markdown').stdout.startswith('| model')


def test_report_of_an_unknown_model_suggests_similar_names():
    result = invoke('report', 'delugenet1')
    assert result.exit_code == 2 and "no model 'delugenet1'" in result.stderr and 'delugenet104' in result.stderr
    result = invoke('report', 'resnetlike146_1x1', '--model-kwargs', 'drop_rate=0.1', 'num_classes=10')
    assert result.exit_code == 2 and 'num_classes=10: no model; --model-kwargs takes one KEY=VALUE' in result.stderr
    result = invoke('report', 'resnetlike146_1x1', '--model-kwargs', 'depths={[]: 1}')
    assert result.exit_code == 2 and 'error:' in result.stderr
    result = invoke('report', 'local-dir:fraction=0.3')
    assert result.exit_code == 2 and 'fraction=0.3/config.json' in result.stderr and 'KEY=VALUE' not in result.stderr


def test_report_of_an_unknown_tag():
    result = invoke('report', 'resnet18.nonsense')
    assert result.exit_code == 2 and 'nonsense' in result.stderr


def test_weights_are_a_line_each_in_a_narrow_terminal():
    command = [sys.executable, '-c', 'from timm_deluge.cli import app; app()', 'weights', 'list']
    result = subprocess.run(command, capture_output=True, env={**os.environ, 'COLUMNS': '80'}, check=True)
    lines = result.stdout.decode().splitlines()
    for line, checkpoint in zip(lines[1:], list_checkpoints(), strict=True):
        assert line.split()[0] == checkpoint.name and f'{checkpoint.metrics["top1"]:.2f}' in line


def test_weights_commands(scratch_weights):
    assert 'delugenet146.test_random' in invoke('weights', 'list').stdout
    assert json.loads(invoke('weights', 'show', 'delugenet146').stdout)['tag'] == 'test_random'
    assert invoke('weights', 'show', 'delugenet92').exit_code == 2
    assert invoke('weights', 'verify').exit_code == 0
    scratch_weights.write_bytes(b'spoiled')
    result = invoke('weights', 'verify')
    assert result.exit_code == 1 and '7 bytes, but the manifest says' in result.stderr


def test_weights_that_cannot_be_read(scratch_weights, monkeypatch):
    def read_bytes(path, read_bytes=Path.read_bytes):
        if path == scratch_weights:
            raise PermissionError(13, 'Permission denied', str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, 'read_bytes', read_bytes)
    for status, command in (1, ('weights', 'verify')), (2, ('predict',)):
        result = invoke(*command)
        assert result.exit_code == status and 'Permission denied' in result.stderr


def test_recipes_are_listed_with_what_they_are():
    result = invoke('recipe')
    names = [line.split('│')[1].strip() for line in result.stdout.splitlines() if line.startswith('│')]
    assert [name for name in names if name] == list_recipes()
    assert 'Eighteen epochs of Muon, one cycle, for a GPU, not yet run: images of 32, 48 and at last' in result.stdout


def test_recipe_prints_a_path_and_nothing_else():
    for name in list_recipes():
        assert Path(invoke('recipe', name).stdout.strip()) == recipe_path(name)
    result = invoke('recipe', 'nonsense')
    assert result.exit_code == 2 and "no recipe 'nonsense'" in result.stderr


@pytest.mark.parametrize('name', list_recipes())
def test_recipe_trains_a_model_of_ours(name):
    text = recipe_path(name).read_text()
    assert f'$(timm-deluge recipe {name})' in text
    options = yaml.safe_load(text)
    assert options['device_modules'] == ['timm_deluge']
    model, _, tag = options['model'].partition('.')
    assert model in timm.list_models(module='delugenet')
    assert not tag or find_checkpoint(f'{model}.{tag}')


@pytest.mark.parametrize('name', ['delugenet122', 'resnetlike146_1x1'])
def test_torch_hub_from_the_checkout(name):
    model = torch.hub.load(str(REPOSITORY), name, source='local', num_classes=3)
    assert model.num_classes == 3


def test_torch_hub_knows_every_model():
    entrypoints = runpy.run_path(str(REPOSITORY / 'hubconf.py'))
    assert sorted(n for n, f in entrypoints.items() if callable(f)) == sorted(timm.list_models(module='delugenet'))


def test_torch_hub_says_which_timm_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm_deluge', None)
    needed, *_ = re.findall(r'"(timm>=.+)"', (REPOSITORY / 'pyproject.toml').read_text())
    with pytest.raises(ImportError, match=f'it needs {needed}, and this is timm {timm.__version__}'):
        runpy.run_path(str(REPOSITORY / 'hubconf.py'))


def test_run_executes_a_script_with_the_models_registered(tmp_path):
    (tmp_path / 'sibling.py').write_text('NAME = "delugenet92"')
    script = tmp_path / 'script.py'
    script.write_text('import sys, timm, sibling\nprint(timm.is_model(sibling.NAME), sys.argv[1:], __name__)')
    out = subprocess.run([sys.executable, '-m', 'timm_deluge.run', str(script), '--flag', 'x'], text=True,
                         capture_output=True, check=True)
    assert out.stdout.strip() == "True ['--flag', 'x'] __main__"


@pytest.mark.parametrize('arguments, message', [(['absent.py'], 'absent.py: no such script'), ([], 'usage: python -m')])
def test_run_names_a_missing_script(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['run', *arguments])
    with pytest.raises(SystemExit, match=message):
        runpy.run_module('timm_deluge.run', run_name='__main__')
