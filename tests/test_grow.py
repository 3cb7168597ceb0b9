"""A deeper or wider network made of a trained one computes the same, and learns to use what it has got."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from test_implementations import assert_near
from test_prune import DEPTHS, network
from test_reparameterize import assert_same_function, away_from_start
from timm.models import save_for_hf
from timm.utils import reparameterize_model

from timm_deluge import insert_layers, prune_connections, remove_layers, set_implementation, widen_layers
from timm_deluge.delugenet import DelugeNet

WIDER = (6, 20)  # of (4, 8): some copies of the first block's channels, one to two of each of the second's
DEEPER, LAYERS = (6, 7), [[1, 4], [2, 3, 5]]  # one less of the first block's layers: that one gives h_0


def deeper(depths=DEEPER, widths=(4, 8), **kwargs) -> DelugeNet:
    torch.manual_seed(1)
    return away_from_start(DelugeNet(depths, widths, num_classes=5, stem_type='cifar', **kwargs))


def wider(widths=WIDER, depths=DEPTHS, **kwargs) -> DelugeNet:
    return deeper(depths, widths, **kwargs)


def differentiate(model, x):
    model.train()
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 5)
    names, parameters = zip(*model.named_parameters())
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize('layers', [LAYERS, [[3, 4], [4, 5, 6]], [[1, 2], [1, 2, 3]]])
@pytest.mark.parametrize('aggregation', ['cross_layer', 'scalar'])
def test_it_computes_the_same(aggregation, layers):
    model, larger = network(aggregation=aggregation), deeper(aggregation=aggregation)
    before = [copy.deepcopy(m.state_dict()) for m in (model, larger)]
    grown = insert_layers(model, larger, layers)
    x = torch.randn(4, 3, 16, 16)
    assert_same_function(grown.eval(), model.eval(), x)
    larger.load_state_dict(grown.state_dict())
    assert_same_function(larger.eval(), model, x)
    for m, expected in zip((model, deeper(aggregation=aggregation)), before):
        for name, tensor in m.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize('implementation', ['reference', 'auto'])
def test_it_trains_as_the_same_and_begins_to_listen(implementation):
    set_implementation(implementation)
    model, x = network().double(), torch.randn(4, 3, 16, 16).double()
    grown = insert_layers(model, deeper().double(), LAYERS)
    loss, grads = differentiate(grown, x)
    expected_loss, expected = differentiate(model, x)
    assert_near(loss, expected_loss, 1e-9)
    for name in ('stem.conv.weight', 'stages.0.transition.conv2.weight', 'head.fc.weight'):
        assert_near(grads[name], expected[name], 1e-8, name)
    assert_near(grads['stages.1.layers.4.conv2.weight'], expected['stages.1.layers.2.conv2.weight'], 1e-8)
    assert not grads['stages.1.layers.3.conv2.weight'].any()  # additional: nothing listens to it yet
    listening = grads['stages.1.cross_layers.6.weight'][:, 0, :, 0]
    assert listening[:, 4].abs().min() > 0

    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            parameter -= 0.1 * grads[name]
    _, grads = differentiate(grown, x)
    assert grads['stages.1.layers.3.conv2.weight'].abs().max() > 0


@pytest.mark.parametrize('training', [True, False])
def test_additional_layers_are_in_the_mode_and_type_of_the_others(training):
    grown = insert_layers(network().double().train(training), deeper().train(not training), LAYERS)
    assert {module.training for module in grown.modules()} == {training}
    assert {tensor.dtype for tensor in grown.state_dict().values()} == {torch.float64, torch.int64}


def test_it_undoes_the_removal_of_layers():
    model = network()
    layers = [[1], [1, 3]]
    shallower = remove_layers(model, layers)
    again = insert_layers(shallower, model, layers)
    additional = model.stages[1].layers[3]
    assert torch.equal(again.stages[1].layers[3].conv2.weight, additional.conv2.weight)
    once_more = remove_layers(again, layers)
    for name, tensor in shallower.state_dict().items():
        assert torch.equal(once_more.state_dict()[name], tensor), name


def test_timm_saves_it_and_makes_it_again(tmp_path):
    model = away_from_start(timm.create_model('delugenet146', depths=(3, 2), widths=(4, 8)))
    grown = insert_layers(model, timm.create_model('delugenet146', depths=(4, 3), widths=(4, 8)), [[1], [2]])
    for name, saved in {'grown': grown, 'pruned': prune_connections(grown, 0.2, unit='channel'),
                          'shallower': remove_layers(prune_connections(grown, 0.2), [[1], []])}.items():
        save_for_hf(saved, tmp_path / name, safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True)
        assert_same_function(loaded.eval(), saved.eval(), torch.randn(1, 3, 16, 16))


def test_what_does_not_fit_is_named():
    model = network()
    with pytest.raises(ValueError, match='got 1 lists for 2 blocks and 2 of the deeper network'):
        insert_layers(model, deeper(), [[1]])
    with pytest.raises(ValueError, match='got 2 lists for 2 blocks and 0 of the deeper network'):
        insert_layers(model, deeper(aggregation='residual'), LAYERS)
    with pytest.raises(ValueError, match=r'block 0 has 3 layers, and 5 .*: expected 2 numbers from 1 to 4, got'):
        insert_layers(model, deeper(), [[0, 1], []])
    with pytest.raises(ValueError, match=r'block 1 has 4 layers.*expected 3 numbers from 1 to 6, got \[2\]'):
        insert_layers(model, deeper(), [[1, 2], [2]])
    with pytest.raises(ValueError, match='block 0 has 5 layers, but 3 in the deeper network'):
        insert_layers(deeper(), model, LAYERS)
    with pytest.raises(ValueError, match='block 1 has 16 channels, in the deeper network 24'):
        insert_layers(model, deeper(widths=(4, 12)), LAYERS)
    dilated, larger = (DelugeNet((2, 2, depth), (4, 4, 4), output_stride=stride) for depth, stride in ((2, 8), (3, 32)))
    with pytest.raises(ValueError, match='block 2 has another dilation .*: give both the same output_stride'):
        insert_layers(dilated, larger, [[], [], [1]])
    for pruned in (
            prune_connections(model, 0.3), prune_connections(model, 0.3, unit='channel'), network(aggregation='last')):
        with pytest.raises(ValueError, match='block 0 has .* that do not take all layers: insert layers before'):
            insert_layers(pruned, deeper(), LAYERS)
    assert [len(block.layers) for block in model.stages] == [DEPTHS[0] - 1, DEPTHS[1]]


@pytest.mark.parametrize('aggregation', ['cross_layer', 'scalar', 'last', 'residual'])
@pytest.mark.parametrize('widths', [WIDER, (4, 9), (4, 8)])
def test_a_wider_one_computes_the_same(widths, aggregation):
    model, target = network(aggregation=aggregation), wider(widths, aggregation=aggregation)
    before = [copy.deepcopy(m.state_dict()) for m in (model, target)]
    grown = widen_layers(model, target)
    assert_same_function(grown.eval(), model.eval(), torch.randn(4, 3, 16, 16))
    assert {name: t.shape for name, t in grown.state_dict().items()} == {name: t.shape for name, t in before[1].items()}
    for m, expected in zip((model, target), before):
        for name, tensor in m.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_a_wider_one_with_projections_computes_the_same():
    options = dict(aggregation='residual', transition_type='1x1')
    model, x = network(**options).eval(), torch.randn(4, 3, 16, 16)
    assert_same_function(widen_layers(model, wider(**options)), model, x)


@pytest.mark.parametrize('implementation', ['reference', 'auto'])
def test_a_wider_one_trains_as_the_same_and_its_copies_part(implementation):
    set_implementation(implementation)
    model, x = network().double(), torch.randn(8, 3, 16, 16).double()
    grown = widen_layers(model, wider())
    loss, grads = differentiate(grown, x)
    expected_loss, expected = differentiate(model, x)
    assert_near(loss, expected_loss, 1e-9)
    assert_near(grads['head.fc.bias'], expected['head.fc.bias'], 1e-8)
    name = 'stages.1.cross_layers.0.weight'
    of_copies = torch.zeros_like(expected[name]).index_add_(0, torch.arange(40) % 16, grads[name])
    assert_near(of_copies, expected[name], 1e-8)

    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            parameter -= 0.1 * grads[name]
    for layer in grown.stages[1].layers:
        directions = F.normalize(layer.conv2.weight.flatten(1), dim=1)
        assert (directions[:4] * directions[8:12]).sum(1).max() < 1 - 1e-6  # channels 8 to 11 were those of 0 to 3


@pytest.mark.parametrize('training', [True, False])
def test_a_wider_one_is_in_the_mode_and_type_of_the_first(training):
    grown = widen_layers(network().double().train(training), wider().train(not training))
    assert {module.training for module in grown.modules()} == {training}
    assert {tensor.dtype for tensor in grown.state_dict().values()} == {torch.float64, torch.int64}


def test_shares_of_copies_are_finite_and_of_one_sign():
    torch.manual_seed(0)
    model, target = network(), wider((64, 128))
    for parameter in model.parameters():
        parameter.data.fill_(1.)
    weight = widen_layers(model, target).stages[1].layers[0].conv2.weight
    assert weight.min() > 0 and weight.max() <= 1
    assert_near(weight.sum(1), torch.full_like(weight.sum(1), 8.), 1e-5)


def test_networks_that_differ_in_more_than_widths_are_refused():
    model = network()
    with pytest.raises(ValueError, match=r'stages.1.transition.conv.weight is \[14, 8, .*channels as in \[16'):
        widen_layers(model, wider((4, 7)))
    with pytest.raises(ValueError, match=r'only one has stages.1.cross_layers.4.bias'):
        widen_layers(model, wider(depths=(4, 5)))
    with pytest.raises(ValueError, match=r'only one has stages.0.cross_layers.0.bias'):
        widen_layers(model, wider(aggregation='residual'))
    with pytest.raises(ValueError, match=r'wider: stages.0.cross_layers.0.weight is \[1, 1, 2, 1\]'):
        widen_layers(model, wider(aggregation='scalar'))
    with pytest.raises(ValueError, match='wider: expected num_classes=5, as in the model, got 7'):
        widen_layers(model, DelugeNet(DEPTHS, WIDER, num_classes=7, stem_type='cifar'))
    with pytest.raises(ValueError, match='wider: expected in_chans=3, as in the model, got 6'):
        widen_layers(model, wider(in_chans=6))
    pruned = [[[[], [source], []], [[], [], [], []]] for source in (0, 1)]
    for pair in (model, wider(global_pool='max')), (network(aggregation='scalar'), wider()), (
            network(pruned_connections=pruned[0]), wider(pruned_connections=pruned[1])):
        with pytest.raises(ValueError, match='wider: expected .* widths alone; a stride, a dilation, the pooling, or'):
            widen_layers(*pair)
    with pytest.raises(ValueError, match='expected two networks for training, got one that was reparameterised'):
        widen_layers(*map(reparameterize_model, (model.eval(), wider().eval())))
    with pytest.raises(ValueError, match="expected a global pooling that gives each channel once, got 'catavgmax'"):
        widen_layers(model, wider(global_pool='catavgmax'))
    for pair in (model, torch.nn.Identity()), (torch.nn.Identity(), wider()):
        with pytest.raises(ValueError, match='expected two DelugeNets, got a'):
            widen_layers(*pair)


def test_a_wider_network_prepares_images_as_the_trained_one():
    model = timm.create_model('delugenet146', depths=(2, 2), widths=(2, 4), num_classes=10, pretrained_cfg_overlay=dict(
        mean=(0.1, 0.2, 0.3), label_names=tuple('abcdefghij')))
    grown = widen_layers(model, timm.create_model('wide_delugenet146', depths=(2, 2), widths=(4, 6), num_classes=10))
    assert timm.data.resolve_data_config(model=grown)['mean'] == (0.1, 0.2, 0.3)
    assert grown.pretrained_cfg['label_names'] == tuple('abcdefghij')
    assert grown.default_cfg['architecture'] == 'wide_delugenet146'
    assert not grown.pretrained_cfg.keys() & {'tag', 'file'}
