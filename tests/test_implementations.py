"""Every implementation gives the reference's numbers, and whatever one does with a model works on every path."""
import copy
import gc
import importlib
import inspect
import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import timm
import torch
from forked import Forked
from released import ReleasedDelugeNet
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import timm_deluge
from timm_deluge import explain_implementation
from timm_deluge.delugenet import CompositeLayer, DelugeBlock, DelugeNet, ResidualBlock
from timm_deluge.ops import (
    Backend,
    FusedCrossLayers,
    aten,
    cross_layer_depthwise_conv,
    norm_act_conv,
    running_sums,
    set_implementation,
)
from timm_deluge.ops.layout import same_layout

LAYOUTS = {
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'contiguous': lambda x: x.contiguous(),
    'sliced': lambda x: torch.cat([x, x], 3)[..., :x.shape[3]],
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
FAST = [
    'aten',
    pytest.param('cpp', marks=pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')),
    pytest.param('triton', marks=pytest.mark.skipif(find_spec('triton') is None, reason='needs triton')),
]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}


def assert_near(actual, expected, tolerance, name=''):
    """Hold a tensor against another one, relative to its largest element or 1."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)
    assert error <= tolerance, f'{name}: relative error {error:.2e} > {tolerance}'


def block(depth=4, width=3, block_type=DelugeBlock, **kwargs) -> ResidualBlock:
    torch.manual_seed(0)
    block = block_type(nn.Identity(), depth, width, kwargs.pop('drop_path_rates', (0.,) * depth), **kwargs)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if 'cross' in name else 0.1))
        for name, buffer in block.named_buffers():
            if name.endswith('running_mean'):
                buffer.normal_(0, 0.2)
            elif name.endswith('running_var'):
                buffer.uniform_(0.5, 1.5)
    return block


def differentiate(module, x, implementation, context=None):
    """Run forward and backward; output, gradients and running statistics by name."""
    set_implementation(implementation)
    module = copy.deepcopy(module)
    x = copy.deepcopy(x.detach()).requires_grad_()  # with its strides
    torch.manual_seed(1)  # for stochastic depth
    with context or torch.enable_grad():
        y = module(x)
    y_wide = y.to(torch.promote_types(y.dtype, torch.float32))
    (y_wide * torch.linspace(-1, 1, y.numel(), dtype=torch.float32).view(y.shape)).sum().backward()
    found = {'y': y.detach(), 'x': x.grad}
    found.update((f'{name}.grad', p.grad) for name, p in module.named_parameters())
    found.update((name, b) for name, b in module.named_buffers())
    return found


def assert_same(module, x, implementation, tolerance, fused=True):
    """Hold an implementation's results against the reference's, and make sure that it is the fused path, or is not."""
    expected = differentiate(module, x, 'reference')
    actual = differentiate(module, x, implementation)
    assert is_fused(module, x) == fused
    for name in expected:
        if expected[name] is None:
            assert actual[name] is None, name
        else:
            assert_near(actual[name], expected[name], tolerance, name)


def is_fused(module, x) -> bool:
    reasons = {decision.reason for decision in explain_implementation(module, x).values()}
    assert reasons
    return reasons == {None}


def fused_calls(monkeypatch) -> list:
    calls = []
    forward = DelugeBlock.forward_fused
    monkeypatch.setattr(DelugeBlock, 'forward_fused', lambda self, x: calls.append(self) or forward(self, x))
    return calls


@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('num_layers, shape', [
    (1, (2, 3, 5, 7)), (2, (1, 64, 1, 1)), (5, (3, 70, 4, 6)), (64, (2, 6, 3, 3)), (2, (2, 70, 9, 8))])
def test_operator_gives_values_and_gradients_of_the_reference(implementation, layout, dtype, num_layers, shape):
    set_implementation(implementation)
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(shape[1], affine=False).double() for _ in range(num_layers)]
    layers = [LAYOUTS[layout](0.5 + torch.randn(shape, dtype=dtype)).requires_grad_() for _ in range(num_layers)]
    weight = torch.randn(shape[1], 1, num_layers, 1).requires_grad_()
    bias = torch.randn(shape[1], 1, num_layers, 1).requires_grad_()
    grad = torch.randn(shape).to(dtype)

    exact = [t.detach().double().requires_grad_() for t in (*layers, weight, bias)]
    normalised = [norm.eval()(layer) for norm, layer in zip(norms, exact)]
    expected = cross_layer_depthwise_conv(normalised, *exact[-2:])
    expected.backward(grad.double())

    outputs = FusedCrossLayers([weight], [bias])
    for layer, norm in zip(layers, norms):
        outputs.append(layer, norm.to(torch.float32))
    actual = outputs.cross_layer_depthwise_conv()
    assert actual.dtype == dtype
    actual.backward(grad)
    assert_near(actual, expected, TOLERANCE[dtype])
    for leaf, exact_leaf in zip((*layers, weight, bias), exact):
        assert_near(leaf.grad, exact_leaf.grad, TOLERANCE[dtype])


@pytest.mark.parametrize('training', [True, False])
def test_a_block_without_layers(training):
    module, x = block(depth=0).train(training), torch.randn(4, 6, 5, 7)
    assert_same(module, x, 'auto', 0, fused=False)
    reason = explain_implementation(module, x)[''].reason
    assert reason == 'there are no layers'


def test_an_explanation_draws_no_random_numbers():
    module, x = block(drop_path_rates=(0., .2, .3, .5)).train(), torch.randn(4, 6, 5, 7)
    before = torch.get_rng_state()
    explain_implementation(module, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_explanation_leaves_other_devices_alone(monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_rng_state', touched.append)
    explain_implementation(block(), torch.randn(4, 6, 5, 7))
    assert not touched


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('of_weights, of_images', [
    (torch.channels_last, 'channels_last'), (torch.channels_last, 'contiguous'),
    (torch.contiguous_format, 'channels_last'), (torch.contiguous_format, 'contiguous')])
@pytest.mark.parametrize('kwargs', [{'transition_type': '1x1'}, {'stem_type': 'cifar'}])
def test_network_of_any_memory_format_trains_as_the_reference(batch, of_weights, of_images, kwargs):
    torch.manual_seed(0)
    model = DelugeNet((6, 5), (6, 12), num_classes=3, **kwargs).to(torch.float64, memory_format=of_weights)
    assert_same(model, LAYOUTS[of_images](torch.randn(batch, 3, 24, 24, dtype=torch.float64)), 'auto', 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('training', [True, False])
def test_block_with_weights_in_channels_last_trains_as_the_reference(implementation, batch, layout, training):
    """Its layers' outputs are in another format than its input, if that is not in channels_last."""
    module = block(depth=7).train(training).to(memory_format=torch.channels_last)
    assert_same(module, LAYOUTS[layout](1 + torch.randn(batch, 6, 5, 7)), implementation, 2e-4)


@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('training', [True, False])
def test_block_trains_as_the_reference(implementation, layout, training):
    module = block().train(training)
    assert_same(module, LAYOUTS[layout](1 + torch.randn(4, 6, 5, 7)), implementation, 1e-4)


@pytest.mark.parametrize('depth', [1, 2, 9, 63])
def test_block_of_any_length(depth):
    assert_same(block(depth).double().train(), torch.randn(4, 6, 3, 3).double(), 'aten', 1e-9)


def assert_as_near(module, low_precision, shape, context=None, implementation='auto'):
    """Compare low-precision results with those of float64, over 16 inputs.

    The squared errors of all results may be 1.1 times the reference's, and an error of one result twice.
    """
    squares = {}
    for seed in range(16):
        torch.manual_seed(seed)
        x = torch.randn(shape)
        exact = differentiate(copy.deepcopy(module).double(), x.double(), 'reference')
        for path in ('reference', implementation):
            found = differentiate(low_precision, x.to(next(low_precision.parameters()).dtype), path, context)
            for name in (n for n in exact if exact[n].is_floating_point()):
                error = (found[name].double() - exact[name]).square().mean()
                error /= exact[name].square().mean().clamp(min=1e-4)
                squares[name, path] = squares.get((name, path), 0) + error
    names = {name for name, _ in squares}
    assert sum(squares[n, implementation] for n in names) <= 1.1 * sum(squares[n, 'reference'] for n in names)
    for name in names:
        assert squares[name, implementation] <= 4 * squares[name, 'reference'], name


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['auto', 'aten'])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_block_with_parameters_of_low_precision(dtype, training, implementation):
    module = block().train(training)
    assert_as_near(module, copy.deepcopy(module).to(dtype), (8, 6, 8, 8), implementation=implementation)


