"""Each aggregation is its definition, on every path."""
import pytest
import timm
import torch
from test_cli import invoke
from test_implementations import FAST, LAYOUTS, assert_same, block
from torch import nn

from timm_deluge.aggregation import AGGREGATIONS
from timm_deluge.delugenet import DelugeNet
from timm_deluge.report import create_report

OTHERS = [name for name in AGGREGATIONS if name != 'cross_layer']


def by_hand(name, layers, weight, bias):
    if name == 'cross_layer':
        terms = [weight[:, 0, i] * h.movedim(1, -1)[..., None] + bias[:, 0, i] for i, h in enumerate(layers)]
        return sum(terms)[..., 0].movedim(-1, 1)
    if name == 'scalar':
        return sum(w * h + b for w, b, h in zip(weight.flatten(), bias.flatten(), layers, strict=True))
    return weight[:, 0] * layers[-1] + bias[:, 0]


@pytest.mark.parametrize('name, num_parameters', [('cross_layer', 2 * 5 * 4), ('scalar', 2 * 4), ('last', 2 * 5)])
def test_definitions(name, num_parameters):
    torch.manual_seed(0)
    layers = list(torch.randn(4, 2, 5, 3, 3).double())
    aggregation = AGGREGATIONS[name](len(layers), 5).double()
    assert sum(p.numel() for p in aggregation.parameters()) == num_parameters
    expected = layers[-1] if name == 'last' else sum(layers) / len(layers)
    torch.testing.assert_close(aggregation(layers), expected)
    for parameter in aggregation.parameters():
        nn.init.normal_(parameter)
    expected = by_hand(name, layers, aggregation.weight, aggregation.bias)
    torch.testing.assert_close(aggregation(layers), expected)
    full = AGGREGATIONS['cross_layer'](len(layers), 5).double()
    full.load_state_dict(dict(zip(('weight', 'bias'), aggregation.kernel())))
    torch.testing.assert_close(full(layers), expected)


@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous'])
@pytest.mark.parametrize('name', OTHERS)
def test_trains_as_the_reference(name, layout, implementation):
    module = block(6, cross_layer=AGGREGATIONS[name]).train()
    assert_same(module, LAYOUTS[layout](torch.randn(4, 6, 5, 5)), implementation, 2e-4)


def test_scalar_starts_as_the_cross_layer_convolution():
    torch.manual_seed(0)
    cross_layer, scalar = (
        DelugeNet((3, 3), (4, 8), 5, stem_type='cifar', aggregation=name) for name in ('cross_layer', 'scalar'))
    scalar.load_state_dict({
        k: v if v.shape == scalar.state_dict()[k].shape else v[:1] for k, v in cross_layer.state_dict().items()})
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(scalar(x), cross_layer(x))


def test_last_has_no_connections_across_layers():
    torch.manual_seed(0)
    model = DelugeNet((4,), (4,), 5, stem_type='cifar', aggregation='last').eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.stages[0].cross_layers[1].weight.zero_()
        expected = model.forward_features(x)
        torch.testing.assert_close(model.forward_features(torch.randn_like(x)), expected)


@pytest.mark.parametrize('name', OTHERS)
def test_reports_count_its_parameters(name):
    whole, cross_layer = create_report('delugenet146', aggregation=name), create_report('delugenet146')
    expected = sum(
        2 * sum(range(2, depth + 2)) if name == 'scalar' else 2 * channels * depth
        for depth, channels in ((7, 64), (16, 128), (24, 256)))
    assert whole.cross_layer_params == expected
    assert whole.params - whole.cross_layer_params == cross_layer.params - cross_layer.cross_layer_params
    assert (whole.cross_layer_macs == cross_layer.cross_layer_macs) == (name == 'scalar')


def test_report_command_takes_model_arguments():
    result = invoke('report', 'delugenet146', '--model-kwargs', 'aggregation=scalar', '--model-kwargs', 'num_classes=7')
    report = create_report('delugenet146', aggregation='scalar', num_classes=7)
    assert result.exit_code == 0 and f'{report.params:,}' in result.stdout
    assert 'delugenet146 aggregation=scalar num_classes=7' in result.stdout
    messages = {
        'scalar': 'expected KEY=VALUE', 'aggregation=sum': "must be one of 'cross_layer'", 'colour=3': "'colour'"}
    for argument, message in messages.items():
        result = invoke('report', 'delugenet146', '--model-kwargs', argument)
        assert result.exit_code == 2 and message in result.stderr


def test_muon_leaves_them_to_its_fallback():
    from timm.optim.muon import _is_suitable_for_muon

    for name in AGGREGATIONS:
        model = timm.create_model('delugenet146', aggregation=name, device='meta')
        assert not any(_is_suitable_for_muon(p) for n, p in model.named_parameters() if 'cross_layers' in n)
