"""A reparameterised model is the same function without batch normalisation, and as useful as before."""
import copy
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models._features import FeatureGetterNet
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_deluge import explain_implementation
from timm_deluge.aggregation import AGGREGATIONS
from timm_deluge.delugenet import CompositeLayer, DelugeBlock, DelugeNet, ProjectionLayer
from timm_deluge.ops import memory, set_implementation, workspace
from timm_deluge.reparameterize import FoldedDelugeBlock, InferenceConv2d

KINDS = [
    dict(stem_type='cifar'),
    dict(stem_type='imagenet'),
    dict(stem_type='cifar', aggregation='scalar'),
    dict(stem_type='cifar', aggregation='last'),
    dict(stem_type='cifar', aggregation='residual'),
    dict(stem_type='cifar', aggregation='residual', transition_type='1x1'),
    dict(stem_type='imagenet', output_stride=8, drop_path_rate=0.2),
]


def trained(stem_type='cifar', **kwargs) -> DelugeNet:
    """A small model whose parameters and running statistics are all away from their start."""
    torch.manual_seed(0)
    depths = (3, 3) if stem_type == 'cifar' else (2, 2, 2)
    return away_from_start(DelugeNet(depths, (4, 8, 8)[:len(depths)], num_classes=5, stem_type=stem_type, **kwargs))


def away_from_start(model: DelugeNet) -> DelugeNet:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.3, 3)
        for name, parameter in model.named_parameters():
            if parameter.dim() != 4 or 'cross' in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def assert_same_function(fused, model, x, tolerance=1e-4):
    with torch.no_grad():
        expected, actual = model(x), fused(x)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def has_batch_norm(model) -> bool:
    return any('BatchNorm' in type(m).__name__ or 'NormAct' in type(m).__name__ for m in model.modules())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_same_function_without_batch_norm(kind, memory_format):
    model = trained(**kind).to(memory_format=memory_format)
    fused = reparameterize_model(model)
    assert has_batch_norm(model) and not has_batch_norm(fused)
    assert_same_function(fused, model, torch.randn(3, 3, 32, 48).contiguous(memory_format=memory_format))


