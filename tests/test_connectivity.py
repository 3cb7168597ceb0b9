"""Norms of connections are what their weights say, wherever a checkpoint comes from."""
import json
import math
import sys
from argparse import Namespace

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from test_cli import invoke
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import CheckpointSaver

from timm_deluge.connectivity import block_connectivity, draw_connectivity, read_state_dict
from timm_deluge.prune import find_cross_layers, prune_connections, save_pruned
from timm_deluge.training_connectivity import training_connectivity
from timm_deluge.weights import CheckpointError, read_training_state


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
    assert first.dead_weights == [0, 0]
    assert second.dead_weights == pytest.approx([0, 3 / 24])


def test_weights_that_are_all_zero_are_dead():
    blocks = block_connectivity({'stages.0.cross_layers.0.weight': torch.zeros(8, 1, 2, 1)})
    assert blocks[0].dead_weights == [1]


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


def test_a_file_of_a_run_has_the_trained_weights_not_their_average(state_dict, tmp_path):
    average = {name: 2 * tensor for name, tensor in state_dict.items()}
    torch.save({'state_dict': state_dict, 'state_dict_ema': average}, tmp_path / 'last.pth.tar')
    assert_blocks(block_connectivity(read_state_dict(str(tmp_path / 'last.pth.tar'))))


def test_one_weight_for_all_channels_has_one_norm_wherever_it_comes_from(tmp_path):
    options = dict(depths=[2, 2], widths=[2, 4], aggregation='scalar')
    model = timm.create_model('delugenet146', **options)
    for conv in find_cross_layers(model).values():
        torch.nn.init.normal_(conv.weight)
    timm.models.save_for_hf(model, str(tmp_path), model_args=options)
    blocks = block_connectivity(model.state_dict())
    assert block_connectivity(read_state_dict(f'local-dir:{tmp_path}')) == blocks
    pruned = prune_connections(model, 0.2, 'norm', unit='connection')
    save_pruned(pruned, tmp_path / 'pruned')
    after = block_connectivity(read_state_dict(f'local-dir:{tmp_path / "pruned"}'))
    for stage, block, block_after in zip(pruned.stages, blocks, after):
        for conv, norms, left in zip(stage.cross_layers, block.norms, block_after.norms):
            assert left == [norm if i in conv.sources else 0 for i, norm in enumerate(norms)]


@pytest.mark.parametrize('name, content', [
    ('a.safetensors', b'123'), ('a.pth', b''), ('b.pth', b'123'), ('c.pth', []), ('d.pth', b'junk'),
    ('args.yaml', b'aa: null'), ('summary.csv', b'epoch,loss')])
def test_a_damaged_file_is_named(name, content, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f'{name}: this is no checkpoint, or damaged'):
        read_state_dict(str(path))
    result = invoke('connectivity', path)
    assert result.exit_code == 2 and name in result.stderr and 'Traceback' not in result.output


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


def test_table(state_dict, tmp_path):
    safetensors.torch.save_file(state_dict, tmp_path / 'a.safetensors')
    lines = invoke('connectivity', tmp_path / 'a.safetensors').stdout.splitlines()
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in lines if 'h_' in line]
    assert rows == [['h_0', '0.33', '0.33'], ['h_1', '0.67', '0.53'], ['h_2', '1.00', '1.00']]


