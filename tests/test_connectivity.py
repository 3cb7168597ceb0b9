"""Norms of connections are what their weights say, wherever a checkpoint comes from."""
import json
import math

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from test_cli import invoke

from timm_deluge.connectivity import block_connectivity, draw_connectivity, read_state_dict
from timm_deluge.weights import CheckpointError


@pytest.fixture
def state_dict():
    """Weights of one network whose connection from h_i has the norm i + 1 in every convolution."""
    model = timm.create_model('delugenet146', depths=(3, 2), widths=(2, 4))
    with torch.no_grad():
        for stage in model.stages:
            for cross_layer in stage.cross_layers:
                channels = cross_layer.channels
                for i in range(cross_layer.num_layers):
                    cross_layer.weight[:, 0, i, 0] = (-1) ** i * (i + 1) / math.sqrt(channels)
        model.stages[1].cross_layers[1].weight[:3, 0, 1, 0] = 0
    return model.state_dict()


def assert_blocks(blocks):
    first, second = blocks
    assert [block.block for block in blocks] == [1, 2]
    assert [len(norms) for norms in first.norms] == [2, 3]  # the first composite layer gives h_0
    assert first.norms[-1] == pytest.approx([1, 2, 3])
    assert first.last == pytest.approx([1 / 3, 2 / 3, 1])
    assert first.dead_channels == [0, 0]
    assert second.dead_channels == pytest.approx([0, 3 / 24])


def test_norms(state_dict):
    assert_blocks(block_connectivity(state_dict))


@pytest.mark.parametrize('form', ['safetensors', 'train.py', 'module.'])
def test_files(state_dict, tmp_path, form):
    path = tmp_path / ('last.safetensors' if form == 'safetensors' else 'last.pth.tar')
    if form == 'safetensors':
        safetensors.torch.save_file(state_dict, path)
    else:
        prefix = 'module.' if form == 'module.' else ''
        torch.save({'epoch': 3, 'state_dict': {prefix + name: tensor for name, tensor in state_dict.items()}}, path)
    assert_blocks(block_connectivity(read_state_dict(str(path))))


def test_parts(split_weights):
    joined = block_connectivity(read_state_dict(str(split_weights[0])))
    assert [len(block.norms) for block in joined] == [7, 16, 24]


def test_command(scratch_weights, tmp_path):
    expected = block_connectivity(read_state_dict(str(scratch_weights)))
    result = invoke('connectivity', 'delugenet146', '--json', '--output', tmp_path / 'picture.svg')
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == [block.as_dict() for block in expected]
    assert (tmp_path / 'picture.svg').read_text().lstrip().startswith('<?xml')
    table = invoke('connectivity', scratch_weights).stdout
    assert 'block 3' in table and 'h_24' in table and 'h_25' not in table


def test_picture_has_every_connection(state_dict, tmp_path):
    figure = draw_connectivity(block_connectivity(state_dict), 'some network')
    bars = [[bar.get_height() for bar in axis.patches] for axis in figure.axes[:2]]
    assert bars[0] == pytest.approx([1 / 3, 2 / 3, 1])
    drawn = figure.axes[2].images[0].get_array()
    assert drawn.shape == (2, 3) and drawn.mask.tolist() == [[False, False, True], [False] * 3]
    figure.savefig(tmp_path / 'picture.png', dpi=150)
    with Image.open(tmp_path / 'picture.png') as image:
        assert image.size[0] == 1350


@pytest.mark.parametrize('source, message', [
    ('nonsense.safetensors', 'no such file'),
    ('nonsense', 'neither a file nor a model of timm'),
    ('delugenet218', 'has no pretrained checkpoint yet'),
])
def test_unknown_sources(scratch_weights, source, message):
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(source)
    result = invoke('connectivity', source)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize('aggregation, message', [
    ('residual', 'no cross-layer depthwise convolutions'), ('last', 'nothing to compare')])
def test_networks_without_connections(tmp_path, aggregation, message):
    path = tmp_path / f'{aggregation}.safetensors'
    model = timm.create_model('delugenet146', depths=(2, 2), widths=(2, 4), aggregation=aggregation)
    safetensors.torch.save_file(model.state_dict(), path)
    result = invoke('connectivity', path)
    assert result.exit_code == 2 and message in ' '.join(result.stderr.split())


def test_pictures_are_png_or_svg(scratch_weights, tmp_path):
    result = invoke('connectivity', scratch_weights, '--output', tmp_path / 'picture.jpg')
    assert result.exit_code == 2 and '.png or .svg' in result.stderr and not list(tmp_path.glob('picture*'))
