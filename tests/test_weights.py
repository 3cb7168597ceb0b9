"""A checkpoint is loaded only when it is what the manifest says, and every refusal says why."""
import hashlib
import json

import pytest
import safetensors.torch
import timm
import torch
from conftest import write_entry
from timm.models import adapt_input_conv

from timm_deluge import weights
from timm_deluge.weights import CheckpointError, find_checkpoint, list_checkpoints, verify_checkpoint, write_manifest

CHECKPOINTS = list_checkpoints()


def create_from_scratch_checkpoint(**kwargs):
    """timm's registry was filled before the scratch checkpoint existed, so name its configuration."""
    cfg = {**timm.get_pretrained_cfg('delugenet146').to_dict(), **find_checkpoint('delugenet146').pretrained_cfg()}
    return timm.create_model('delugenet146', pretrained=True, pretrained_cfg=cfg, **kwargs)


def create_by_name(**kwargs):
    return timm.create_model('delugenet146', pretrained=True, **kwargs)


@pytest.mark.parametrize('checkpoint', CHECKPOINTS, ids=lambda c: c.name)
def test_published_file_is_what_the_manifest_says(checkpoint):
    verify_checkpoint(checkpoint)
    assert checkpoint.bytes <= 45 * 2 ** 20
    state_dict = safetensors.torch.load_file(checkpoint.path)
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
    assert cfg['tag'] == checkpoint.tag and cfg['mean'] == tuple(checkpoint.mean)
    assert cfg['label_names'] == tuple(checkpoint.class_names)


@pytest.mark.parametrize('checkpoint', CHECKPOINTS, ids=lambda c: c.name)
def test_pretrained_weights_adapt_to_other_classes_and_channels(checkpoint):
    original = safetensors.torch.load_file(checkpoint.path)
    adapted = timm.create_model(checkpoint.name, pretrained=True, num_classes=7, in_chans=1).state_dict()
    assert torch.equal(adapted['stem.conv.weight'], adapt_input_conv(1, original['stem.conv.weight']).float())
    assert adapted['head.fc.weight'].shape[0] == 7
    for name in original.keys() - {'stem.conv.weight', 'head.fc.weight', 'head.fc.bias'}:
        assert torch.equal(adapted[name], original[name].to(adapted[name].dtype))


def test_sound_checkpoint_loads(scratch_weights):
    model = create_from_scratch_checkpoint()
    state_dict = safetensors.torch.load_file(scratch_weights)
    assert all(torch.equal(v, state_dict[k].to(v.dtype)) for k, v in model.state_dict().items())


def test_scratch_checkpoint_adapts_to_other_classes_and_channels(scratch_weights):
    model = create_from_scratch_checkpoint(num_classes=7, in_chans=1, global_pool='catavgmax')
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)


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
