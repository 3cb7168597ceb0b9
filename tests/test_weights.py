"""A checkpoint is loaded only when it is what the manifest says, and every refusal says why."""
import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import write_entry
from hatchling.builders.wheel import WheelBuilder
from huggingface_hub import save_torch_state_dict
from test_cli import invoke
from timm.models import adapt_input_conv

from timm_deluge import delugenet, weights
from timm_deluge.paper import PUBLISHED
from timm_deluge.pretrained import _say_what_it_is
from timm_deluge.weights import (
    CheckpointError,
    find_checkpoint,
    joined_bytes,
    list_checkpoints,
    load_checkpoint,
    verify_checkpoint,
    write_manifest,
)

CHECKPOINTS = list_checkpoints()
REPOSITORY = Path(__file__).resolve().parent.parent


def create_from_scratch_checkpoint(**kwargs):
    """timm's registry was filled before the scratch checkpoint existed, so name its configuration."""
    cfg = {**timm.get_pretrained_cfg('delugenet146').to_dict(), **find_checkpoint('delugenet146').pretrained_cfg()}
    return timm.create_model('delugenet146', pretrained=True, pretrained_cfg=cfg, **kwargs)


def create_by_name(**kwargs):
    return timm.create_model('delugenet146', pretrained=True, **kwargs)


@pytest.mark.parametrize('checkpoint', CHECKPOINTS, ids=lambda c: c.name)
def test_published_file_is_what_the_manifest_says(checkpoint):
    assert all(part['bytes'] <= 45 * 2 ** 20 for part in checkpoint.parts or [{'bytes': checkpoint.bytes}])
    state_dict = load_checkpoint(checkpoint)
    assert {v.dtype for v in state_dict.values()} == {torch.float16, torch.int64}
    model = timm.create_model(checkpoint.name, pretrained=True)
    assert state_dict.keys() == model.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == checkpoint.num_params
    assert model.num_classes == len(checkpoint.class_names) == len(set(checkpoint.class_names))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state_dict[name].to(value.dtype), rtol=0, atol=0)
        assert value.isfinite().all()


@pytest.mark.parametrize('checkpoint', CHECKPOINTS, ids=lambda c: c.name)
def test_pretrained_cfg_is_the_manifests(checkpoint):
    cfg = timm.create_model(checkpoint.name).pretrained_cfg
    assert cfg['tag'] == checkpoint.tag and cfg['num_classes'] == len(checkpoint.class_names)
    assert cfg['label_names'] == tuple(checkpoint.class_names)
    assert cfg.get('label_descriptions') == checkpoint.class_descriptions
    for key in 'input_size', 'mean', 'std':
        assert cfg[key] == tuple(getattr(checkpoint, key))
    for key in 'interpolation', 'crop_pct':
        assert cfg[key] == getattr(checkpoint, key)


def test_a_manifest_is_written_whole_or_not_at_all(scratch_weights, monkeypatch):
    manifest = scratch_weights.parent / 'manifest.json'
    before = manifest.read_bytes()
    write_text = Path.write_text

    def fill_the_disk(path, text, **kwargs):
        write_text(path, text[:100], **kwargs)
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', fill_the_disk)
    with pytest.raises(OSError, match='No space left'):
        write_manifest([])
    assert manifest.read_bytes() == before


@pytest.mark.parametrize('checkpoint', CHECKPOINTS, ids=lambda c: c.name)
def test_pretrained_weights_adapt_to_other_classes_and_channels(checkpoint):
    original = load_checkpoint(checkpoint)
    adapted = timm.create_model(checkpoint.name, pretrained=True, num_classes=7, in_chans=1).state_dict()
    assert torch.equal(adapted['stem.conv.weight'], adapt_input_conv(1, original['stem.conv.weight']).float())
    assert adapted['head.fc.weight'].shape[0] == 7
    for name in original.keys() - {'stem.conv.weight', 'head.fc.weight', 'head.fc.bias'}:
        assert torch.equal(adapted[name], original[name].to(adapted[name].dtype))