def test_a_picture_needs_matplotlib(scratch_weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    result = invoke('connectivity', scratch_weights, '--output', tmp_path / 'a.png')
    assert result.exit_code == 2 and 'pip install matplotlib' in result.stderr


def test_picture_has_every_connection(state_dict, tmp_path):
    figure = draw_connectivity(block_connectivity(state_dict), 'some network')
    bars = [[bar.get_height() for bar in axis.patches] for axis in figure.axes[:2]]
    assert bars[0] == pytest.approx([1 / 3, 2 / 3, 1])
    drawn = figure.axes[2].images[0].get_array()
    assert drawn.shape == (2, 3) and drawn.mask.tolist() == [[False, False, True], [False] * 3]
    assert drawn[1].tolist() == pytest.approx([1 / 3, 2 / 3, 1])
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


@pytest.mark.parametrize('aggregation, reparameterised, message', [
    ('residual', False, 'no cross-layer depthwise convolutions'), ('last', False, 'nothing to compare'),
    ('cross_layer', True, 'or one that was reparameterised')])
def test_networks_without_connections(tmp_path, aggregation, reparameterised, message):
    path = tmp_path / f'{aggregation}.safetensors'
    model = timm.create_model('delugenet146', depths=(2, 2), widths=(2, 4), aggregation=aggregation)
    if reparameterised:
        model = timm.utils.reparameterize_model(model.eval())
    safetensors.torch.save_file(model.state_dict(), path)
    result = invoke('connectivity', path)
    assert result.exit_code == 2 and message in ' '.join(result.stderr.split())


def test_pictures_are_png_or_svg(scratch_weights, tmp_path):
    result = invoke('connectivity', scratch_weights, '--output', tmp_path / 'picture.jpg')
    assert result.exit_code == 2 and '.png or .svg' in result.stderr and not list(tmp_path.glob('picture*'))


def train_one_step(folder, opt, momentum=0.9, saved='') -> None:
    """Leave what train.py does of a network in which the gradient of a connection from h_i has the norm i + 1."""
    size = {} if saved else dict(depths=(3, 2), widths=(2, 4))
    args = Namespace(
        model=saved or 'delugenet146', num_classes=5, in_chans=None, input_size=[1, 8, 8], model_kwargs=size, opt=opt,
        lr=0.1, weight_decay=1e-4, momentum=momentum, opt_kwargs={})
    model = timm.create_model(args.model, num_classes=5, in_chans=1, **size)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn_like(parameter)
        if 'cross_layers' in name:
            norms = torch.arange(1., 1 + parameter.shape[2])
            parameter.grad = (norms / math.sqrt(len(parameter)))[:, None].expand_as(parameter).clone()
    optimizer.step()
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(folder), recovery_dir=str(folder))
    for epoch in (0, 1):
        saver.save_checkpoint(epoch, metric=epoch)


@pytest.mark.parametrize('opt', ['sgd', 'nadamw', 'muon'])
def test_training(tmp_path, opt):
    train_one_step(tmp_path, opt)
    epochs = training_connectivity(tmp_path)
    assert [epoch.epoch for epoch in epochs] == [0, 1]
    first, second = epochs[0].gradients
    assert first.last == pytest.approx([1 / 3, 2 / 3, 1], rel=1e-3)  # SGD's has weight decay in it
    assert second.last == pytest.approx([1 / 3, 2 / 3, 1], rel=1e-3)
    assert first.norms[-1] == pytest.approx([0.1, 0.2, 0.3], rel=1e-2)  # 1 - 0.9 of the first gradient, none before
    assert epochs[0].weights == block_connectivity(read_state_dict(str(tmp_path / 'checkpoint-0.pth.tar')))
    result = invoke('connectivity', tmp_path)
    rows = [line.split('│') for line in result.stdout.splitlines() if '│' in line]
    assert result.exit_code == 0 and len(rows) == 4
    _, *others = epochs[0].weights[0].last
    assert [cell.strip() for cell in rows[0]][4:6] == [f'{sum(others) / len(others):.2f}', f'{others[-1]:.2f}']
    shown = json.loads(invoke('connectivity', tmp_path, '--json').stdout)
    assert shown[1]['gradients'][0]['norms'] == first.norms
    (tmp_path / 'checkpoint-1.pth.tar').unlink()  # as of an epoch that is not among the best
    assert training_connectivity(tmp_path) == epochs


def test_a_run_from_a_checkpoint_that_is_gone(tmp_path):
    train_one_step(tmp_path, 'sgd')
    checkpoint = read_training_state(tmp_path / 'last.pth.tar')
    checkpoint['args'].model = 'delugenet146.gone_cifar100'
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    assert [epoch.epoch for epoch in training_connectivity(tmp_path)] == [0, 1]


def test_weights_without_gradients_have_zeros(tmp_path):
    train_one_step(tmp_path, 'sgd')
    last = tmp_path / 'last.pth.tar'
    checkpoint, whole = read_training_state(last), training_connectivity(tmp_path)[-1].gradients[0]
    states = checkpoint['optimizer']['state']
    for number in [n for n, state in states.items() if state['momentum_buffer'].shape == (4, 1, 2, 1)]:
        del states[number]
    last.unlink()  # a hard link
    torch.save(checkpoint, last)
    (tmp_path / 'checkpoint-1.pth.tar').unlink()
    assert training_connectivity(tmp_path)[-1].gradients[0].norms == [[0, 0], *whole.norms[1:]]


