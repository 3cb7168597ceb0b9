"""Dropped connections: each image loses its own, the mean stays, and every path drops the same ones."""
import copy

import pytest
import timm
import torch
from test_implementations import (
    FAST,
    LAYOUTS,
    TOLERANCE,
    assert_as_near,
    assert_same,
    block,
    is_fused,
    kept_bytes,
)
from test_reparameterize import assert_same_function, away_from_start
from timm.utils import reparameterize_model

from timm_deluge import explain_implementation
from timm_deluge.aggregation import CrossLayerDepthwiseConv2d, WeightedLayerSum
from timm_deluge.delugenet import DelugeNet
from timm_deluge.prune import prune_connections, save_pruned


def convolution(kind=CrossLayerDepthwiseConv2d, **kwargs):
    torch.manual_seed(0)
    conv = kind(4, 5, **kwargs).double()
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    return conv


@pytest.mark.parametrize('kind', [CrossLayerDepthwiseConv2d, WeightedLayerSum])
@pytest.mark.parametrize('sources', [None, [0, 2, 3]])
def test_each_image_loses_its_own_contributions(kind, sources):
    conv = convolution(kind, sources=sources, drop_rate=0.25)
    layers = list(torch.randn(4, 6, 5, 3, 2).double().requires_grad_().unbind())
    torch.manual_seed(1)
    scale = conv.draw_scale(6)
    assert scale.shape == (6, 4) and set(scale.unique().tolist()) == {0, 4 / 3}
    torch.manual_seed(1)
    x = conv(layers)
    weight, bias = conv.kernel()
    expected = sum(
        scale[:, i, None, None, None] * (weight[:, 0, i, :, None] * layer + bias[:, 0, i, :, None])
        for i, layer in enumerate(layers))
    torch.testing.assert_close(x, expected)
    wanted = [*layers, *conv.parameters()]
    actual, by_hand = (
        torch.autograd.grad(y.square().sum(), wanted, allow_unused=True, materialize_grads=True) for y in (x, expected))
    torch.testing.assert_close(actual, by_hand)


def test_the_share_that_is_dropped_and_the_mean():
    conv = convolution(drop_rate=0.1)
    torch.manual_seed(0)
    scale = conv.draw_scale(100_000)
    dropped = (scale == 0).double()
    assert (dropped.mean(0) - 0.1).abs().max() < 0.005
    together = torch.corrcoef(dropped.t()) - torch.eye(4)
    assert together.abs().max() < 0.02
    layers = [layer.expand(100_000, -1, -1, -1) for layer in torch.randn(4, 1, 5, 1, 1).double()]
    kept = conv.eval()([layer[:1] for layer in layers])
    spread = conv.train()(layers)
    assert (spread.mean(0) - kept).abs().max() < 5 * spread.std(0).max() / 100_000 ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('batch', [1, 6])
@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_trains_as_the_reference(implementation, layout, batch, grad_checkpointing):
    # gradients of biases before a batch normalisation are nothing but rounding: statistics are frozen
    module = block(6, drop_path_rates=(0., 0.2) * 3, connection_drop_rate=0.3).eval()
    module.cross_layers.train()
    module.drop_paths.train()
    module.grad_checkpointing = grad_checkpointing
    x = LAYOUTS[layout](torch.randn(batch, 6, 5, 7))
    assert_same(module, x, implementation, TOLERANCE[torch.float32])
    assert not torch.allclose(module(x), module(x))


@pytest.mark.parametrize('depth', [1, 4, 5, 9])
@pytest.mark.parametrize('pruned', [False, True])
def test_block_of_any_length(depth, pruned):
    connections = [[k] if k else [] for k in range(depth)] if pruned else None
    module = block(depth, connection_drop_rate=0.2, pruned_connections=connections).double().train()
    assert_same(module, torch.randn(5, 6, 4, 4).double(), 'aten', TOLERANCE[torch.float64])


def test_autocast():
    torch.manual_seed(0)
    model = DelugeNet((4, 3), (8, 16), 5, stem_type='cifar', connection_drop_rate=0.2).train()
    with torch.autocast('cpu', torch.bfloat16):
        assert is_fused(model, torch.randn(8, 3, 16, 16))
    assert_as_near(model, model, (8, 3, 16, 16), torch.autocast('cpu', torch.bfloat16))


def test_no_more_is_kept_for_the_backward_pass():
    x = torch.randn(8, 3, 16, 16)
    plain, dropped = (
        DelugeNet((6, 6), (8, 16), 5, stem_type='cifar', connection_drop_rate=rate).train() for rate in (0, 0.2))
    assert kept_bytes(dropped, x) < 1.01 * kept_bytes(plain, x)


def test_in_training_only():
    torch.manual_seed(0)
    model, plain = (DelugeNet((3, 3), (4, 8), 5, stem_type='cifar', connection_drop_rate=rate) for rate in (0.5, 0))
    model.load_state_dict(away_from_start(plain).state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert_same_function(model.eval(), plain.eval(), x)
    assert_same_function(reparameterize_model(model), plain, x)
    assert 'drop_rate=0.5' in repr(model) and 'drop_rate' not in repr(plain.stages)


def test_where_only_some_drop_it_is_the_reference():
    module = block(3, connection_drop_rate=0.2).train()
    x = torch.randn(2, 6, 4, 4)
    assert explain_implementation(module, x)[''].implementation != 'reference'
    module.cross_layers[1].eval()
    assert explain_implementation(module, x)[''].reason == 'only some of the cross-layer convolutions drop connections'
    module.cross_layers.eval()
    assert explain_implementation(module, x)[''].reason is None


def test_scripts_and_compiles():
    module = block(3, connection_drop_rate=0.5).train()
    x = torch.randn(4, 6, 5, 5)
    torch.manual_seed(1)
    expected = copy.deepcopy(module)(x)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(module))(x), expected)
    torch.compile(module, fullgraph=True, backend='aot_eager')(x).sum().backward()


def test_pruned_and_saved_networks_drop_what_is_left(tmp_path):
    torch.manual_seed(0)
    pruned = prune_connections(timm.create_model('delugenet146', connection_drop_rate=0.1), 0.3)
    assert {conv.drop_rate for stage in pruned.stages for conv in stage.cross_layers} == {0.1}
    save_pruned(pruned, tmp_path / 'pruned')
    again = timm.create_model(f'local-dir:{tmp_path / "pruned"}', pretrained=True, connection_drop_rate=0.2)
    assert {conv.drop_rate for stage in again.stages for conv in stage.cross_layers} == {0.2}


@pytest.mark.parametrize('options, message', [
    ({'connection_drop_rate': 1}, 'connection_drop_rate=1: must be at least 0 and less than 1'),
    ({'drop_path_rate': 1.5}, 'drop_path_rate=1.5: must be from 0 to 1'),
    ({'connection_drop_rate': -0.1}, 'connection_drop_rate=-0.1: must be at least 0 and less than 1'),
    ({'connection_drop_rate': 0.1, 'aggregation': 'last'}, "aggregation='last' has no connections across"),
    ({'connection_drop_rate': 0.1, 'aggregation': 'residual'}, "aggregation='residual' has no connections"),
])
def test_what_is_wrong_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        DelugeNet((2, 2), (4, 8), 5, stem_type='cifar', **options)