def test_sound_checkpoint_loads(scratch_weights):
    model = create_from_scratch_checkpoint()
    state_dict = safetensors.torch.load_file(scratch_weights)
    assert all(torch.equal(v, state_dict[k].to(v.dtype)) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', ['delugenet146', 'delugenet146.muon51_avg_cifar100'])
def test_weights_of_ones_own_take_the_place_of_the_packages(name):
    state_dict = timm.create_model('delugenet146').state_dict()
    counters = [key for key in state_dict if key.endswith('num_batches_tracked')]
    for key in counters:  # a file without them loads, too
        del state_dict[key]
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))
    assert all(torch.equal(tensor, state_dict[key]) for key, tensor in model.state_dict().items() if key in state_dict)


def test_a_part_of_a_checkpoint_loads_where_this_is_asked_for():
    kwargs = dict(pretrained=True, aggregation='residual')
    with pytest.raises(CheckpointError, match='does not fit this model'):
        timm.create_model('delugenet146', **kwargs)
    with pytest.raises(CheckpointError, match=r'model: \(16, 32, 1, 1\), checkpoint: \(32, 64, 1, 1\)'):
        timm.create_model('delugenet146', widths=(16, 64, 128), pretrained_strict=False, **kwargs)
    model = timm.create_model('delugenet146', pretrained_strict=False, **kwargs)
    conv = 'stages.2.layers.3.conv2.weight'
    assert torch.equal(model.state_dict()[conv], load_checkpoint(find_checkpoint('delugenet146'))[conv].float())


def test_scratch_checkpoint_adapts_to_other_classes_and_channels(scratch_weights):
    model = create_from_scratch_checkpoint(num_classes=7, in_chans=1, global_pool='catavgmax')
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)


def test_parts_follow_the_hubs_convention_and_the_manifest_knows_each(split_weights):
    checkpoint = find_checkpoint('delugenet146')
    index_path = split_weights[0].parent / 'delugenet146.test_random.safetensors.index.json'
    paths = [*split_weights, index_path]
    assert [part['file'] for part in checkpoint.parts] == [path.name for path in paths]
    assert split_weights[0].name == 'delugenet146.test_random-00001-of-00004.safetensors' and len(split_weights) == 4
    for part, path in zip(checkpoint.parts, paths):
        data = path.read_bytes()
        assert (part['bytes'], part['sha256']) == (len(data), hashlib.sha256(data).hexdigest())
    index = json.loads(index_path.read_text())
    for path in split_weights:
        tensors = safetensors.torch.load_file(path)
        assert tensors.keys() == {name for name, file in index['weight_map'].items() if file == path.name}
    assert index['weight_map'].keys() == load_checkpoint(checkpoint).keys()
    assert checkpoint.sha256 == hashlib.sha256(joined_bytes(load_checkpoint(checkpoint))).hexdigest()


def test_parts_are_joined_on_loading(split_weights):
    state_dict = load_checkpoint(find_checkpoint('delugenet146'))
    model = create_from_scratch_checkpoint()
    assert all(torch.equal(v, state_dict[k].to(v.dtype)) for k, v in model.state_dict().items())
    assert create_from_scratch_checkpoint(num_classes=7, in_chans=1)(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert len(create_from_scratch_checkpoint(features_only=True)(torch.randn(1, 3, 32, 32))) == 4


@pytest.mark.parametrize('create', [create_by_name, create_from_scratch_checkpoint])
def test_missing_or_altered_part_is_named(split_weights, create):
    data = split_weights[2].read_bytes()
    split_weights[2].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match='00003-of-00004.safetensors: SHA-256 .* but the manifest says'):
        create()
    split_weights[2].unlink()
    with pytest.raises(CheckpointError, match='00003-of-00004.safetensors: the file of .* is missing'):
        create()