def test_autocast():
    torch.manual_seed(0)
    model = DelugeNet((9, 3), (8, 16), num_classes=5, stem_type='cifar').train()
    with torch.autocast('cpu', torch.bfloat16):
        assert model.stages(model.stem(torch.randn(8, 3, 16, 16))).dtype == torch.bfloat16
        assert is_fused(model, torch.randn(8, 3, 16, 16))
    assert_as_near(model, model, (8, 3, 16, 16), torch.autocast('cpu', torch.bfloat16))


def test_frozen_batch_norm():
    module = block().train()
    for norm in (module.norms[1], module.layers[2].norm2, module.layers[0].norm1):
        norm.eval().requires_grad_(False)
    assert_same(module, torch.randn(4, 6, 5, 7), 'auto', 1e-4)
    frozen = block().train()
    frozen = timm.utils.model.freeze_batch_norm_2d(frozen)
    assert_same(frozen, torch.randn(4, 6, 5, 7), 'auto', 1e-4, fused=False)


def test_frozen_parameters():
    module = block().train()
    for name, parameter in module.named_parameters():
        parameter.requires_grad = 'layers.2' in name
    assert_same(module, torch.randn(4, 6, 5, 7), 'auto', 1e-4)


def test_gradients_of_chosen_parameters_only():
    module, x = block().double().train(), torch.randn(4, 6, 5, 7).double()
    chosen = [module.layers[1].conv2.weight, module.cross_layers[2].weight]
    expected, actual = [], []
    for implementation, found in (('reference', expected), ('auto', actual)):
        set_implementation(implementation)
        found += torch.autograd.grad(module(x).square().sum(), chosen)
    torch.testing.assert_close(actual, expected)


def test_synchronised_batch_norm_takes_the_reference():
    module = timm.layers.convert_sync_batchnorm(block()).eval()
    assert_same(module, torch.randn(4, 6, 5, 7), 'auto', 1e-6, fused=False)


@pytest.mark.parametrize('options', [{}, dict(drop_path_rates=(0., 0.2, 0.3, 0.5)), dict(connection_drop_rate=0.3)])
def test_gradient_checkpointing(options, monkeypatch):
    module, x = block(**options).double().train(), torch.randn(4, 6, 5, 7).double()
    module.layers[1].conv2.requires_grad_(False)
    expected = differentiate(module, x, 'reference')
    module.grad_checkpointing = True
    calls = fused_calls(monkeypatch)
    actual = differentiate(module, x, 'auto')
    assert calls
    for name in (n for n in expected if n == 'y' or n == 'x' or n.endswith('grad')):
        if name == 'layers.1.conv2.weight.grad':
            assert actual[name] is None
        else:
            assert_near(actual[name], expected[name], 1e-9, name)


@pytest.mark.parametrize('kept_here', [False, True])
def test_gradient_checkpointing_with_parameters_kept_elsewhere(kept_here):
    """As in a replica of DataParallel, and under the first FSDP, where they are attributes as any other, or also."""
    module, x = block().double().train(), torch.randn(4, 6, 5, 7).double()
    expected = differentiate(module, x, 'reference')
    module.grad_checkpointing = True
    parameters = dict(module.named_parameters())
    for part in module.modules():
        for name in list(part._parameters):
            part.__dict__[name] = part._parameters[name] if kept_here else part._parameters.pop(name)
    set_implementation('auto')
    assert 'kept elsewhere' in module.why_not_fused(x)
    y = module(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()  # that of `differentiate`
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients):
        assert_near(gradient, expected[f'{name}.grad'], 1e-9, name)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_gradient_checkpointing_under_autocast_runs_again_as_it_ran(dtype):
    module, x = block().train(), torch.randn(4, 6, 5, 7)
    expected = differentiate(module, x, 'auto', torch.autocast('cpu', dtype))
    module.grad_checkpointing = True
    actual = differentiate(module, x, 'auto', torch.autocast('cpu', dtype))
    for name in (n for n in expected if n == 'y' or n == 'x' or n.endswith('grad')):
        assert_near(actual[name], expected[name], 1e-5, name)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        set_implementation('auto')
        module, x = block().train(), torch.randn(4, 6, 5, 7)
        parallel = DistributedDataParallel(copy.deepcopy(module))
        for _ in range(2):
            parallel.zero_grad()
            parallel(x).square().sum().backward()
        set_implementation('reference')
        expected = copy.deepcopy(module)
        expected(x).square().sum().backward()
        for p, q in zip(parallel.parameters(), expected.parameters(), strict=True):
            assert_near(p.grad, q.grad, 1e-4)
    finally:
        torch.distributed.destroy_process_group()


class Twice(nn.Module):
    """The same block twice in one graph."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x) + self.module(self.module(2 * x))


def test_double_use():
    assert_same(Twice(block().double().train()), torch.randn(4, 6, 5, 7).double(), 'auto', 1e-8)


def test_backward_twice_through_a_retained_graph():
    module, x = block().double().train(), torch.randn(4, 6, 5, 7).double().requires_grad_()
    y = module(x).square().sum()
    y.backward(retain_graph=True)
    once = [x.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    y.backward()
    torch.testing.assert_close([x.grad, *(p.grad for p in module.parameters())], [2 * g for g in once])


def test_an_interrupted_backward_pass_leaves_nothing_behind():
    module, x = block().double().train(), torch.randn(4, 6, 5, 7).double().requires_grad_()
    y = module(x).square().sum()
    later = module.layers[3].conv1.weight
    torch.autograd.grad(y, later, retain_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(y, module.layers[0].conv1.weight),
        torch.autograd.grad(module(x).square().sum(), module.layers[0].conv1.weight))


@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize('training', [True, False])
def test_without_gradients(implementation, mode, training, monkeypatch):
    module, x = block(depth=9).train(training), torch.randn(4, 6, 5, 7)
    found, calls = {}, fused_calls(monkeypatch)
    for name in ('reference', implementation):
        set_implementation(name)
        run = copy.deepcopy(module)
        with mode():
            found[name] = {'y': run(x), **dict(run.named_buffers())}
    assert len(calls) == 1
    for name, expected in found['reference'].items():
        assert_near(found[implementation][name], expected, 1e-4, name)


def live_outputs(monkeypatch) -> list:
    """References to the memory of all layers' outputs from now on."""
    references = []
    forward = CompositeLayer.forward_fused

    def noting(self, *args):
        y = forward(self, *args)
        references.append(StorageWeakRef(y.untyped_storage()))
        return y
    monkeypatch.setattr(CompositeLayer, 'forward_fused', noting)
    return references


@pytest.mark.parametrize(
    'case', ['whole', 'ends above', 'below frozen', 'interrupted', 'interrupted below', 'differentiated',
             'differentiated above', 'differentiated and interrupted', 'no gradients'])
def test_no_memory_outlives_its_use(case, monkeypatch):
    module, x = block(depth=6).train(), torch.randn(4, 6, 5, 7)
    references = live_outputs(monkeypatch)
    if case == 'below frozen':
        module.requires_grad_(False)
        module.layers[3].requires_grad_(True)
    if case == 'no gradients':
        with torch.no_grad():
            module(x)
    elif case == 'ends above':
        torch.autograd.grad(module(x).square().sum(), module.layers[5].conv3.weight)
    elif case == 'differentiated above':
        torch.autograd.grad(module(x).square().sum(), module.layers[5].conv3.weight, create_graph=True)
    elif case in ('interrupted', 'differentiated and interrupted'):
        handle = module.layers[2].conv2.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            torch.autograd.grad(
                module(x).square().sum(), list(module.parameters()), create_graph=case != 'interrupted')
        handle.remove()
        torch.ones(1, requires_grad=True).backward()  # until the next pass, PyTorch keeps what is left of this one
    elif case == 'interrupted below':
        below = x.requires_grad_() * 1
        below.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            torch.autograd.grad(module(below).square().sum(), x, create_graph=True)
        del below
        torch.ones(1, requires_grad=True).backward()
    elif case == 'differentiated':
        x.requires_grad_()
        [grad] = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        del grad
    else:
        module(x).square().sum().backward()
    gc.collect()
    assert len(references) == 6
    assert all(reference.expired() for reference in references)


def test_a_backward_pass_frees_each_layer_when_its_turn_is_over(monkeypatch):
    module, x = block(depth=6).train(), torch.randn(4, 6, 5, 7)
    references, freed = live_outputs(monkeypatch), []
    for layer in module.layers:
        layer.conv1.weight.register_hook(lambda _: freed.append([reference.expired() for reference in references]))
    module(x).square().sum().backward()
    assert freed == [[False] * i + [True] * (6 - i) for i in reversed(range(6))]


