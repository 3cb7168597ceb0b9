"""The network computes what the authors' released code does, as released.py has it from its description."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from released import ReleasedDelugeNet
from torch import nn

from timm_deluge.delugenet import DelugeBlock, DelugeNet
from timm_deluge.ops.reference import cross_layer_depthwise_conv


def composite_pairs(ours, released):
    keys = ['norm1', None, 'conv1', 'norm2', None, 'conv2', 'norm3', None, 'conv3']
    return [(getattr(ours, k), released.body[i]) for i, k in enumerate(keys) if k]


def module_pairs(ours: DelugeNet, released: ReleasedDelugeNet):
    """Yield (module of ours, the same module of the released form) where both have the same parameters."""
    yield ours.stem.conv, released.stem
    yield from composite_pairs(ours.stages[0].transition, released.first)
    for i, stage in enumerate(ours.stages):
        if i > 0:
            yield stage.transition.norm, released.transitions[i - 1][0]
            yield stage.transition.conv, released.transitions[i - 1][1]
        for a, b in zip(stage.layers, released.blocks[i], strict=True):
            yield from composite_pairs(a, b)
    yield ours.norm, released.norm
    yield ours.head.fc, released.fc


def cross_layer_pairs(ours: DelugeNet, released: ReleasedDelugeNet):
    """Yield (cross-layer convolution, norms of its sources, the released form of both)."""
    for stage, theirs in zip(ours.stages, released.cross_layers, strict=True):
        norms = [stage.norm, *stage.norms]
        for cross_layer, other in zip(stage.cross_layers, theirs, strict=True):
            yield cross_layer, norms[:cross_layer.num_layers], other


def copy_weights(ours: DelugeNet, released: ReleasedDelugeNet) -> None:
    for a, b in module_pairs(ours, released):
        b.load_state_dict(a.state_dict())
    with torch.no_grad():
        for cross_layer, _, other in cross_layer_pairs(ours, released):
            for p, q in ((cross_layer.weight, other.weight), (cross_layer.bias, other.bias)):
                q.copy_(p.movedim(2, 0))


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def assert_same_state(ours: DelugeNet, released: ReleasedDelugeNet, gradients: bool) -> None:
    for a, b in module_pairs(ours, released):
        for (_, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert_close(p.grad if gradients else p, q.grad if gradients else q)
        for (_, p), (_, q) in zip(a.named_buffers(), b.named_buffers(), strict=True):
            assert_close(p, q)
    for cross_layer, norms, other in cross_layer_pairs(ours, released):
        for p, q in ((cross_layer.weight, other.weight), (cross_layer.bias, other.bias)):
            assert_close((p.grad if gradients else p).movedim(2, 0), q.grad if gradients else q)
        for i, theirs in enumerate(other.norms):
            assert_close(norms[i].running_mean, theirs.running_mean)
            assert_close(norms[i].running_var, theirs.running_var)


def test_same_training_and_inference_as_the_released_form():
    torch.manual_seed(0)
    depths, widths = (4, 3, 5), (4, 6, 8)
    ours = DelugeNet(depths, widths, num_classes=7, stem_type='cifar').double()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if 'conv' not in name:  # away from the symmetric start
                parameter.add_(0.1 * torch.randn_like(parameter))
    released = ReleasedDelugeNet(depths, widths, num_classes=7).double()
    copy_weights(ours, released)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True) for m in (ours, released)]
    for _ in range(4):
        x, target = torch.randn(6, 3, 16, 16).double(), torch.randint(7, (6,))
        outputs = []
        for model, optimizer in zip((ours, released), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            F.cross_entropy(outputs[-1], target).backward()
        assert_close(*outputs)
        assert_same_state(ours, released, gradients=True)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_state(ours, released, gradients=False)
    x = torch.randn(3, 3, 20, 12).double()
    assert_close(ours.eval()(x), released.eval()(x))


def test_imagenet_form_against_a_functional_description():
    torch.manual_seed(0)
    model = DelugeNet((2, 2), (4, 6), num_classes=5, stem_type='imagenet').double().train()
    params = dict(model.named_parameters())

    def norm(x, name=None):
        affine = (params[f'{name}.weight'], params[f'{name}.bias']) if name else (None, None)
        return F.batch_norm(x, None, None, *affine, training=True)

    def composite(x, name):
        x = F.conv2d(F.relu(norm(x, f'{name}.norm1')), params[f'{name}.conv1.weight'])
        x = F.conv2d(F.relu(norm(x, f'{name}.norm2')), params[f'{name}.conv2.weight'], padding=1)
        return F.conv2d(F.relu(norm(x, f'{name}.norm3')), params[f'{name}.conv3.weight'])

    def block(x, name):
        outputs = [x]
        for i in range(2):
            outputs.append(composite(x, f'{name}.layers.{i}'))
            w, b = (params[f'{name}.cross_layers.{i}.{k}'][:, 0, :, 0] for k in ('weight', 'bias'))
            x = sum(norm(h) * w[:, j, None, None] + b[:, j, None, None] for j, h in enumerate(outputs))
        return x

    x = torch.randn(4, 3, 32, 32).double()
    y = F.relu(norm(F.conv2d(x, params['stem.conv.weight'], stride=2, padding=3), 'stem.norm'))
    y = block(F.conv2d(F.max_pool2d(y, 3, 2, 1), params['stages.0.transition.weight']), 'stages.0')
    y = norm(y, 'stages.1.transition.norm')
    y = block(F.conv2d(y, params['stages.1.transition.conv.weight'], stride=2, padding=1), 'stages.1')
    y = F.relu(norm(y, 'norm')).mean((2, 3))
    assert_close(model(x), F.linear(y, params['head.fc.weight'], params['head.fc.bias']))


@pytest.mark.parametrize('transition_type', ['3x3', '1x1'])
def test_residual_baselines_against_a_running_sum(transition_type):
    torch.manual_seed(0)
    model = DelugeNet((3, 2), (4, 6), num_classes=5, stem_type='cifar', aggregation='residual',
                      transition_type=transition_type).double().eval()
    x = torch.randn(2, 3, 8, 8).double()
    y = model.stem(x)
    for stage in model.stages:
        if transition_type == '1x1':
            preact = F.relu(F.batch_norm(
                y, stage.transition.norm1.running_mean, stage.transition.norm1.running_var,
                stage.transition.norm1.weight, stage.transition.norm1.bias))
            shortcut = F.conv2d(preact, stage.transition.shortcut.weight, stride=stage.transition.shortcut.stride)
            y = shortcut + stage.transition.bottleneck(preact)
        else:
            y = stage.transition(y)
        y = y + sum_of_layers(stage.layers, y)
    assert_close(model.forward_features(x), model.norm(y))
    assert not [name for name, _ in model.named_buffers() if 'norms' in name or 'cross' in name]


def sum_of_layers(layers, x):
    total = torch.zeros_like(x)
    for layer in layers:
        total = total + layer(x + total)
    return total


@pytest.mark.parametrize('name', ['delugenet92', 'delugenet146'])
def test_topology_every_layer_sees_all_earlier_ones_of_its_block(name):
    model = timm.create_model(name)
    depths = {'delugenet92': (7, 7, 8, 8), 'delugenet146': (7, 16, 24)}[name]
    assert [len(stage.layers) for stage in model.stages] == list(depths)
    for stage in model.stages:
        assert [c.num_layers for c in stage.cross_layers] == list(range(2, len(stage.layers) + 2))


def test_topology_by_what_each_cross_layer_convolution_takes():
    """The l-th one takes the normalised h_0 … h_l themselves, in this order."""
    block = DelugeBlock(nn.Identity(), depth=4, width=3, drop_path_rates=(0.,) * 4).eval()
    normalised, taken = [], []
    for norm in (block.norm, *block.norms):
        norm.register_forward_hook(lambda module, args, out: normalised.append(out))
    for cross_layer in block.cross_layers:
        cross_layer.register_forward_hook(lambda module, args, out: taken.append(list(args[0])))
    block(torch.randn(1, 6, 4, 4))
    assert [len(layers) for layers in taken] == [2, 3, 4, 5]
    for layers in taken:
        assert all(a is b for a, b in zip(layers, normalised))


def test_first_composite_layer_takes_the_raw_input():
    torch.manual_seed(0)
    block = DelugeBlock(nn.Identity(), depth=1, width=3, drop_path_rates=(0.,)).double().train()
    x = 3 + 2 * torch.randn(5, 6, 4, 4).double()
    seen = []
    block.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    block(x)
    assert_close(seen[0], x)


def test_dropped_path_leaves_the_layer_statistics_alone():
    torch.manual_seed(0)
    block = DelugeBlock(nn.Identity(), depth=3, width=3, drop_path_rates=(0.9,) * 3).double().train()
    plain = copy.deepcopy(block)
    plain.drop_paths = nn.ModuleList([nn.Identity() for _ in range(3)])
    x = torch.randn(8, 6, 4, 4).double()
    block(x), plain(x)
    assert_close(block.norms[0].running_mean, plain.norms[0].running_mean)
    assert not torch.allclose(block(x), plain(x))


def test_every_source_layer_has_a_bias():
    torch.manual_seed(0)
    layers, weight, bias = torch.randn(3, 2, 4, 5, 5), torch.randn(4, 1, 3, 1), torch.randn(4, 1, 3, 1)
    expected = torch.zeros(2, 4, 5, 5)
    for i, layer in enumerate(layers):  # paper, Eq. 1
        expected += weight[:, 0, i, :, None] * layer + bias[:, 0, i, :, None]
    torch.testing.assert_close(cross_layer_depthwise_conv(list(layers), weight, bias), expected)