@pytest.mark.parametrize('create', [create_by_name, create_from_scratch_checkpoint])
@pytest.mark.parametrize('damage, message', [
    (Path.unlink, 'the file of .* is missing'),
    (lambda path: path.write_text('{}'), '2 bytes, but the manifest says'),
    (lambda path: path.write_text(path.read_text().replace('00001', '00002', 1)), 'SHA-256 .* but the manifest says'),
])
def test_missing_or_altered_index_is_named(split_weights, create, damage, message):
    damage(split_weights[0].parent / 'delugenet146.test_random.safetensors.index.json')
    with pytest.raises(CheckpointError, match=f'delugenet146.test_random.safetensors.index.json: {message}'):
        create()


@pytest.mark.parametrize('create', [create_by_name, create_from_scratch_checkpoint])
def test_what_was_verified_is_what_is_loaded(split_weights, create, monkeypatch):
    """Files that are swapped as soon as they were read for verification."""
    expected = create().state_dict()
    read_bytes = Path.read_bytes

    def read_and_swap(path):
        content = read_bytes(path)
        if path.suffix == '.safetensors':
            zeros = {name: torch.zeros_like(tensor) for name, tensor in safetensors.torch.load(content).items()}
            safetensors.torch.save_file(zeros, path)
        return content

    monkeypatch.setattr(Path, 'read_bytes', read_and_swap)
    model = create()
    assert not any(tensor.any() for tensor in safetensors.torch.load_file(split_weights[0]).values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('kwargs', [{}, {'features_only': True}])
def test_tensors_are_not_kept_with_the_configuration(scratch_weights, kwargs):
    model = create_by_name(**kwargs)
    assert model.pretrained_cfg['file'] == str(scratch_weights) and 'state_dict' not in model.pretrained_cfg


def test_the_first_of_several_parts_loads_as_a_file(split_weights):
    name = 'delugenet146.test_random'
    for path in [*split_weights, split_weights[0].parent / f'{name}.safetensors.index.json']:
        path.rename(path.with_name(path.name.replace(name, 'mine')))
    (index,) = split_weights[0].parent.glob('*.index.json')
    index.write_text(index.read_text().replace(name, 'mine'))
    first = index.with_name('mine-00001-of-00004.safetensors')
    create = partial(timm.create_model, 'delugenet146', pretrained=True, pretrained_cfg_overlay={'file': str(first)})
    expected = {name: tensor for path in sorted(first.parent.glob('mine-*')) for name, tensor in
                safetensors.torch.load_file(path).items()}
    assert all(torch.equal(v, expected[k].to(v.dtype)) for k, v in create().state_dict().items())
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink):
        damage(first.with_name('mine-00003-of-00004.safetensors'))
        with pytest.raises(CheckpointError, match='00003-of-00004.safetensors: a part of mine-00001-of-00004.safetens'):
            create()
    for text in ('{}', '[]', 'null', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b"}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match='index.json: not an index of mine-00001-of-00004.safetensors'):
            create()


@pytest.mark.slow
def test_joining_parts_takes_no_more_memory_than_one_file(tmp_path):
    """Peak of a process that loads 256 MiB of fp16 tensors into a model, from one file and from eight parts."""
    state_dict = {f'{i}.weight': torch.full((2048, 4096), i, dtype=torch.float16) for i in range(16)}
    safetensors.torch.save_file(state_dict, tmp_path / 'one.safetensors')
    save_torch_state_dict(
        state_dict, tmp_path, filename_pattern='many{suffix}.safetensors', max_shard_size=32 * 2 ** 20)
    code = ('import resource, sys, torch; from safetensors.torch import load_file\n'
            'from timm_deluge.weights import join_parts\n'
            'model = torch.nn.Sequential(*(torch.nn.Linear(4096, 2048, bias=False) for _ in range(16)))\n'
            'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'model.load_state_dict(join_parts(load_file(sys.argv[1]), sys.argv[1]))\n'
            'assert all(float(m.weight[-1, -1]) == i for i, m in enumerate(model))\n'
            'print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)')

    def peak(file: str) -> float:
        command = [sys.executable, '-c', code, str(tmp_path / file)]
        return float(subprocess.run(command, check=True, capture_output=True).stdout)

    one, many = peak('one.safetensors'), peak('many-00001-of-00008.safetensors')
    assert many < one + 32, f'{many} MiB instead of {one}'


def test_first_load_says_once_what_the_weights_are(scratch_weights, caplog):
    _say_what_it_is.cache_clear()
    manifest = scratch_weights.parent / 'manifest.json'
    for tag, level in (('once_cifar100', logging.INFO), ('once_tinyin', logging.WARNING)):
        entry = json.loads(manifest.read_text())['checkpoints'][0]
        manifest.write_text(json.dumps({'checkpoints': [{**entry, 'tag': tag}]}))
        caplog.clear()
        with caplog.at_level(logging.INFO, 'timm_deluge.pretrained'):
            for _ in range(2):
                create_from_scratch_checkpoint()
        (record,) = (r for r in caplog.records if r.name == 'timm_deluge.pretrained')
        assert record.levelno == level
        assert record.message.startswith(f'delugenet146.{tag} knows the 100 classes of none')


@pytest.mark.parametrize('checkpoint', CHECKPOINTS, ids=lambda c: c.name)
def test_without_weights_a_model_is_the_papers(checkpoint):
    model = timm.create_model(checkpoint.model)
    imagenet = 'imagenet' in PUBLISHED[checkpoint.model].top1_error
    assert model.num_classes == (1000 if imagenet else 100) and 'file' not in model.pretrained_cfg
    assert model.pretrained_cfg['input_size'] == ((3, 224, 224) if imagenet else (3, 32, 32))


def test_model_without_checkpoint_says_what_there_is_and_how_to_train():
    with pytest.raises(CheckpointError) as error:
        timm.create_model('resnetlike218_1x1', pretrained=True)
    message = str(error.value)
    assert all(c.name in message for c in CHECKPOINTS)
    assert 'train.py --device-modules timm_deluge --model resnetlike218_1x1' in message


def test_unknown_tag_says_which_there_are(scratch_weights):
    with pytest.raises(CheckpointError, match=r"no checkpoint with the tag 'nonsense'.*delugenet146\.test_random"):
        timm.create_model('delugenet146.nonsense', pretrained=True)


@pytest.mark.parametrize('create', [create_by_name, create_from_scratch_checkpoint])
def test_missing_file(scratch_weights, create):
    scratch_weights.unlink()
    with pytest.raises(CheckpointError, match='test_random.safetensors: the file of .* is missing'):
        create()


@pytest.mark.parametrize('create', [create_by_name, create_from_scratch_checkpoint])
def test_truncated_file(scratch_weights, create):
    data = scratch_weights.read_bytes()
    scratch_weights.write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match=f'{len(data) - 1000} bytes, but the manifest says {len(data)}'):
        create()