def test_a_loss_that_is_kept_after_second_derivatives_keeps_no_layers(monkeypatch):
    module, x = block(depth=6).train(), torch.randn(4, 6, 5, 7, requires_grad=True)
    references = live_outputs(monkeypatch)
    loss = module(x).square().sum()
    [grad] = torch.autograd.grad(loss, x, create_graph=True)
    (loss + grad.square().sum()).backward()
    del grad
    gc.collect()
    assert len(references) == 6 and all(reference.expired() for reference in references)


def test_layers_are_saved_a_few_times_each():
    """Whoever packs what is saved, as `save_on_cpu` does, packs it each time."""
    saved = []
    module, x = block(24).train(), torch.randn(4, 6, 5, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        module(x).sum().backward()
    assert saved.count(x.shape) < 3 * 25


@pytest.mark.parametrize('implementation', ['reference', 'auto'])
def test_weights_changed_since_the_forward_pass_count_as_they_were(implementation):
    set_implementation(implementation)
    gradients = []
    for change in (0, 1):
        module = block().double().train()
        x = torch.linspace(-1, 2, 840).sin().view(4, 6, 5, 7).double().requires_grad_()
        y = module(x).pow(3).sum()
        with torch.no_grad():
            for cross_layer in module.cross_layers:
                cross_layer.weight.add_(change)
        gradients += torch.autograd.grad(y, x, create_graph=True)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('implementation', ['reference', 'auto'])
def test_one_value_for_each_channel_within_a_layer_is_refused(implementation):
    set_implementation(implementation)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        CompositeLayer(8, 4, stride=2).train()(torch.randn(1, 8, 2, 2))


def test_after_an_error_memory_is_freed_without_the_garbage_collector(monkeypatch):
    module, x = block(depth=6).train(), torch.randn(4, 6, 5, 7)
    references = live_outputs(monkeypatch)
    module.layers[2].conv2.weight.register_hook(lambda _: 1 / 0)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            module(x).square().sum().backward()
        torch.ones(1, requires_grad=True).backward()  # until the next pass, PyTorch keeps what is left of this one
        assert len(references) == 6 and all(reference.expired() for reference in references)
    finally:
        gc.enable()


def test_a_loss_that_is_kept_keeps_no_layers(monkeypatch):
    module, x = block(depth=6).train(), torch.randn(4, 6, 5, 7)
    module.requires_grad_(False)
    module.layers[4:].requires_grad_(True)
    references = live_outputs(monkeypatch)
    loss = module(x).square().sum()
    loss.backward()
    gc.collect()
    assert len(references) == 6 and all(reference.expired() for reference in references)


def test_gradients_of_biases_may_be_written_to():
    module, x = block().train(), torch.randn(4, 6, 5, 7)
    [grad] = torch.autograd.grad(module(x).square().sum(), module.cross_layers[1].bias)
    others = grad[:, :, 1:].clone()
    grad[:, :, 0] = 7
    assert torch.equal(grad[:, :, 1:], others)


@pytest.mark.parametrize('of_weight', [False, True])
def test_second_derivatives_of_a_single_layer(of_weight):
    found = {}
    for implementation in ('reference', 'auto'):
        set_implementation(implementation)
        module, x = block(1, 2).double().train(), torch.linspace(-1, 2, 140).sin().view(5, 4, 1, 7).double()
        x.requires_grad_()
        variable = module.layers[0].conv3.weight if of_weight else x
        [grad] = torch.autograd.grad(module(x).mul(x.detach()).sum(), variable, create_graph=True)
        parameters = [p for name, p in module.named_parameters() if not name.endswith('bias')]
        found[implementation] = torch.autograd.grad(grad.square().sum(), [x, *parameters], allow_unused=True)
    for actual, expected in zip(found['auto'], found['reference']):
        zeros = torch.zeros(1).double()
        assert_near(zeros if actual is None else actual, zeros if expected is None else expected, 1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    module, x = block().train(), torch.randn(4, 6, 5, 7)
    expected = differentiate(module, x, 'reference')
    torch.set_default_dtype(dtype)
    try:
        actual = differentiate(module, x, 'auto')
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ('y', 'x', 'layers.0.conv1.weight.grad', 'cross_layers.2.weight.grad', 'norms.1.running_var'):
        assert_near(actual[name], expected[name], 1e-4, name)


@pytest.mark.parametrize('method', ['forward', '_conv_forward'])
def test_a_forward_that_was_replaced_is_called(method):
    module, x = block().eval(), torch.randn(4, 6, 5, 7)
    conv, calls = module.layers[1].conv2, []
    setattr(conv, method, lambda *args: calls.append(x) or getattr(type(conv), method)(conv, *args))
    with torch.no_grad():
        module(x)
    assert len(calls) == 1
    assert explain_implementation(module, x)[''].reason == 'layers.1.conv2 has another forward'


def test_padding_by_name():
    module = block().train()
    conv = module.layers[1].conv2
    module.layers[1].conv2 = nn.Conv2d(3, 3, 3, padding='same', bias=False)
    module.layers[1].conv2.load_state_dict(conv.state_dict())
    assert_same(module, torch.randn(4, 6, 5, 7), 'auto', 1e-4, fused=False)


def test_more_tiles_than_a_grid_has_are_left_to_aten(monkeypatch):
    triton = pytest.importorskip('timm_deluge.ops.triton')
    monkeypatch.setattr(triton, 'MAX_TILES', 0)
    for kernel in '_combine_kernel', '_combine_backward_kernel':
        monkeypatch.setattr(triton, kernel, None)  # whoever starts it fails
    assert_same(block().train(), torch.randn(4, 6, 5, 7), 'triton', 1e-4)


@pytest.mark.parametrize('place', ['layers.1', 'norms.1', 'layers.1.norm2', 'layers.1.conv2', 'norm'])
def test_an_identity_in_the_place_of_a_part_takes_the_reference(place, monkeypatch):
    module, x, calls = block().eval(), torch.randn(4, 6, 5, 7), fused_calls(monkeypatch)
    parent, _, name = place.rpartition('.')
    setattr(module.get_submodule(parent), name, nn.Identity())
    with torch.no_grad():
        module(x)
    assert not calls
    assert explain_implementation(module, x)[''].reason == f'{place} was replaced by a Identity'


def test_a_dispatch_mode_or_a_subclass_takes_the_reference():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Tagged(torch.Tensor):
        pass

    module, x = block(), torch.randn(2, 6, 5, 5)
    with Watch():
        assert 'a dispatch mode is active' in module.why_not_fused(x)
    assert module.why_not_fused(x.as_subclass(Tagged)) == 'the input is a Tagged, not a plain torch.Tensor'
    assert module.why_not_fused(x) is None


@pytest.mark.parametrize('training', [True, False])
def test_what_watches_every_operator_or_module_sees_them(training):
    model, x = DelugeNet((3, 3), (4, 8), num_classes=5, stem_type='cifar').train(training), torch.randn(2, 3, 16, 16)
    flops = {}
    for implementation in ('reference', 'auto'):
        set_implementation(implementation)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        flops[implementation] = counter.get_total_flops()
    assert flops['auto'] == flops['reference'] > 0

    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        with torch.no_grad():
            model(x)
        assert explain_implementation(model, x)['stages.1'].reason == 'layers has hooks, as all modules have'
    finally:
        handle.remove()
    assert set(model.stages[1].layers) | set(model.stages[1].cross_layers) <= seen


@pytest.mark.parametrize('place, part', [
    ('norm', nn.BatchNorm2d(6)), ('norms.1', nn.BatchNorm2d(6)), ('norms.0', BatchNormAct2d(6, affine=False)),
    ('norm', BatchNormAct2d(6, affine=False)), ('drop_paths.0', nn.ReLU()), ('layers.1.conv2', nn.BatchNorm2d(3)),
    ('layers.0.norm1.drop', nn.AvgPool2d(3, 1, 1)),
    ('layers.1.conv2', nn.Conv2d(3, 3, 3, padding=1, padding_mode='circular', bias=False)),
], ids=str)
def test_a_part_that_does_something_else_takes_the_reference(place, part):
    module = block().train()
    for parameter in part.parameters():
        nn.init.uniform_(parameter)
    parent, _, name = place.rpartition('.')
    setattr(module.get_submodule(parent), name, part)
    assert_same(module, torch.randn(4, 6, 5, 7), 'auto', 1e-4, fused=False)


@pytest.mark.parametrize('momentum', [None, torch.tensor(0.3, dtype=torch.float64)])  # None: a mean over all batches
def test_running_statistics_with_another_momentum(momentum, monkeypatch):
    module, calls = block().train(), fused_calls(monkeypatch)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = momentum
    batches = [0.5 + torch.randn(4, 6, 5, 7) for _ in range(3)]
    found = {}
    for name in ('reference', 'auto'):
        set_implementation(name)
        run = copy.deepcopy(module)
        with torch.no_grad():
            for x in batches:
                run(x)
        found[name] = dict(run.named_buffers())
    assert len(calls) == len(batches)
    for name, expected in found['reference'].items():
        assert_near(found['auto'][name], expected, 1e-5, name)


def kept_bytes(model, x):
    """What a forward pass keeps for the backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


@pytest.mark.parametrize('implementation', ['aten', 'reference'])
@pytest.mark.parametrize('aggregation', ['cross_layer', 'residual'])
def test_checkpointing_keeps_less(implementation, aggregation):
    set_implementation(implementation)
    model, x = DelugeNet((6, 6), (8, 16), 5, stem_type='cifar', aggregation=aggregation), torch.randn(8, 3, 16, 16)
    whole = kept_bytes(model, x)
    model.set_grad_checkpointing()
    assert kept_bytes(model, x) < 0.65 * whole


@pytest.mark.parametrize('autocast', [False, True])
def test_kept_bytes_are_those_of_a_fused_residual_network(autocast):
    x = torch.randn(8, 3, 32, 32)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        fused, fused_residual = (kept_bytes(timm.create_model(n), x) for n in ('delugenet146', 'resnetlike146_3x3'))
        set_implementation('reference')
        residual = kept_bytes(timm.create_model('resnetlike146_3x3'), x)
        released = kept_bytes(ReleasedDelugeNet((8, 16, 24), (32, 64, 128), 100), x)
    assert fused <= residual
    assert fused <= 1.1 * fused_residual <= 0.6 * residual
    assert 3 * fused <= released


def test_hooks_and_replaced_parts_are_respected(monkeypatch):
    calls = fused_calls(monkeypatch)
    x = torch.randn(4, 6, 5, 7)
    hooked, seen = block(), []
    hooked.layers[1].norm2.register_forward_hook(lambda *args: seen.append(args))
    hooked(x)
    assert seen and not calls
    for register in (
            nn.Module.register_forward_pre_hook, nn.Module.register_full_backward_hook,
            nn.Module.register_full_backward_pre_hook):
        hooked = block()
        seen.clear()
        register(hooked.layers[1].conv2, lambda *args: seen.append(args))
        hooked(x).sum().backward()
        assert seen and not calls
    replaced = block()
    replaced.layers[1].conv2 = nn.Sequential(replaced.layers[1].conv2, nn.Dropout(0.5))
    replaced(x)
    biased = block()
    biased.layers[1].conv2 = nn.Conv2d(3, 3, 3, padding=1)
    biased(x)
    assert not calls
    block()(x)
    assert len(calls) == 1


@pytest.mark.parametrize('implementation, dtype', [('aten', torch.float64), ('auto', torch.float32)])
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous'])
@pytest.mark.parametrize('grad_checkpointing', [False, True])
@pytest.mark.parametrize('block_type', [DelugeBlock, ResidualBlock])
def test_stochastic_depth_trains_as_the_reference(implementation, dtype, layout, grad_checkpointing, block_type):
    # gradients of biases before a batch normalisation are nothing but rounding: statistics are frozen in float32
    dropped = block(block_type=block_type, drop_path_rates=(0., 0.2, 0.5, 0.7)).to(dtype).train(dtype is torch.float64)
    dropped.drop_paths.train()
    dropped.grad_checkpointing = grad_checkpointing
    x = LAYOUTS[layout](torch.randn(6, 6, 5, 7, dtype=dtype))
    assert_same(dropped, x, implementation, TOLERANCE[dtype])
    assert not torch.allclose(dropped(x), dropped(x))


@pytest.mark.parametrize('implementation', FAST)
def test_a_dropped_image_is_exactly_0_in_any_dtype(implementation):
    norm = nn.BatchNorm2d(6, affine=False).eval()
    norm.running_mean.fill_(1.003)  # no bfloat16
    norm.running_var.fill_(1e-4)
    layers = FusedCrossLayers([torch.ones(6, 1, 1, 1)], [torch.zeros(6, 1, 1, 1)])
    output = torch.rand(2, 6, 4, 4).bfloat16().requires_grad_()
    set_implementation(implementation)
    layers.append(output, norm, torch.tensor([0., 2.]).bfloat16().view(2, 1, 1, 1))
    dropped, kept = layers.cross_layer_depthwise_conv().float()
    assert not dropped.any()
    assert_near(kept, 2 * norm(output[1:].float())[0], TOLERANCE[torch.bfloat16])


def test_gradients_of_several_batches_are_added_up():
    module = block().train()
    batches = torch.randn(3, 4, 6, 5, 7)
    expected = [differentiate(module, x, 'reference') for x in batches]
    set_implementation('auto')
    for x in batches:
        y = module(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()  # the loss of `differentiate`
    for name, parameter in module.named_parameters():
        assert_near(parameter.grad, sum(found[f'{name}.grad'] for found in expected), 1e-4, name)


@pytest.mark.parametrize('implementation', FAST[:2])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', ['resnetlike146_3x3', 'resnetlike146_1x1'])
def test_residual_networks_train_fused(implementation, training, name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, depths=(3, 2), widths=(4, 8)).train(training), torch.randn(4, 3, 8, 8)
    assert_same(model, x, implementation, TOLERANCE[torch.float32])
    layers = {layer for layer, module in model.named_modules() if isinstance(module, CompositeLayer)}
    assert layers and layers <= explain_implementation(model, x).keys()


def test_a_single_value_has_no_statistics():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        block().train()(torch.randn(1, 6, 1, 1))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_no_images(memory_format):
    module, x = block().eval(), torch.empty(0, 6, 4, 4, memory_format=memory_format, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert module.fuse().to(memory_format=memory_format)(x).shape == x.shape


@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_relu_keeps_what_is_not_a_number(implementation, dtype):
    layer = torch.tensor([-1., 2., float('nan'), 3.], dtype=dtype).view(1, 4, 1, 1)
    weight = torch.ones(1, 4)
    weight.view(torch.int32)[0, 3] = 0x7fffffff  # not a number either, as CUDA writes it
    backend = importlib.import_module(f'timm_deluge.ops.{implementation}')
    x = backend.combine([layer], [weight], [torch.zeros(4)], relu=True)[0]
    expected = torch.tensor([0., 2., float('nan'), float('nan')], dtype=dtype)
    torch.testing.assert_close(x.flatten(), expected, equal_nan=True)


@pytest.mark.parametrize('implementation', FAST)
def test_relu_is_for_the_first_result_alone(implementation):
    backend = importlib.import_module(f'timm_deluge.ops.{implementation}')
    layer = torch.full((1, 3, 2, 2), -1.)
    results = backend.combine([layer], [torch.ones(1, 3)] * 6, [torch.zeros(3)] * 6, relu=True)
    assert [result.unique().tolist() for result in results] == [[0.]] + [[-1.]] * 5


def test_batched_gradients_are_refused_and_it_says_what_to_do():
    module, x = block().train(), torch.randn(4, 6, 5, 7)
    for parameter in (module.cross_layers[-1].weight, module.layers[0].conv1.weight):
        y = module(x).flatten(1)[0, :3]
        with pytest.raises(NotImplementedError, match='set_implementation."reference"'):
            torch.autograd.grad(y, parameter, torch.eye(3), is_grads_batched=True)


def test_a_layers_norm_without_parameters_takes_the_reference():
    module, x = block().train(), torch.randn(4, 6, 5, 7)
    module.layers[0].norm2 = BatchNormAct2d(module.layers[0].conv1.out_channels, affine=False)
    assert explain_implementation(module, x)[''].reason == 'layers.0.norm2 has no parameters'
    assert module(x).isfinite().all()


@pytest.mark.parametrize('reparameterized', [False, True])
def test_forward_mode_takes_the_reference(reparameterized):
    module, x = block().eval(), torch.randn(2, 6, 4, 4)
    x, tangent = (t.contiguous(memory_format=torch.channels_last) for t in (x, torch.randn_like(x)))
    _, expected = torch.func.jvp(module, (x,), (tangent,))
    model = reparameterize_model(nn.Sequential(module)) if reparameterized else module
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        actual = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradients_by_vmap_are_refused_and_it_says_what_to_do():
    module, x = block().train(), torch.randn(4, 6, 5, 7, requires_grad=True)
    y = module(x).flatten(1)[0, :3]
    with pytest.raises(NotImplementedError, match='set_implementation."reference"'):
        torch.func.vmap(lambda grad: torch.autograd.grad(y, x, grad, retain_graph=True)[0])(torch.eye(3))


@pytest.mark.parametrize('change', [
    lambda norm: setattr(norm, 'bias', None), lambda norm: setattr(norm, 'num_batches_tracked', None),
    lambda norm: (setattr(norm, 'running_mean', None), setattr(norm, 'running_var', None)),
    lambda norm: setattr(norm, 'track_running_stats', False)])
def test_a_norm_without_one_of_its_tensors_takes_the_reference(change):
    module, x = block().train(), torch.randn(4, 6, 5, 7)
    module.layers[1].norm2 = nn.BatchNorm2d(3)
    change(module.layers[1].norm2)
    assert explain_implementation(module, x)[''].reason.startswith('layers.1.norm2 has ')
    module(x).sum().backward()


def test_what_was_made_in_inference_mode_takes_the_reference():
    module = block().train().requires_grad_(False)
    module.layers[3].requires_grad_()
    with torch.inference_mode():
        x = torch.randn(4, 6, 5, 7)
    module(x).sum().backward()
    assert module.layers[3].conv1.weight.grad is not None


@pytest.mark.parametrize('create_graph', [False, True])
@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_hooks_of_tensors_are_called_once(grad_checkpointing, create_graph):
    def differentiate(implementation):
        set_implementation(implementation)
        torch.manual_seed(0)
        model, calls = DelugeNet((3, 2), (4, 8), num_classes=5, stem_type='cifar').double(), []
        model.set_grad_checkpointing(grad_checkpointing)
        for parameter in model.parameters():
            parameter.register_hook(lambda grad: calls.append(0) or 0.5 * grad)
        y, features = model.forward_intermediates(torch.randn(4, 3, 8, 8).double())
        for feature in features:
            feature.retain_grad()
        y.square().sum().backward(create_graph=create_graph)
        return len(calls), [t.grad.detach() for t in (*features, *model.stages.parameters())]

    (num_calls, actual), (num_expected, expected) = differentiate('auto'), differentiate('reference')
    assert num_calls == num_expected
    for grad, expected_grad in zip(actual, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize('trained', ['', 'cross_layers.2', 'layers.1.conv2', 'layers.1.norm2', 'layers.3'])
def test_second_derivatives_where_little_is_trained(trained):
    def differentiate(implementation):
        set_implementation(implementation)
        module = block().double().train()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).double()
        grads = torch.autograd.grad(module(x).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters)

    for actual, expected in zip(differentiate('auto'), differentiate('reference'), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_threads_differentiate_one_graph_at_once(checkpointing):
    module, x = block(8).double().train(), torch.randn(4, 6, 5, 7).double()
    module.grad_checkpointing = checkpointing
    parameters, y = list(module.parameters()), module(x).square().sum()

    def differentiate(_):
        return torch.autograd.grad(y, parameters, retain_graph=True)

    expected = differentiate(0)
    with ThreadPoolExecutor(4) as pool:
        for grads in pool.map(differentiate, range(40)):
            for grad, expected_grad in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, expected_grad)
    assert all(p is q for p, q in zip(parameters, module.parameters(), strict=True))


def test_a_backward_pass_within_autocast_is_as_exact_as_the_layers():
    module, x = block(width=8).train(), torch.randn(4, 16, 5, 7).contiguous(memory_format=torch.channels_last)
    expected = differentiate(module, x, 'reference')
    set_implementation('auto')
    y = module(x)
    loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()  # that of `differentiate`
    with torch.autocast('cpu', torch.bfloat16):
        loss.backward()
    for name, parameter in module.named_parameters():
        assert_near(parameter.grad, expected[f'{name}.grad'], 1e-4, name)


@pytest.mark.slow
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('module', [
    block(2, 2), block(3, 2, drop_path_rates=(0., .3, .5)), block(3, 2, connection_drop_rate=0.3),
    block(1, 2, ResidualBlock), block(1, 2).layers[0]])
def test_second_derivatives(module, training):
    module = copy.deepcopy(module).double().train(training)
    names, parameters = zip(*module.named_parameters())

    def call(x, *parameters):
        torch.manual_seed(1)  # for stochastic depth
        return torch.func.functional_call(module, dict(zip(names, parameters)), x)

    torch.manual_seed(0)
    tensors = [t.detach().clone().requires_grad_() for t in (torch.randn(2, 4, 3, 3).double(), *parameters)]
    assert all(decision.reason is None for decision in explain_implementation(module, tensors[0]).values())
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize('context', [None, torch.autocast('cpu', torch.bfloat16)])
@pytest.mark.parametrize('grad_checkpointing', [False, True])
@pytest.mark.parametrize('training', [True, False])
def test_gradient_penalty(training, grad_checkpointing, context):
    torch.manual_seed(0)
    model = DelugeNet((3, 2), (4, 8), num_classes=5, stem_type='cifar').train(training)
    model.set_grad_checkpointing(grad_checkpointing)
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradients(implementation, model, x, context=None):
        set_implementation(implementation)
        model = copy.deepcopy(model)
        with context or torch.enable_grad():
            loss = model(x).square().sum()
        grad, = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    exact = gradients('reference', copy.deepcopy(model).double(), x.double())
    plain, actual = ((gradients(name, model, x, context) - exact).norm() for name in ('reference', 'auto'))
    assert actual <= (1.5 * plain if context else 1e-4 * exact.norm())


def test_torch_func_takes_the_reference():
    module = block().double().eval()
    x = torch.randn(3, 6, 4, 4).double()
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(per_image[name].sum(0), parameter.grad)


@pytest.mark.parametrize('implementation', ['auto', 'reference'])
@pytest.mark.parametrize('training', [True, False])
def test_compiles_without_graph_breaks(implementation, training):
    set_implementation(implementation)
    torch.manual_seed(0)
    model = DelugeNet((3, 2), (4, 6), num_classes=5, stem_type='cifar').double().train(training)
    x = torch.randn(4, 3, 8, 8).double()
    expected = copy.deepcopy(model)
    expected(x).square().sum().backward()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    compiled(x).square().sum().backward()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_norm_act_conv_keeps_its_input_alone():
    norm, conv = timm.layers.BatchNormAct2d(4), nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = norm_act_conv(x, norm, conv)
    assert sorted(sizes)[-2:] == [conv.weight.numel(), x.numel()]
    y.square().sum().backward()
    actual = [x.grad, norm.weight.grad, norm.bias.grad, conv.weight.grad]
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(
        actual, list(torch.autograd.grad(conv(norm(x)).square().sum(), [x, norm.weight, norm.bias, conv.weight])))


def test_switch():
    assert timm_deluge.get_implementation() == 'auto'
    timm_deluge.set_implementation('aten')
    assert timm_deluge.get_implementation() == 'aten'
    with pytest.raises(ValueError, match="'fast': must be one of 'auto', 'reference', 'aten', 'cpp', 'triton'"):
        timm_deluge.set_implementation('fast')


@pytest.mark.parametrize('name, expected', [
    ('aten', 'aten'), ('nonsense', "TIMM_DELUGE_IMPLEMENTATION: implementation 'nonsense': must be one of")])
def test_switch_in_the_environment(name, expected, tmp_path):
    code = 'import timm_deluge; print(timm_deluge.get_implementation())'
    process = Forked(code, (), {**os.environ, 'TIMM_DELUGE_IMPLEMENTATION': name}, tmp_path)
    assert expected in ''.join(process.communicate())
    assert (process.returncode == 0) == (name == expected)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(timm_deluge.ops.implementation, '_has_triton', lambda: False)
    with pytest.raises(ImportError, match='pip install triton'):
        timm_deluge.set_implementation('triton')


def test_without_a_compiler(tmp_path):
    code = """if True:
        import timm_deluge, torch
        from timm_deluge.ops import aten, choose_backend
        assert choose_backend(torch.empty(0)) is aten
        try:
            timm_deluge.set_implementation('cpp')
        except ImportError as error:
            print(error)
        assert timm_deluge.get_implementation() == 'auto'
    """
    process = Forked(code, (), {**os.environ, 'CXX': 'no-such-compiler -O3'}, tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "kernels.cpp cannot be compiled with 'no-such-compiler'" in output


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_compiled_loops_are_what_a_cpu_takes():
    cpp = importlib.import_module('timm_deluge.ops.cpp')
    for dtype, expected in {torch.float32: cpp, torch.bfloat16: cpp, torch.float16: aten, torch.float64: aten}.items():
        assert timm_deluge.ops.choose_backend(torch.empty(0, dtype=dtype)) is expected


def test_where_triton_cannot_run_something_else_does(monkeypatch):
    pytest.importorskip('triton')
    set_implementation('triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    module, x = block().train(), torch.randn(4, 6, 5, 7)
    assert explain_implementation(module, x)[''].implementation != 'triton'
    module(x).sum().backward()


def test_triton_runs_where_asked_for():
    triton = pytest.importorskip('timm_deluge.ops.triton')
    set_implementation('triton')
    assert timm_deluge.ops.choose_backend(torch.empty(0)) is triton
    assert timm_deluge.ops.choose_backend(torch.empty(0).double()) is aten


def test_triton_that_does_not_compile_is_left_alone(monkeypatch, caplog):
    triton = pytest.importorskip('timm_deluge.ops.triton')
    find = timm_deluge.ops.implementation._triton.__wrapped__
    device = torch.device('cpu')  # where conftest.py has Triton interpret its kernels
    assert find(device, torch.float32) is triton

    def fail(*_):
        raise Exception('Failed to find C compiler')  # as Triton's own errors are
    monkeypatch.setattr(triton, 'combine', fail)
    assert find(device, torch.float32) is None
    assert 'do not run on cpu in torch.float32: Failed to find C compiler' in caplog.text
    monkeypatch.setattr(timm_deluge.ops.implementation, '_has_triton', lambda: False)
    assert find(device, torch.float32) is None


def test_triton_takes_no_dtype_that_the_device_lacks(monkeypatch, caplog):
    triton = pytest.importorskip('timm_deluge.ops.triton')
    module = timm_deluge.ops.implementation
    find = module._triton.__wrapped__
    monkeypatch.setattr(module, '_triton', find)
    monkeypatch.setattr(triton, 'combine', lambda *_: None)
    monkeypatch.setattr(torch, 'ones', lambda number, device, dtype: torch.empty(number, dtype=dtype))
    for capability, expected in (((7, 5), None), ((8, 0), triton)):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _, capability=capability: capability)
        assert find(torch.device('cuda', 0), torch.float32) is triton
        assert find(torch.device('cuda', 0), torch.bfloat16) is expected
    assert caplog.text.count('do not run on cuda:0 in torch.bfloat16: it has no bfloat16') == 1


@pytest.mark.parametrize('name', FAST[1:])
def test_backends_agree_on_every_pair_of_layouts(name):
    backend = importlib.import_module(f'timm_deluge.ops.{name}')
    torch.manual_seed(0)
    for first, second in itertools.product(LAYOUTS.values(), repeat=2):
        layers = [first(torch.randn(3, 5, 6, 7)), second(torch.randn(3, 5, 6, 7))]
        weight, bias = torch.randn(2, 5), torch.randn(5)
        torch.testing.assert_close(backend.combine(layers, [weight], [bias]), aten.combine(layers, [weight], [bias]))
        scaled = dict(weights=[weight] * 2, biases=list(torch.randn(2, 3, 5)), scales=list(torch.randn(2, 2, 3)))
        torch.testing.assert_close(backend.combine(layers, **scaled), aten.combine(layers, **scaled))
        [begun], _ = same_layout([second(torch.randn(3, 5, 6, 7))])  # perhaps not the layers'
        [whole] = aten.combine(layers, [weight], [bias])
        for relu in (True, False):
            for some in (layers, []):
                expected = begun + (whole if some else bias[:, None, None])
                [actual] = backend.combine(
                    some, [weight[:len(some)]], [bias], [begun.clone()], relu, begun=True)
                torch.testing.assert_close(actual, expected.relu() if relu else expected)
        begun = [begun.clone() for _ in range(2)]
        expected = [total + part for total, part in zip(aten.combine(layers, **scaled), begun)]
        torch.testing.assert_close(backend.combine(layers, outs=begun, begun=True, **scaled), expected)
        for num_layers in 1, 4, 5:
            of_layers = [
                (torch.randn(2, 5), first(torch.randn(3, 5, 6, 7)), torch.randn(5)) for _ in range(num_layers)]
            like, _ = same_layout([layer for _, layer, _ in of_layers])
            options = itertools.product(
                (None, [torch.randn_like(layer) for layer in like]), (None, list(torch.randn(num_layers, 2, 3))))
            for begun, scales in options:
                grads, dots = backend.combine_backward(
                    layers, *zip(*of_layers), begun and [tensor.clone() for tensor in begun], scales)
                expected_grads, expected_dots = aten.combine_backward(
                    layers, *zip(*of_layers), begun and [tensor.clone() for tensor in begun], scales)
                torch.testing.assert_close(list(grads), list(expected_grads))
                assert_near(dots, expected_dots, TOLERANCE[torch.float32])


@pytest.mark.parametrize('channels', [16, 70, 300])  # 300: of several tiles
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous'])
@pytest.mark.parametrize('name', FAST[1:])
def test_backends_agree_on_any_number_of_channels(name, layout, channels):
    backend = importlib.import_module(f'timm_deluge.ops.{name}')
    torch.manual_seed(0)
    layers = [LAYOUTS[layout](x) for x in torch.randn(6, 3, channels, 5, 7)]
    weights, biases, means = torch.randn(7, 6, channels), torch.randn(7, channels), torch.randn(7, channels)
    torch.testing.assert_close(backend.combine(layers, weights, biases), aten.combine(layers, weights, biases))
    for num_layers in 1, 4:
        of_layers = weights[:num_layers], layers[:num_layers], means[:num_layers]
        grads, dots = backend.combine_backward(layers, *of_layers)
        expected_grads, expected_dots = aten.combine_backward(layers, *of_layers)
        torch.testing.assert_close(list(grads), list(expected_grads))
        assert_near(dots, expected_dots, TOLERANCE[torch.float32])


@pytest.mark.parametrize('dtype, channels', [(torch.float32, 16), (torch.float32, 300), (torch.bfloat16, 300)])
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous'])
@pytest.mark.parametrize('num_grads', [7, 8, 9, 13])  # of which the loops sum four at a time, then the rest
@pytest.mark.parametrize('name', FAST[1:])
def test_backends_agree_on_any_number_of_gradients(name, num_grads, layout, dtype, channels):
    backend = importlib.import_module(f'timm_deluge.ops.{name}')
    torch.manual_seed(0)
    grads = [LAYOUTS[layout](x) for x in torch.randn(num_grads, 3, channels, 5, 7).to(dtype)]
    for num_layers in 1, 4:
        of_layers = torch.randn(num_layers, num_grads, channels), grads[:num_layers], torch.randn(num_layers, channels)
        found, found_dots = backend.combine_backward(grads, *of_layers)
        expected, expected_dots = aten.combine_backward(grads, *of_layers)
        for actual, exact in zip((*found, *found_dots), (*expected, *expected_dots)):
            assert_near(actual, exact, TOLERANCE[dtype])


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
@pytest.mark.parametrize('num_threads', [3, 7, 40])  # 40: more than there are tiles
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous'])
def test_every_threads_share_counts(layout, num_threads, monkeypatch):
    backend = importlib.import_module('timm_deluge.ops.cpp')
    torch.manual_seed(0)
    layers = [LAYOUTS[layout](x) for x in torch.randn(6, 5, 3, 16, 16)]
    weights, biases, means = torch.randn(4, 6, 3), torch.randn(4, 3), torch.randn(4, 3)
    grad, x = torch.randn_like(layers[0]), layers[0]
    mean, invstd = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0).reciprocal()
    weight, bias = weights[0, 0], biases[0]
    [y] = aten.combine([x], [(weight * invstd)[None]], [bias - weight * invstd * mean], relu=True)
    calls = [
        lambda of: of.combine(layers, weights, biases), lambda of: of.moments(x),
        lambda of: of.norm_act_backward(grad.clone(), x, y, weight, bias, mean, invstd, True),
        lambda of: of.combine_backward(layers, weights, layers[:4], means)]
    expected = [[*call(aten)] for call in calls]
    monkeypatch.setattr(torch, 'get_num_threads', lambda: num_threads)
    for call, of_aten in zip(calls, expected):
        torch.testing.assert_close([*call(backend)], of_aten, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', FAST[1:])
def test_backends_take_layers_of_several_dtypes(name):
    backend = importlib.import_module(f'timm_deluge.ops.{name}')
    layers = [torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3).bfloat16()]
    weight, bias = torch.randn(2, 5), torch.randn(5)
    torch.testing.assert_close(backend.combine(layers, [weight], [bias]), aten.combine(layers, [weight], [bias]))
    begun = torch.randn(2, 5, 3, 3)
    expected = begun.double() + weight[1, :, None, None].double() * layers[1] + bias[:, None, None]
    [actual] = backend.combine(layers[1:], [weight[1:]], [bias], [begun], begun=True)
    torch.testing.assert_close(actual, expected.float())


@pytest.mark.parametrize('name', FAST)
def test_backends_are_what_the_protocol_says(name):
    backend = importlib.import_module(f'timm_deluge.ops.{name}')
    for function in ('combine', 'combine_backward', 'moments', 'norm_act_backward'):
        expected = inspect.signature(getattr(Backend, function))
        actual = inspect.signature(getattr(backend, function))
        assert list(actual.parameters.values()) == list(expected.parameters.values())[1:]
        assert actual.return_annotation == expected.return_annotation


COMBINE = dict(
    layers=[torch.ones(2, 3, 4, 5)] * 2, weights=[torch.ones(2, 3)], biases=[torch.ones(3)],
    outs=[torch.ones(2, 3, 4, 5)])
COMBINE_BACKWARD = dict(
    grads=[torch.ones(2, 3, 4, 5)] * 2, weights=[torch.ones(2, 3)], layers=[torch.ones(2, 3, 4, 5)],
    means=[torch.ones(3)], begun=[torch.ones(2, 3, 4, 5)])
NORM_ACT_BACKWARD = dict(
    **dict.fromkeys(('grad', 'x', 'y'), torch.ones(2, 3, 4, 5)),
    **dict.fromkeys(('weight', 'bias', 'mean', 'invstd'), torch.ones(3)), training=True)
SCALES = dict(biases=[torch.ones(2, 3)], scales=[torch.ones(2, 2)])


@pytest.mark.parametrize('name', FAST)
@pytest.mark.parametrize('function, arguments, changes, message', [
    ('combine', COMBINE, dict(layers=[]), 'layers: there are none'),
    ('combine', COMBINE, dict(layers=[torch.ones(2, 3, 4)] * 2), r'layers: expected \[N, C, H, W\], got \[2, 3, 4\]'),
    ('combine', COMBINE, dict(layers=[torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 4)]),
     r'layers: expected \[2, 3, 4, 5\], got \[2, 3, 4, 4\]'),
    ('combine', COMBINE, dict(layers=[torch.ones(2, 3, 4, 5, dtype=torch.int32)] * 2),
     'layers: expected floating point numbers, got torch.int32'),
    ('combine', COMBINE, dict(layers=[torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5, device='meta')]),
     'layers: expected to be on cpu, got meta'),
    ('combine', COMBINE, dict(weights=[torch.ones(2, 2)]), r'weights: expected \[2, 3\], got \[2, 2\]'),
    ('combine', COMBINE, dict(weights=[torch.ones(1, 3)]), r'weights: expected \[2, 3\], got \[1, 3\]'),
    ('combine', COMBINE, dict(biases=[torch.ones(3, 1)]), r'biases: expected \[3\], got \[3, 1\]'),
    ('combine', COMBINE, dict(biases=[]), 'biases: expected 1 tensors, got 0'),
    ('combine', COMBINE, dict(outs=[]), 'outs: expected 1 tensors, got 0'),
    ('combine', COMBINE, dict(outs=None, begun=True), 'outs: there are none'),
    ('combine', COMBINE, dict(layers=[torch.ones(2, 3, 4, 4)] * 2, begun=True), r'layers: expected \[2, 3, 4, 5\]'),
    ('combine', COMBINE, dict(outs=[torch.ones(2, 3, 4, 4)]), r'outs: expected \[2, 3, 4, 5\], got \[2, 3, 4, 4\]'),
    ('combine', COMBINE, dict(outs=[torch.ones(2, 3, 4, 5).double()]), 'outs: expected torch.float32 in .*float64'),
    ('combine', COMBINE, dict(outs=[torch.ones(2, 4, 5, 3).permute(0, 3, 1, 2)]), 'contiguous_format, .* of strides'),
    ('combine', COMBINE, dict(scales=[torch.ones(2, 2)]), r'biases: expected \[2, 3\], got \[3\]'),
    ('combine', {**COMBINE, **SCALES}, dict(scales=[torch.ones(2, 3)]), r'scales: expected \[2, 2\], got \[2, 3\]'),
    ('combine_backward', COMBINE_BACKWARD, dict(grads=[]), 'grads: there are none'),
    ('combine_backward', COMBINE_BACKWARD, dict(grads=[torch.ones(1, 3, 4, 5)] * 2), 'grads: expected'),
    ('combine_backward', COMBINE_BACKWARD, dict(weights=[torch.ones(3, 3)]), 'weights: expected'),
    ('combine_backward', COMBINE_BACKWARD, dict(means=[torch.ones(2)]), 'means: expected'),
    ('combine_backward', COMBINE_BACKWARD, dict(means=[torch.ones(3)] * 2), 'means: expected 1 tensors, got 2'),
    ('combine_backward', COMBINE_BACKWARD, dict(begun=[torch.ones(2, 3, 4, 5).bfloat16()]), 'begun: expected'),
    ('combine_backward', COMBINE_BACKWARD, dict(scales=[torch.ones(1, 2)]), 'scales: expected'),
    ('moments', dict(x=torch.ones(2, 3, 4, 5)), dict(x=torch.ones(3)), 'x: expected'),
    ('moments', dict(x=torch.ones(2, 3, 4, 5)), dict(x=torch.ones(0, 3, 4, 5)), r'x: .* no values, got \[0, 3, 4, 5\]'),
    ('norm_act_backward', NORM_ACT_BACKWARD, dict(x=torch.ones(2, 3, 4)), 'x: expected'),
    ('norm_act_backward', NORM_ACT_BACKWARD, dict(grad=torch.ones(2, 3, 4, 4)), 'grad: expected'),
    ('norm_act_backward', NORM_ACT_BACKWARD, dict(y=torch.ones(2, 2, 4, 5)), 'y: expected'),
    *(('norm_act_backward', NORM_ACT_BACKWARD, {parameter: torch.ones(2)}, f'{parameter}: expected')
      for parameter in ('weight', 'bias', 'mean', 'invstd')),
])
def test_backends_refuse_what_they_would_read_beyond(name, function, arguments, changes, message):
    call = getattr(importlib.import_module(f'timm_deluge.ops.{name}'), function)
    call(**copy.deepcopy(arguments))
    with pytest.raises(ValueError, match=message):
        call(**copy.deepcopy({**arguments, **changes}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_compiled_triton_kernels_do_what_aten_does():
    """In another process: in this one, Triton interprets."""
    code = """if True:
        import torch
        from timm_deluge.ops import aten, triton
        torch.manual_seed(0)
        layers = list(torch.randn(5, 2, 70, 9, 8, device='cuda'))
        weights, bias = torch.randn(3, 5, 70, device='cuda'), torch.randn(70, device='cuda')
        of_layers, means = torch.randn(2, 5, 70, device='cuda'), list(torch.randn(2, 70, device='cuda'))
        begun = torch.randn(2, 2, 70, 9, 8, device='cuda')
        found, expected = (
            (backend.combine(layers, list(weights), [bias] * 3, None, True),
             backend.combine(layers, list(weights[:2]), [bias] * 2, list(begun.clone()), begun=True),
             *backend.combine_backward(layers, list(of_layers), layers[:2], means),
             *backend.combine_backward(layers, list(of_layers), layers[:2], means, list(begun.clone())))
            for backend in (triton, aten))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    """
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    subprocess.run([sys.executable, '-c', code], env=environment, check=True)


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_loops_refuse_what_they_were_not_compiled_for():
    from timm_deluge.ops import cpp
    for x in (torch.ones(2, 3, 4, 5).double(), torch.ones(2, 3, 4, 5, device='meta')):
        with pytest.raises(ValueError, match=f'float32 and bfloat16 on a CPU, not {x.dtype} on {x.device}'):
            cpp.moments(x)


# the last ones: of several tiles, of images of which not all are summed together
@pytest.mark.parametrize('shape', [(3, 70, 8, 9), (2, 300, 3, 3), (1, 5, 40, 40), (10, 3, 12, 12)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', FAST)
def test_backends_give_moments_and_the_gradient_of_batch_norm_and_relu(name, layout, dtype, shape):
    backend = importlib.import_module(f'timm_deluge.ops.{name}')
    torch.manual_seed(0)
    x, grad = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(2))
    exact = x.double().requires_grad_()
    mean, var = backend.moments(x)
    assert_near(mean, exact.mean((0, 2, 3)), 1e-5)
    assert_near(var, exact.var((0, 2, 3), correction=0), 1e-5)

    weight, bias = (torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    for training in (True, False):
        y = nn.functional.batch_norm(exact, mean.double(), var.double(), weight, bias, training, eps=1e-12)
        parameters = weight.detach().float(), bias.detach().float(), mean, var.rsqrt()
        y = torch.relu(y)
        expected = torch.autograd.grad(y, (exact, weight, bias), grad.double())
        actual = backend.norm_act_backward(
            grad.clone(memory_format=torch.preserve_format), x, y.detach().to(dtype), *parameters, training)
        for a, e in zip(actual, expected):
            assert_near(a, e, TOLERANCE[dtype])


@pytest.mark.parametrize('name', FAST)
def test_a_large_mean_leaves_the_variance_exact(name):
    x = 1000 + torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    _, var = importlib.import_module(f'timm_deluge.ops.{name}').moments(x)
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('num_sums', [1, 4, 5, 11])
@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('pruned', [True, False])
def test_running_sums_are_sums_of_the_layers_so_far(implementation, num_sums, relu, pruned):
    set_implementation(implementation)
    torch.manual_seed(0)
    layers = list(torch.randn(num_sums, 2, 6, 3, 4))
    weights, biases = torch.randn(num_sums, num_sums, 6), torch.randn(num_sums, 6)
    outs = list(torch.full((num_sums, 2, 6, 3, 4), float('nan')))
    relus = [i % 3 != 1 for i in range(num_sums)] if relu else None
    sources = [[n for n in range(i + 1) if n % 3 == i % 3] for i in range(num_sums)] if pruned else None
    if pruned:
        for i, numbers in enumerate(sources):
            weights[i, [n for n in range(num_sums) if n not in numbers]] = 0

    def folded_weights(sums, numbers, begins):
        return [weights[i, list(numbers)] for i in sums], [biases[i] * begins for i in sums]

    for memory in (None, outs):
        known = layers[:1]
        for i, actual in enumerate(running_sums(known, num_sums, folded_weights, memory, relus, sources)):
            pairs = zip(weights[i, ..., None, None], layers[:i + 1])
            expected = biases[i, :, None, None] + sum(weight * layer for weight, layer in pairs)
            torch.testing.assert_close(actual, expected.relu() if relus and relus[i] else expected)
            known += layers[i + 1:i + 2]


@pytest.mark.parametrize('sources, expected', [
    (None, [1, 2, 3, 4, 5, 2, 3, 4]),
    ([[0], [1], [0], [0], [1], [3], [1], [7]], [1, 1, 1, 1, 2, 1, 1, 2]),
])
def test_running_sums_read_each_layer_once_for_the_last_four_sums(monkeypatch, sources, expected):
    def folded_weights(sums, numbers, begins):
        return [torch.ones(len(numbers), 2)] * len(sums), [torch.zeros(2)] * len(sums)

    set_implementation('aten')
    layers, reads, written = [torch.randn(1, 2, 3, 3)], [], []
    combine = aten.combine

    def watched(layers, weights, *args, begun=False):
        reads.append(len(layers) + begun)
        written.append(len(weights))
        return combine(layers, weights, *args, begun=begun)

    monkeypatch.setattr(aten, 'combine', watched)
    for _ in running_sums(layers, 8, folded_weights, sources=sources):
        layers.append(torch.randn(1, 2, 3, 3))
    assert reads == expected
    assert written == [1, 1, 1, 1, 4, 1, 1, 1]


def test_gradients_are_read_once_for_four_layers_where_there_are_four(monkeypatch):
    def watched(grads, weights, layers, *args):
        reads.append((len(grads), len(layers)))
        return combine_backward(grads, weights, layers, *args)

    set_implementation('aten')
    reads, combine_backward = [], aten.combine_backward
    monkeypatch.setattr(aten, 'combine_backward', watched)
    model = timm.create_model('delugenet146', depths=(9,), widths=(4,))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert reads == [*((n, 1) for n in range(1, 6)), (6, 4), (1, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize('place', ['', 'stages.1', 'stages.0.layers.1'])
@pytest.mark.parametrize('by_method', [False, True])
def test_what_is_compiled_takes_the_reference_and_an_explanation_says_so(place, by_method):
    model, x = DelugeNet((3, 3), (4, 8), num_classes=5, stem_type='cifar'), torch.randn(2, 3, 16, 16)
    before, calls = copy.deepcopy(model.state_dict()), []

    def backend(graph, example_inputs):
        calls.append(graph)
        return graph.forward

    parent, _, name = place.rpartition('.')
    part = model.get_submodule(place)
    if by_method:
        part.compile(backend=backend)
    elif place:
        setattr(model.get_submodule(parent), name, torch.compile(part, backend=backend))
    else:
        model = torch.compile(model, backend=backend)
    found = {name.replace('_orig_mod.', '').replace('._orig_mod', ''): decision
             for name, decision in explain_implementation(model, x).items()}
    assert not calls
    inside = [decision for name, decision in found.items() if f'{name}.'.startswith(f'{place}.' if place else '')]
    assert set(inside) == {('reference', 'the model is compiled or exported')}
    assert any('.layers.' in name for name in found)  # each layer decides, too, as no block takes its fast path
    if place.count('.') == 3:
        why = 'was compiled' if by_method else 'was replaced by a OptimizedModule'
        assert found['stages.0'] == ('reference', f'layers.1 {why}')
    assert (found['stages.1'].reason is None) == place.startswith('stages.0')
    for tensor, as_it_was in zip(model.state_dict().values(), before.values()):
        assert torch.equal(tensor, as_it_was)
    model(x)
    assert calls
    torch.compiler.reset()  # other tests compile the same functions


def test_what_is_excluded_from_compilation_decides_for_itself():
    model, x = DelugeNet((3, 3), (4, 8), num_classes=5, stem_type='cifar'), torch.randn(2, 3, 16, 16)
    model.stages[0] = torch.compiler.disable(model.stages[0])
    for whole in (model, torch.compile(model, backend='eager')):
        decisions = explain_implementation(whole, x)
        found = {name.replace('_orig_mod.', ''): decision for name, decision in decisions.items()}
        assert found['stages.0._orig_mod'].reason is None
        assert (found['stages.1'].reason is None) == (whole is model)


def test_sizes_of_a_convolution_by_a_single_number_take_the_reference():
    module = block().train()
    module.layers[1].conv2.padding = 1
    assert_same(module, torch.randn(4, 6, 5, 7), 'auto', 1e-4, fused=False)


def test_an_explanation_names_the_implementation_and_what_is_against_it(caplog):
    torch.manual_seed(0)
    model = timm.create_model('delugenet146', depths=(2, 2), widths=(4, 4), drop_path_rate=0.2)
    x = torch.randn(2, 3, 8, 8)
    set_implementation('aten')
    before = copy.deepcopy(model.state_dict())
    names = {'stages.0.transition', 'stages.0', 'stages.1.transition', 'stages.1'}
    assert explain_implementation(model, x) == dict.fromkeys(names, ('aten', None))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        assert explain_implementation(model, x) == dict.fromkeys(names, ('aten', None))
        fused = timm.utils.reparameterize_model(model.eval())
        assert explain_implementation(fused, x)['stages.1'] == ('aten', None)
        assert explain_implementation(fused, x)['stages.1.transition'].reason == 'norm was reparameterised'
    assert 'gradients are enabled' in explain_implementation(fused, x)['stages.1'].reason

    model.stages[1].layers[0].norm2.register_forward_hook(lambda *_: None)
    caplog.set_level('DEBUG', 'timm_deluge')
    found = explain_implementation(model, x)
    assert found['stages.0'].reason is None
    assert found['stages.1'] == ('reference', 'layers.0.norm2 has hooks')
    assert 'DelugeBlock takes the reference implementation: layers.0.norm2 has hooks' in caplog.text
    set_implementation('reference')
    assert "set_implementation('reference')" in explain_implementation(model, x)['stages.0'].reason