@pytest.mark.parametrize('name', ['delugenet122', 'delugenet146', 'resnetlike146_1x1'])
def test_registered_models(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    assert_same_function(reparameterize_model(model), model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('kind', KINDS)
def test_bfloat16_is_as_exact_as_the_reference(kind):
    model = trained(**kind)
    x = torch.randn(3, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    fused = reparameterize_model(model).to(torch.bfloat16, memory_format=torch.channels_last)

    def error(implementation):
        set_implementation(implementation)
        with torch.no_grad():
            return (fused(x.bfloat16()) - model(x)).norm()

    assert error('auto') <= 1.1 * error('reference')
    set_implementation('auto')
    with torch.no_grad():
        decisions = explain_implementation(fused, x.bfloat16())
    blocks = [name for name, module in fused.named_modules() if isinstance(module, FoldedDelugeBlock)]
    assert [decisions[name].reason for name in blocks] == [None] * len(blocks)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('implementation', ['reference', 'auto'])
def test_batch_norms_in_float32_are_folded_in_float32(kind, implementation):
    model = trained(**kind)
    x = torch.randn(3, 3, 32, 48).contiguous(memory_format=torch.channels_last)
    for module in model.modules():
        if not isinstance(module, torch.nn.BatchNorm2d):
            module._apply(torch.Tensor.bfloat16, recurse=False)
    whole = copy.deepcopy(model).float()
    exact, late = whole(x), reparameterize_model(whole).bfloat16()
    set_implementation(implementation)
    with torch.no_grad():
        early = reparameterize_model(model)(x.bfloat16())
        assert early.dtype == torch.bfloat16
        assert (early - exact).norm() <= 1.5 * (late(x.bfloat16()) - exact).norm()


def test_every_group_of_images_counts(monkeypatch):
    model = trained().to(memory_format=torch.channels_last)
    fused, x = reparameterize_model(model), torch.randn(5, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    sizes = []
    combine = FoldedDelugeBlock.combine_layers
    monkeypatch.setattr(
        FoldedDelugeBlock, 'combine_layers', lambda self, h, *outs: sizes.append(len(h)) or combine(self, h, *outs))
    assert_same_function(fused, model, x)
    assert sizes == [5, 5]
    monkeypatch.setattr('timm_deluge.ops.memory.WORKSPACE_BYTES', 1)
    assert_same_function(fused, model, x)
    assert sizes[2:] == [1] * 10


def test_workspace_holds_nothing_that_anyone_has():
    model = reparameterize_model(trained()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    seen = []
    with torch.no_grad():
        features = model.forward_intermediates(x, intermediates_only=True)
        before = [feature.clone() for feature in features]
        model(-x)
        torch.testing.assert_close(features, before, rtol=0, atol=0)
        for layer in model.stages[0].layers:
            layer.register_forward_hook(lambda layer, args, output: seen.append((output, output.clone())))
        model(x)
    assert len(seen) == 2
    for output, then in seen:
        torch.testing.assert_close(output, then, rtol=0, atol=0)


def test_workspace_serves_every_dtype():
    like = torch.empty(2, 8, 4, 4)
    with workspace(3, like) as tensors:
        address = tensors[0].data_ptr()
    for other in (like.bfloat16(), like[:1], like.bool(), like):
        with workspace(3, other) as tensors:
            assert tensors[0].data_ptr() == address
            assert {(t.dtype, t.shape) for t in tensors} == {(other.dtype, other.shape)} and len(tensors) == 3


@pytest.mark.skipif(not Path('/sys/kernel/mm/transparent_hugepage').exists(), reason='needs Linux with huge pages')
def test_a_workspace_asks_for_huge_pages():
    with workspace(3, torch.empty(2, 8, 4, 4)) as tensors:
        mappings = Path('/proc/self/smaps').read_text().split('VmFlags:')
    address = tensors[0].data_ptr()
    for mapping, flags in zip(mappings, mappings[1:]):
        found = re.search(r'^([0-9a-f]+)-([0-9a-f]+) ', mapping, re.MULTILINE)
        if found and int(found[1], 16) <= address < int(found[2], 16):
            assert 'hg' in flags.partition('\n')[0].split()
            return
    pytest.fail('the workspace is in no mapping')


def test_tensors_of_a_workspace_begin_at_different_places_of_a_cache():
    with workspace(8, torch.empty(4, 8, 16, 16)) as tensors:
        assert len({tensor.data_ptr() % 4096 for tensor in tensors}) == 8
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_a_workspace_may_be_empty():
    with workspace(0, torch.empty(2, 8, 4, 4)) as tensors:
        assert tensors == []


def test_a_workspace_that_is_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr(memory, 'WORKSPACE_BYTES', 1)
    with workspace(3, torch.empty(2, 8, 4, 4)):
        pass
    assert not hasattr(memory._thread, 'memory')


def test_groups_of_a_batch_fit_into_the_workspace(monkeypatch):
    monkeypatch.setattr(memory, 'WORKSPACE_BYTES', 350)
    for num_images, expected in ((0, [0]), (1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [2, 2, 2, 1])):
        groups = memory.split_batch(torch.empty(num_images, 1, 5, 5, dtype=torch.uint8), 4)
        assert [len(group) for group in groups] == expected
    groups = memory.split_batch(torch.empty(3, 1, 5, 5), 4)
    assert [len(group) for group in groups] == [1, 1, 1]


def test_threads_do_not_share_a_workspace():
    model = reparameterize_model(trained()).to(memory_format=torch.channels_last)
    xs = [torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last) for _ in range(8)]
    with torch.inference_mode():
        expected = [model(x) for x in xs]
    infer = torch.inference_mode()(model.forward)
    with ThreadPoolExecutor(4) as pool:
        for actual, x in zip(pool.map(infer, xs * 4), expected * 4):
            torch.testing.assert_close(actual, x)


def test_hooks_of_sums_are_called():
    model = timm.create_model('delugenet146', depths=(3, 3), widths=(4, 8)).eval()
    fused, seen = reparameterize_model(model), []
    for conv in (fused.stages[1].cross_layers[0], fused.stages[0].last_cross_layer):
        conv.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        fused(torch.randn(2, 3, 16, 16))
    assert seen == [fused.stages[0].last_cross_layer, fused.stages[1].cross_layers[0]]


def test_hooks_of_stem_and_norm_are_called():
    model, seen = trained('imagenet'), []
    for name in ('stem.norm', 'norm'):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model.norm.register_forward_hook(lambda *of_call: seen.append(len(of_call)), with_kwargs=True)
    model.norm.register_forward_hook(lambda *_: seen.append('always'), always_call=True)
    model.norm.register_forward_pre_hook(lambda *of_call: seen.append(len(of_call)))
    model.norm.register_forward_pre_hook(lambda *of_call: seen.append(len(of_call)), with_kwargs=True)
    fused = reparameterize_model(model)
    fused(torch.randn(1, 3, 32, 32))
    assert seen == ['stem.norm', 2, 3, 'norm', 4, 'always']
    seen.clear()
    with pytest.raises(TypeError):
        fused.norm(None)
    assert seen == [2, 3, 'always']


@pytest.mark.parametrize('size', (2, 8), ids=lambda size: f'{size ** 2} positions')
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_a_1x1_convolution_writes_into_given_memory(size, dtype):
    conv = InferenceConv2d(torch.nn.Conv2d(8, 16, 1, bias=False)).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(1, 8, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    out = torch.empty(1, 16, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = conv(x, out)
        assert (y is out) == conv.keeps_order(x)  # not in bfloat16 on a processor that emulates it
        assert y is out or dtype is torch.bfloat16
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, conv.weight))


def test_a_convolution_with_relu_has_it_wherever_it_writes():
    conv = InferenceConv2d(nn.Conv2d(4, 6, 1, bias=False), BatchNormAct2d(6).eval())
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    out = torch.empty(2, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(conv(x, out), torch.nn.functional.conv2d(x, conv.weight, conv.bias).relu())


def test_reordered_weights_follow_the_parameters(tmp_path):
    model = reparameterize_model(trained()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    convs = [m for m in model.modules() if isinstance(m, InferenceConv2d)]
    with torch.no_grad():
        first = model(x)
        assert any(conv._reordered is not None for conv in convs) == torch.backends.mkldnn.is_available()
        assert all(m._reordered is None for m in copy.deepcopy(model).modules() if isinstance(m, InferenceConv2d))
        torch.jit.script(model).save(tmp_path / 'model.pt')
        torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x), first, rtol=1e-4, atol=1e-5)
        for conv in convs:
            conv.weight.mul_(2)
        changed = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), changed)
        torch.testing.assert_close(model(x[:1]), changed[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x).detach(), changed, rtol=1e-4, atol=1e-4)  # with gradients, the ordinary way
    assert not torch.allclose(first, changed)
    model.double()
    assert all(conv._reordered is None for conv in convs)


def test_a_copy_of_a_compiled_convolution_has_its_own_weights(tmp_path):
    conv = InferenceConv2d(nn.Conv2d(3, 4, 1))
    conv.compile(backend='eager')
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(torch.randn(1, 3, 2, 2)).any()
    torch.save(conv, tmp_path / 'conv.pth')


@torch.no_grad()
def test_parts_of_a_reparameterised_block_can_be_replaced():
    x = torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for place in 'stages.1.layers.0', 'stages.1.layers.0.conv3', 'stages.1.cross_layers.0':
        model = reparameterize_model(trained()).to(memory_format=torch.channels_last)
        expected, part = model(x), model.get_submodule(place)
        parent, _, name = place.rpartition('.')
        setattr(model.get_submodule(parent), name, nn.Sequential(part))
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('training', [False, True])
def test_every_part_is_in_the_mode_of_the_model(kind, training):
    model = reparameterize_model(trained(**kind).train(training))
    assert {module.training for module in model.modules()} == {training}


@torch.no_grad()
def test_under_autocast():
    model, x = trained(), torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    fused = reparameterize_model(model).to(memory_format=torch.channels_last)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert fused.stages(fused.stem(x)).dtype == torch.bfloat16
        torch.testing.assert_close(fused(x).float(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_what_counts_operators_sees_them():
    model, x = reparameterize_model(trained()), torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    flops = []
    for implementation in ('reference', 'auto'):
        set_implementation(implementation)
        with FlopCounterMode(display=False) as counter:
            model(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


@torch.inference_mode()
def test_reordered_weights_follow_what_is_loaded_in_inference_mode():
    networks = trained(), away_from_start(trained())
    model, other = (reparameterize_model(network).to(memory_format=torch.channels_last) for network in networks)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    model(x)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


def test_gradients_flow_through_it():
    model, x = trained().double(), torch.randn(2, 3, 16, 16).double().requires_grad_()
    gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, reparameterize_model(model))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('kind', KINDS)
def test_training_mode_and_twice(kind):
    model = trained(**kind)
    fused = reparameterize_model(copy.deepcopy(model).train())
    assert fused.training and not has_batch_norm(fused)
    x = torch.randn(2, 3, 32, 32)
    assert_same_function(fused, model, x)
    assert_same_function(reparameterize_model(fused), model, x)
    assert_same_function(reparameterize_model(fused, inplace=True), model, x)


@pytest.mark.parametrize('change', [
    lambda layer: setattr(layer.norm2, 'act', nn.SiLU()), lambda layer: setattr(layer.norm1, 'act', nn.SiLU()),
    lambda layer: setattr(layer.conv2, 'padding_mode', 'circular'),
    lambda layer: setattr(layer.conv2, 'padding', 'same'),
    lambda layer: setattr(layer, 'conv2', nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    lambda layer: setattr(layer, 'conv2', timm.layers.StdConv2d(4, 4, 3, padding=1)),
    lambda layer: setattr(layer, 'conv2', nn.Sequential(layer.conv2, nn.Dropout())),
    lambda layer: setattr(layer.conv2, 'forward', lambda x: 2 * x),
    lambda layer: setattr(layer.norm1, 'drop', nn.AvgPool2d(3, 1, 1)),
    lambda layer: setattr(layer.norm2, 'drop', nn.AvgPool2d(3, 1, 1)),
    lambda layer: setattr(layer, 'norm1', nn.Sequential(OrderedDict(norm=nn.Identity(), act=nn.ReLU()))),
    lambda layer: setattr(layer.norm3, 'running_var', None),
    lambda layer: setattr(layer.norm2, 'forward', lambda x: 2 * x),
    lambda layer: setattr(layer.conv1, '_conv_forward', lambda x, weight, bias: 2 * x),
])
@pytest.mark.parametrize('aggregation', ['cross_layer', 'residual'])
def test_what_cannot_be_folded_is_refused(change, aggregation):
    model = DelugeNet((2, 2), (4, 8), 5, stem_type='cifar', aggregation=aggregation).eval()
    layer = model.stages[0].layers[0]
    change(layer)
    with pytest.raises(ValueError, match='cannot be reparameterised'):
        reparameterize_model(model)
    parts = dict(layer.named_modules())
    with pytest.raises(ValueError, match='cannot be reparameterised'):
        layer.reparameterize()
    assert dict(layer.named_modules()) == parts


def test_a_transition_that_cannot_be_folded_stays_as_it_is():
    transition = DelugeNet((2, 2), (4, 8), 5, stem_type='cifar').eval().stages[1].transition
    transition.conv.padding_mode = 'circular'
    parts = dict(transition.named_modules())
    for _ in range(2):
        with pytest.raises(ValueError, match='cannot be reparameterised'):
            transition.reparameterize()
    assert dict(transition.named_modules()) == parts


@pytest.mark.parametrize('name, part', [
    ('layers', nn.Identity()), ('layers', ProjectionLayer(8, 4)), ('drop_paths', nn.ReLU()),
    ('layers', type('Halved', (CompositeLayer,), dict(bottleneck=lambda self, x: x / 2))(8, 4)),
    ('cross_layers', nn.Identity())])
def test_a_part_that_computes_something_else_is_refused(name, part):
    model = DelugeNet((3, 2), (4, 8), 5, stem_type='cifar').eval()
    getattr(model.stages[0], name)[0] = part
    with pytest.raises(ValueError, match=f'cannot be reparameterised: {name}.0 was replaced by {type(part).__name__}'):
        reparameterize_model(model)


def test_a_block_stays_as_it_is():
    block = DelugeNet((3, 2), (4, 8), 5, stem_type='cifar').train().stages[1]
    block.transition.eval()
    assert not any(module.training for module in block.fuse().transition.modules())
    assert not block.transition.norm.training and block.training


@pytest.mark.parametrize('aggregation', ['cross_layer', 'residual'])
def test_biases_of_convolutions_are_folded(aggregation):
    model = away_from_start(DelugeNet((2, 2), (4, 8), 5, stem_type='cifar', aggregation=aggregation)).eval()
    layer = model.stages[0].layers[0]
    layer.conv2, layer.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 1)
    x = torch.randn(2, 3, 16, 16)
    for memory_format in torch.contiguous_format, torch.channels_last:
        assert_same_function(reparameterize_model(model), model, x.to(memory_format=memory_format))


def test_a_last_convolution_of_3x3_is_folded():
    model = away_from_start(DelugeNet((2, 2), (4, 8), 5, stem_type='cifar')).eval()
    model.stages[0].layers[0].conv3 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    assert_same_function(reparameterize_model(model), model, x)


def test_a_last_convolution_that_pads_is_folded():
    model = away_from_start(DelugeNet((2, 2), (4, 8), 5, stem_type='cifar')).eval()
    layer = model.stages[0].layers[0]
    layer.conv2.padding, layer.conv3.padding = (0, 0), (1, 1)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    assert_same_function(reparameterize_model(model), model, x)


def test_dropout_behind_a_norm_is_left_out():
    model = away_from_start(DelugeNet((2, 2), (4, 8), 5, stem_type='cifar')).eval()
    model.stages[0].layers[0].norm2.drop = nn.Dropout(0.5).eval()
    assert_same_function(reparameterize_model(model), model, torch.randn(2, 3, 16, 16))


def test_an_activation_behind_a_transitions_norm_stays():
    model = away_from_start(DelugeNet((2, 2), (4, 8), 5, stem_type='cifar')).eval()
    model.stages[1].transition.norm = BatchNormAct2d(8).eval()
    assert_same_function(reparameterize_model(model), model, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize('place', ['norm', 'norms.1'])
def test_an_activation_behind_the_norm_of_a_layers_output_is_refused(place):
    model = DelugeNet((3, 2), (4, 8), 5, stem_type='cifar').eval()
    parent, _, name = f'stages.0.{place}'.rpartition('.')
    setattr(model.get_submodule(parent), name, BatchNormAct2d(8, affine=False))
    with pytest.raises(ValueError, match="cannot be reparameterised: the normalisation of a layer's output"):
        reparameterize_model(model)


def test_the_original_stays_as_it_is():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    reparameterize_model(model)
    assert all(isinstance(stage, DelugeBlock) for stage in model.stages)
    torch.testing.assert_close(dict(model.state_dict()), dict(before))


def test_weights_are_saved_and_loaded(tmp_path):
    model = trained()
    safetensors.torch.save_model(reparameterize_model(model), tmp_path / 'fused.safetensors')
    other = reparameterize_model(DelugeNet((3, 3), (4, 8), num_classes=5, stem_type='cifar'))
    assert safetensors.torch.load_model(other, tmp_path / 'fused.safetensors') == (set(), [])
    assert_same_function(other, model, torch.randn(2, 3, 16, 16))


def test_frozen_and_synchronised_batch_norms_are_folded():
    model = trained()
    for converted in (
        timm.layers.convert_sync_batchnorm(copy.deepcopy(model)),
        timm.utils.model.freeze_batch_norm_2d(copy.deepcopy(model)),
    ):
        fused = reparameterize_model(converted)
        assert all(isinstance(stage, FoldedDelugeBlock) for stage in fused.stages)
        assert not has_batch_norm(fused.stages)
        assert_same_function(fused, model, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize('aggregation', [*AGGREGATIONS, 'residual'])
def test_torchscript_export_and_compile(tmp_path, aggregation):
    model = trained(aggregation=aggregation)
    fused, x = reparameterize_model(model), torch.randn(2, 3, 16, 16)
    torch.jit.script(fused).save(tmp_path / 'model.pt')
    scripted = torch.jit.load(tmp_path / 'model.pt')
    traced = torch.jit.trace(fused, x)
    exported = torch.export.export(fused, (x,)).module()
    compiled = torch.compile(fused, fullgraph=True, backend='aot_eager')
    for other in (scripted, traced, exported, compiled):
        assert_same_function(other, model, x)


def run_onnx(model, x, path) -> torch.Tensor:
    """Export a model, and get what the file computes."""
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    pytest.importorskip('torch', '2.5', reason='its exporter to ONNX was a preview')
    from onnx.reference import ReferenceEvaluator

    torch.onnx.export(model, (x,), str(path), input_names=['x'], dynamo=True)
    y, = ReferenceEvaluator(onnx.load(path)).run(None, {'x': x.numpy()})
    return torch.from_numpy(y)


@pytest.mark.parametrize('reparameterized', [False, True])
def test_onnx(tmp_path, reparameterized):
    model, x = trained(), torch.randn(2, 3, 16, 16)
    y = run_onnx(reparameterize_model(model) if reparameterized else model, x, tmp_path / 'model.onnx')
    assert_same_function(lambda _: y, model, x)


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'fx', 'getter', 'hook'])
def test_features(feature_cls):
    torch.manual_seed(0)
    model = timm.create_model('delugenet92', features_only=True, feature_cls=feature_cls, out_indices=(1, 2)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused = reparameterize_model(model).eval()  # a copied FX graph starts in training
        expected, actual = model(x), fused(x)
    if isinstance(expected, dict):
        expected, actual = list(expected.values()), list(actual.values())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert feature_cls == 'fx' or not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_intermediates():
    model, x = trained('imagenet'), torch.randn(1, 3, 64, 64)
    getter = FeatureGetterNet(model, out_indices=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(getter)(x), getter(x), rtol=1e-4, atol=1e-4)