def test_averaged_weights_in_the_last_ones_place_are_passed_over(tmp_path):
    train_one_step(tmp_path, 'sgd')
    last = tmp_path / 'last.pth.tar'
    tensors = read_training_state(last)['state_dict']
    last.unlink()  # a hard link
    torch.save(tensors, last)  # as avg_checkpoints.py does
    assert [epoch.epoch for epoch in training_connectivity(tmp_path)] == [0, 1]
    for path in tmp_path.glob('checkpoint-*'):
        path.unlink()
    with pytest.raises(CheckpointError, match='last.pth.tar: this is no checkpoint of train.py, it lacks args'):
        training_connectivity(tmp_path)


@pytest.mark.parametrize('unit', ['connection', 'channel'])
def test_training_of_a_pruned_network(tmp_path, unit):
    model = timm.create_model('delugenet146', num_classes=5, in_chans=1, depths=(3, 2), widths=(2, 4))
    save_pruned(prune_connections(model, 0.4, 'random', unit=unit), tmp_path / 'pruned')
    name = f'local-dir:{tmp_path / "pruned"}'
    train_one_step(tmp_path, 'sgd', saved=name)
    (epoch, _), expected = training_connectivity(tmp_path), block_connectivity(read_state_dict(name))
    for blocks in epoch.weights, epoch.gradients:
        left = [[bool(norm) for block in of for norms in block.norms for norm in norms] for of in (blocks, expected)]
        assert left[0] == left[1]
        assert all(left[0]) == (unit == 'channel')


def test_training_without_momentum(tmp_path):
    train_one_step(tmp_path, 'momentum', momentum=0.)
    assert training_connectivity(tmp_path)[0].gradients is None
    assert invoke('connectivity', tmp_path).exit_code == 0


def test_training_with_groups_of_its_own_has_weights_alone(tmp_path):
    train_one_step(tmp_path, 'sgd')
    for path in tmp_path.glob('*.pth.tar'):
        with torch.serialization.safe_globals([Namespace]):
            checkpoint = torch.load(path)
        groups = checkpoint['optimizer']['param_groups']
        groups.append({**groups[0], 'params': [groups[0]['params'].pop(3)]})
        torch.save(checkpoint, path)
    assert [epoch.gradients for epoch in training_connectivity(tmp_path)] == [None, None]


def test_weights_that_are_zero_or_not_finite(tmp_path):
    weights = {f'stages.0.cross_layers.{i}.weight': torch.zeros(2, 1, 2 + i, 1) for i in range(2)}
    blocks = block_connectivity(weights)
    assert blocks[0].last == [0., 0., 0.]
    draw_connectivity(blocks, 'nothing').savefig(tmp_path / 'a.png')
    weights['stages.0.cross_layers.1.weight'][0] = float('nan')
    with pytest.raises(ValueError, match='not finite'):
        block_connectivity(weights)


def test_folders_that_no_training_left(tmp_path):
    result = invoke('connectivity', tmp_path)
    assert result.exit_code == 2 and f'local-dir:{tmp_path}' in result.stderr
    path = tmp_path / 'checkpoint-0.pth.tar'
    for content, message in (({'state_dict': {}}, 'lacks args, epoch, optimizer'), ([], 'no checkpoint of train.py')):
        torch.save(content, path)
        result = invoke('connectivity', tmp_path)
        assert result.exit_code == 2 and str(path) in result.stderr and message in result.stderr
    for text in 'nothing', 'aa: null':
        path.write_text(text)
        result = invoke('connectivity', tmp_path)
        assert result.exit_code == 2 and str(path) in result.stderr and 'damaged' in result.stderr
    torch.save(dict(args=Namespace(), epoch=0, optimizer={}, state_dict={}), path)
    result = invoke('connectivity', tmp_path)
    assert result.exit_code == 2 and 'its args are not the options of train.py' in ' '.join(result.stderr.split())
    result = invoke('connectivity', tmp_path, '--output', tmp_path / 'picture.png')
    assert result.exit_code == 2 and 'one checkpoint' in result.stderr and result.stderr.count('error:') == 1


def test_a_model_goes_before_a_folder_of_its_name(scratch_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('timm_deluge.cli.read_state_dict', lambda source: timm.create_model(source).state_dict())
    for name in ('delugenet146', 'delugenet146.muon40_cifar100'):
        (tmp_path / name).mkdir()
        result = invoke('connectivity', name)
        assert result.exit_code == 0 and 'block 3' in result.stdout
    (tmp_path / 'delugenet146.seed2').mkdir()
    result = invoke('connectivity', 'delugenet146.seed2')
    assert result.exit_code == 2 and 'delugenet146.seed2: there is no last.pth.tar' in result.stderr