@pytest.mark.parametrize('create', [create_by_name, create_from_scratch_checkpoint])
def test_altered_file(scratch_weights, create):
    data = bytearray(scratch_weights.read_bytes())
    data[-1] ^= 1
    scratch_weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=hashlib.sha256(data).hexdigest()):
        create()


@pytest.mark.parametrize('change, message', [
    (lambda s: s.update({'norm.weight': torch.ones(3)}), r'norm\.weight \(model: \(256,\), checkpoint: \(3,\)\)'),
    (lambda s: s.pop('norm.bias'), r'norm\.bias \(model: \(256,\), checkpoint: absent\)'),
    (lambda s: s.update({'extra': torch.ones(1)}), r'extra \(model: absent, checkpoint: \(1,\)\)'),
    (lambda s: s.update({'head.fc.weight': torch.ones(100, 9)}), r'head\.fc\.weight .* checkpoint: \(100, 9\)'),
    (lambda s: s.update({'stem.conv.weight': torch.ones(9, 3, 3, 3)}), r"stem\.conv\.weight .*\(9, 'in_chans', 3, 3\)"),
])
def test_wrong_tensors(scratch_weights, change, message):
    state_dict = safetensors.torch.load_file(scratch_weights)
    change(state_dict)
    safetensors.torch.save_file(state_dict, scratch_weights)
    write_entry(scratch_weights)
    with pytest.raises(CheckpointError, match=message):
        create_from_scratch_checkpoint()


def test_a_checkpoint_that_timm_does_not_know_is_refused(tmp_path):
    file = tmp_path / 'tutorial.pth'
    torch.save({'epoch': 3, 'model_state_dict': timm.create_model('delugenet146').state_dict()}, file)
    with pytest.raises(CheckpointError, match=r'does not fit this model: .*, the first one is epoch \(model: absent'):
        timm.create_model('delugenet146', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


def test_a_whole_file_may_be_named_like_a_part(tmp_path):
    file = tmp_path / 'fold-00001-of-00005.pth'
    model = timm.create_model('delugenet146')
    torch.save(model.state_dict(), file)
    loaded = timm.create_model('delugenet146', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert torch.equal(loaded.stem.conv.weight, model.stem.conv.weight)


def test_malformed_manifest(scratch_weights):
    manifest = scratch_weights.parent / 'manifest.json'
    for text in ('', '{}', '{"checkpoints": [{"model": "delugenet146"}]}'):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match='manifest.json: not a manifest of checkpoints'):
            list_checkpoints()
    manifest.unlink()
    with pytest.raises(CheckpointError, match='manifest of checkpoints is missing'):
        list_checkpoints()


def test_manifest_survives_reading_and_writing(scratch_weights):
    manifest = scratch_weights.parent / 'manifest.json'
    before = json.loads(manifest.read_text())
    write_manifest(weights.list_checkpoints())
    assert json.loads(manifest.read_text()) == before
    assert sorted(p.name for p in scratch_weights.parent.iterdir()) == ['delugenet146.test_random.safetensors',
                                                                        'manifest.json']


def test_verify_passes_over_what_the_package_leaves_out(split_weights):
    assert 'ok' in invoke('weights', 'verify').stdout
    split_weights[0].unlink()
    assert invoke('weights', 'verify').exit_code == 1
    for path in split_weights[0].parent.glob('*.safetensors*'):
        path.unlink()
    result = invoke('weights', 'verify')
    assert result.exit_code == 0 and 'not here: delugenet146.test_random' in result.stdout


def test_scripts_that_take_the_configuration_from_the_registry_are_told_the_same(tmp_path, monkeypatch):
    name = 'delugenet122'
    cfg = replace(timm.models.get_pretrained_cfg(name), file=None)  # of a package without the larger checkpoints
    for key in name, f'{name}.{cfg.tag}':
        monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, key, cfg)
    monkeypatch.setattr(weights, 'weights_dirs', lambda: {'package': tmp_path})
    with pytest.raises(CheckpointError, match=f'the file of {name}.{cfg.tag} is missing. Looked in package'):
        timm.create_model(**timm.models.resolve_model_input_args(name), pretrained=True)


def test_the_default_is_the_manifests_first_one_even_where_only_another_is_here(tmp_path, monkeypatch):
    first, other = (c for c in CHECKPOINTS if c.model == 'delugenet218')
    (tmp_path / other.file).touch()
    monkeypatch.setattr(weights, 'weights_dirs', lambda: {'package': tmp_path})
    cfgs = delugenet._default_cfgs(CHECKPOINTS)['delugenet218']
    assert list(cfgs.tags) == [first.tag, other.tag]
    assert [bool(cfgs.cfgs[tag].has_weights) for tag in cfgs.tags] == [False, True]


@pytest.mark.parametrize('name, num_classes, size', [('delugenet122', 1000, 224), ('delugenet146', 100, 32)])
def test_scripts_that_take_the_configuration_from_the_registry_train_the_same_network(name, num_classes, size):
    models = [
        timm.create_model(device='meta', **options)
        for options in (timm.models.resolve_model_input_args(name), dict(model_name=name))]
    for model in models:
        assert (model.num_classes, model.pretrained_cfg['input_size'][1]) == (num_classes, size)
    named = timm.create_model(f'{name}.{find_checkpoint(name).tag}', device='meta')
    assert named.num_classes == len(find_checkpoint(name).class_names)


def test_the_registrys_configuration_names_its_own_checkpoint():
    other = next(c for c in CHECKPOINTS if c.model == 'delugenet146' and c != find_checkpoint('delugenet146'))
    model = timm.create_model(**timm.models.resolve_model_input_args(other.name), pretrained=True)
    assert torch.equal(model.state_dict()['head.fc.bias'], load_checkpoint(other)['head.fc.bias'].float())


def test_the_places_are_looked_through_in_order(scratch_weights, split_weights, tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ('package', 'checkout', 'cache')}
    monkeypatch.setattr(weights, 'weights_dirs', lambda: folders)
    checkpoint = find_checkpoint('delugenet146')
    assert checkpoint.files == []
    with pytest.raises(CheckpointError, match='package .* checkout .* cache'):
        verify_checkpoint(checkpoint)
    for folder in reversed(folders.values()):
        folder.mkdir()
        for part in checkpoint.parts:
            assert all(file['path'].parent != folder for file in checkpoint.files)
            (folder / part['file']).write_bytes((split_weights[0].parent / part['file']).read_bytes())
        assert {file['path'].parent for file in checkpoint.files} == {folder}
        verify_checkpoint(checkpoint)


def test_a_folder_that_may_not_be_entered_has_nothing(tmp_path, monkeypatch):
    stat = os.stat

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(weights, 'weights_dirs', lambda: {'checkout': tmp_path / 'weights'})
    monkeypatch.setattr(os, 'stat', refuse)
    for checkpoint in CHECKPOINTS:
        assert checkpoint.files == [] and checkpoint.pretrained_cfg()['num_classes'] == len(checkpoint.class_names)


@pytest.mark.parametrize('url, expected', [
    ('file:///some%20where/checkout', Path('/some where/checkout')), ('https://host/archive.whl', None)])
def test_pip_knows_the_checkout(monkeypatch, url, expected):
    class Distribution:
        @staticmethod
        def read_text(name):
            assert name == 'direct_url.json'
            return json.dumps({'url': url, 'dir_info': {}})

    monkeypatch.setattr(weights, 'distribution', lambda name: Distribution)
    assert weights._checkout() == expected


def test_a_package_that_pip_does_not_know_has_no_checkout(monkeypatch):
    def fail(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(weights, 'distribution', fail)
    assert weights.weights_dirs().keys() == {'the package', 'the Hugging Face cache'}


def test_the_wheel_has_the_smaller_checkpoints_and_fits_into_pypi(tmp_path, monkeypatch):
    [wheel] = WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path), versions=['standard'])
    assert Path(wheel).stat().st_size < 100e6
    names = zipfile.ZipFile(wheel).namelist()
    assert 'timm_deluge/checkpoints/manifest.json' in names
    sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / 'timm_deluge').rglob('*')
               if path.is_file() and '__pycache__' not in path.parts}
    assert 'timm_deluge/ops/kernels.cpp' in sources <= set(names)
    shipped = {Path(name).name for name in names if name.endswith(('.safetensors', '.index.json'))}
    smaller = 'delugenet146', 'resnetlike146_1x1', 'resnetlike146_3x3'
    assert shipped == {checkpoint.file for checkpoint in list_checkpoints() if checkpoint.model in smaller}
    installed = tmp_path / 'installed'
    zipfile.ZipFile(wheel).extractall(installed)
    code = ('from timm_deluge import weights; print(weights.weights_dir())\n'
            "weights.verify_checkpoint(weights.find_checkpoint('delugenet146'))")
    result = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(installed)},
                            cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).samefile(installed / 'timm_deluge' / 'checkpoints')
    monkeypatch.setattr(weights, 'weights_dirs', lambda: {'package': tmp_path / 'empty'})
    checkpoints = [replace(checkpoint, hf_hub_id=None) for checkpoint in list_checkpoints()]
    assert {checkpoint.model for checkpoint in checkpoints if not checkpoint.is_elsewhere} == set(smaller)
    assert {checkpoint.model for checkpoint in checkpoints if checkpoint.pretrained_cfg()['file']} == set(smaller)
    assert all(replace(checkpoint, hf_hub_id='a/b').pretrained_cfg()['file'] for checkpoint in checkpoints)
