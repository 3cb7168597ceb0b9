"""A pruned network is the one without what was removed, and as useful as before; nothing else is removed."""
import copy
import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from test_cli import invoke
from test_implementations import FAST, LAYOUTS, assert_same, block
from test_reparameterize import assert_same_function, away_from_start, run_onnx
from timm.utils import reparameterize_model

from timm_deluge import connection_scores, prune_connections, pruned_connections, remove_layers, set_implementation
from timm_deluge.aggregation import AGGREGATIONS, CrossLayerDepthwiseConv2d
from timm_deluge.connectivity import block_connectivity, read_state_dict
from timm_deluge.delugenet import DelugeNet
from timm_deluge.prune import Connection, save_pruned
from timm_deluge.report import create_report

DEPTHS = (4, 4)  # the first composite layer gives h_0: 2 + 3 + 4 and 2 + 3 + 4 + 5 connections
NUM_CONNECTIONS, NUM_CONSUMERS = 23, 7


def network(**kwargs) -> DelugeNet:
    torch.manual_seed(0)
    return away_from_start(DelugeNet(DEPTHS, (4, 8), num_classes=5, stem_type='cifar', **kwargs))


def with_zeros(model: DelugeNet, pruned: DelugeNet) -> DelugeNet:
    """The same as a pruned network, with all connections there, and zeros for those that are gone."""
    model = copy.deepcopy(model)
    convs = dict(pruned.named_modules())
    with torch.no_grad():
        for name, conv in model.named_modules():
            if isinstance(conv, CrossLayerDepthwiseConv2d):
                for parameter, value in zip((conv.weight, conv.bias), convs[name].kernel()):
                    parameter.copy_(value)
    return model


def gone(model) -> set[Connection]:
    return {
        Connection(f'stages.{b}.cross_layers.{k}', source)
        for b, block in enumerate(pruned_connections(model)) for k, sources in enumerate(block) for source in sources}


@pytest.mark.parametrize('fraction, number', [(0, 0), (0.04, 0), (0.05, 1), (0.5, 11), (15 / 23, 15), (0.69, 15)])
@pytest.mark.parametrize('by', ['norm', 'random'])
def test_removes_the_weakest_and_no_more_than_asked(fraction, number, by):
    model = network()
    before = copy.deepcopy(model.state_dict())
    scores = connection_scores(model, by)
    pruned = prune_connections(model, fraction, by)
    removed = gone(pruned)
    assert len(scores) == NUM_CONNECTIONS and len(removed) == number
    consumers = {connection.consumer for connection in scores}
    strongest = {max((c for c in scores if c.consumer == name), key=scores.get) for name in consumers}
    assert not removed & strongest
    others = scores.keys() - removed - strongest
    assert not removed or not others or max(scores[c] for c in removed) <= min(scores[c] for c in others)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    total = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in pruned.parameters())
    assert total == sum(2 * model.get_submodule(c.consumer).channels for c in removed)


def test_a_removed_connection_is_replaced_by_its_mean():
    model = network()
    pruned = prune_connections(model, 0.5)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for consumer, source in gone(pruned):
            expected.get_submodule(consumer).weight[:, 0, source] = 0
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pruned(x), expected(x))


def test_scores_by_hand():
    model = network()
    scores = connection_scores(model)
    conv = model.stages[1].cross_layers[2]
    for source in range(4):
        share = conv.weight[:, 0, source].norm() / conv.weight.norm()
        assert scores['stages.1.cross_layers.2', source] == pytest.approx(share.item(), rel=1e-5)
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    batches = [(x.double(), y) for x, y in batches]
    scores = connection_scores(model.double(), 'taylor', batches)
    with torch.inference_mode():
        assert connection_scores(model, 'taylor', batches) == scores

    def loss(network):
        return sum(F.cross_entropy(network(x), y, reduction='sum').item() for x, y in batches)

    for connection in (('stages.0.cross_layers.1', 2), ('stages.1.cross_layers.3', 0)):
        nudged, epsilon = copy.deepcopy(model), 1e-6
        with torch.no_grad():
            nudged.get_submodule(connection[0]).weight[:, 0, connection[1]] *= 1 - epsilon
        assert scores[connection] == pytest.approx(abs(loss(nudged) - loss(model)) / epsilon, rel=1e-3)
    assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('implementation', FAST)
@pytest.mark.parametrize('layout', ['channels_last', 'contiguous'])
@pytest.mark.parametrize('training', [True, False])
def test_trains_as_the_reference(implementation, layout, training):
    pruned = [[0], [1], [], [0, 2, 3], [1, 2, 5], [0]]
    module = block(6, pruned_connections=pruned).train(training)
    assert [len(conv.sources) for conv in module.cross_layers] == [1, 2, 4, 2, 3, 6]
    assert_same(module, LAYOUTS[layout](torch.randn(4, 6, 5, 5)), implementation, 2e-4)


def test_trains_as_the_network_with_zeros():
    model = network()
    pruned = prune_connections(model, 0.3, 'random').train()
    full = with_zeros(model, pruned).train()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(pruned(x), full(x))
    for network_ in (pruned, full):
        network_(x).square().mean().backward()
    for name, parameter in pruned.named_parameters():
        expected = full.get_parameter(name).grad
        if 'cross_layers' in name:
            expected = expected[:, :, pruned.get_submodule(name.rpartition('.')[0]).sources]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('implementation', ['reference', *FAST])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('fraction, by', [(0.3, 'random'), (0.6, 'norm'), (0.69, 'random')])
def test_inference_is_the_same_and_leaves_dead_layers_out(implementation, memory_format, fraction, by):
    set_implementation(implementation)
    model = network()
    pruned = prune_connections(model, fraction, by)
    fused = reparameterize_model(pruned).to(memory_format=memory_format)
    x = torch.randn(3, 3, 16, 16).contiguous(memory_format=memory_format)
    assert_same_function(fused, pruned, x)
    assert_same_function(fused, with_zeros(model, pruned), x)
    for stage, whole in zip(fused.stages, pruned.stages):
        used, needed = set(whole.cross_layers[-1].sources), 0
        for i in reversed(range(1, len(whole.layers) + 1)):
            if i in used:
                needed += 1
                used.update(whole.cross_layers[i - 2].sources if i > 1 else [0])
        assert len(stage.layers) == needed


def test_a_layer_that_nothing_is_connected_to_is_left_out():
    without_h_2 = [[[], [2], [2]], [[], [2], [2], [2]]]
    model = DelugeNet(DEPTHS, (4, 8), 5, stem_type='cifar', pruned_connections=without_h_2).eval()
    fused = reparameterize_model(model)
    assert [len(stage.layers) for stage in fused.stages] == [2, 3]
    assert_same_function(fused, model, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_a_block_may_lose_all_its_layers(memory_format):
    only_h_0 = [[[1], [1, 2], [1, 2, 3]], [[], [], [], []]]
    model = DelugeNet(DEPTHS, (4, 8), 5, stem_type='cifar', pruned_connections=only_h_0).eval()
    fused = reparameterize_model(model).to(memory_format=memory_format)
    assert [len(stage.layers) for stage in fused.stages] == [0, 4]
    assert_same_function(fused, model, torch.randn(2, 3, 16, 16).contiguous(memory_format=memory_format))


def test_pruned_again_and_again():
    model = network()
    once = prune_connections(model, 0.2)
    twice = prune_connections(once, 0.6)
    assert gone(once) < gone(twice) and len(gone(twice)) == 13
    with pytest.raises(ValueError, match='fraction=0.3: 13 of 23 connections are gone already'):
        prune_connections(twice, 0.3)


def masks(model) -> dict[str, torch.Tensor]:
    """What is left of all weights, ``[C, l]`` of each convolution."""
    found = {}
    for name, conv in model.named_modules():
        if isinstance(conv, CrossLayerDepthwiseConv2d):
            found[name] = torch.zeros(conv.channels, conv.num_layers, dtype=torch.bool)
            found[name][:, conv.sources] = conv.mask[:, 0, :, 0]
    return found


@pytest.mark.parametrize('by', ['norm', 'taylor', 'random'])
@pytest.mark.parametrize('fraction', [0, 0.3, 0.6])
def test_single_weights_go(by, fraction):
    model = network().eval()
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))] if by == 'taylor' else None
    pruned = prune_connections(model, fraction, by, batches, unit='channel')
    total = sum(conv.weight.numel() for conv in model.modules() if isinstance(conv, CrossLayerDepthwiseConv2d))
    left = masks(pruned)
    assert sum(int(mask.sum()) for mask in left.values()) == total - int(fraction * total)
    assert all(mask.any(1).all() for mask in left.values())  # of each channel
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in left.items():
            expected.get_submodule(name).weight[:, 0, :, 0] *= mask
    assert_same_function(pruned, expected, torch.randn(2, 3, 16, 16))
    assert_same_function(reparameterize_model(pruned), expected, torch.randn(2, 3, 16, 16))


def test_the_weakest_weights_go_by_their_share_of_their_channel():
    model = network()
    left = masks(prune_connections(model, 0.4, unit='channel'))
    shares = {name: model.get_submodule(name).weight[:, 0, :, 0].detach().abs() for name in left}
    shares = {name: share / share.norm(dim=1, keepdim=True) for name, share in shares.items()}
    strongest = {name: share == share.amax(1, keepdim=True) for name, share in shares.items()}
    assert all(mask[strongest[name]].all() for name, mask in left.items())
    gone = torch.cat([shares[name][~mask] for name, mask in left.items()])
    others = torch.cat([shares[name][mask & ~strongest[name]] for name, mask in left.items()])
    assert gone.max() <= others.min()


def test_the_weakest_weights_go_by_their_estimate():
    model = network().double()
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 16, 16).double(), torch.arange(4)
    left = masks(prune_connections(model, 0.3, 'taylor', [(x, y)], unit='channel'))
    weights = [model.get_submodule(name).weight for name in left]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y, reduction='sum'), weights)
    estimates = {name: (w * g).detach().abs()[:, 0, :, 0] for name, w, g in zip(left, weights, grads)}
    gone = torch.cat([estimates[name][~mask] for name, mask in left.items()])
    largest = {name: estimate == estimate.amax(1, keepdim=True) for name, estimate in estimates.items()}
    others = torch.cat([estimates[name][mask & ~largest[name]] for name, mask in left.items()])
    assert gone.max() <= others.min() * (1 + 1e-6)


def test_a_connection_without_weights_is_gone():
    model = network()
    with torch.no_grad():
        model.stages[1].cross_layers[2].weight[:, :, 1] = 0
    pruned = prune_connections(model, 0.1, unit='channel')
    assert pruned_connections(pruned)[1][2] == [1]
    assert_same_function(pruned.eval(), prune_connections(pruned, 0.1, unit='channel').eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize('implementation', ['reference', *FAST])
def test_what_is_gone_stays_gone_in_training(implementation):
    set_implementation(implementation)
    torch.manual_seed(0)
    pruned = prune_connections(network(), 0.5, 'random', unit='channel').train()
    left = masks(pruned)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        pruned(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    for name, mask in left.items():
        conv = pruned.get_submodule(name)
        weight = conv.weight.new_zeros(mask.shape)
        weight[:, conv.sources] = conv.weight.detach()[:, 0, :, 0]
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
    assert_same(
        pruned.stages[1], torch.randn(4, 8, 8, 8), implementation, 1e-3, fused=implementation != 'reference')


def test_single_weights_go_after_others_and_before_layers(tmp_path):
    torch.manual_seed(0)
    model = away_from_start(timm.create_model('delugenet146', num_classes=5))
    pruned = prune_connections(prune_connections(model, 0.2, 'random'), 0.5, 'random', unit='channel')
    with pytest.raises(ValueError, match='fraction=0.3: .* weights are gone already'):
        prune_connections(pruned, 0.3, unit='channel')
    shallower = remove_layers(prune_connections(pruned, 0.3), [[2], [0, 15], [7]]).eval()
    save_pruned(shallower, tmp_path / 'pruned')
    loaded = timm.create_model(f'local-dir:{tmp_path / "pruned"}', pretrained=True).eval()
    x = torch.randn(1, 3, 16, 16)
    assert_same_function(loaded, shallower, x)
    assert_same_function(torch.jit.script(loaded), shallower, x)
    assert masks(loaded).keys() == masks(shallower).keys()
    assert all(torch.equal(mask, masks(loaded)[name]) for name, mask in masks(shallower).items())


@pytest.mark.parametrize('reparameterized', [False, True])
def test_exports_to_onnx(tmp_path, reparameterized):
    model, x = prune_connections(network(), 0.5), torch.randn(2, 3, 16, 16)
    y = run_onnx(reparameterize_model(model) if reparameterized else model, x, tmp_path / 'model.onnx')
    assert_same_function(lambda _: y, model, x)


def test_its_folder_is_what_a_repository_of_the_hub_holds(tmp_path, call, server):
    torch.manual_seed(0)
    pruned = prune_connections(away_from_start(timm.create_model('delugenet146')).eval(), 0.5, 'random')
    save_pruned(pruned, tmp_path / 'pruned')
    upload = (f"from huggingface_hub.cli.hf import main\n"
              f"sys.argv = ['hf', 'upload', 'somebody/pruned', {str(tmp_path / 'pruned')!r}]\nmain()")
    result = call(upload)
    assert result.returncode == 0, result.stderr
    assert server.repos['somebody/pruned'].keys() == {'config.json', 'model.safetensors'}
    loaded = call("model = timm.create_model('hf-hub:somebody/pruned', pretrained=True)\n"
                  "print(timm_deluge.pruned_connections(model), float(model.stages[1].cross_layers[2].weight.sum()))")
    assert loaded.returncode == 0, loaded.stderr
    total = float(pruned.stages[1].cross_layers[2].weight.detach().sum())
    assert loaded.stdout.strip() == f'{pruned_connections(pruned)} {total}'


def test_scripts_exports_and_compiles():
    pruned, x = prune_connections(network(), 0.5), torch.randn(2, 3, 16, 16)
    for model in (pruned, reparameterize_model(pruned)):
        scripted = torch.jit.script(model)
        exported = torch.export.export(model, (x,)).module()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        for other in (scripted, exported, compiled):
            assert_same_function(other, pruned, x)


def hands_on(model: DelugeNet, layers) -> DelugeNet:
    """The same as without some layers, with all there: nobody listens to these, and what they took is handed on."""
    model = copy.deepcopy(model)
    for stage, removed in zip(model.stages, layers):
        with torch.no_grad():
            for conv in stage.cross_layers:
                for source in [i + 1 for i in removed if i + 1 in conv.sources]:
                    conv.weight[:, :, conv.sources.index(source)] = 0
            for i in sorted(removed):
                conv = stage.cross_layers[i]
                conv.weight.zero_()
                conv.bias.zero_()
                if i == 0:  # h_0, which is normalised by its running statistics
                    conv.weight[:, 0, 0, 0] = (stage.norm.running_var + stage.norm.eps).sqrt()
                    conv.bias[:, 0, 0, 0] = stage.norm.running_mean
                else:
                    conv.weight[:, :, :-1] = stage.cross_layers[i - 1].weight
                    conv.bias[:, :, :-1] = stage.cross_layers[i - 1].bias
    return model


@pytest.mark.parametrize('layers', [[[], []], [[1], [3]], [[0], [0, 2]], [[0, 1, 2], [1, 2]], [[2], []]])
def test_without_a_layer_what_it_took_is_handed_on(layers):
    model = network().eval()
    x = torch.randn(2, 3, 16, 16)
    shallower = remove_layers(model, layers)
    assert_same_function(shallower, hands_on(model, layers), x)
    assert_same_function(model, network().eval(), x)
    depths = [depth - len(removed) for depth, removed in zip(DEPTHS, layers)]
    variant = DelugeNet(depths, (4, 8), num_classes=5, stem_type='cifar').eval()
    variant.load_state_dict(shallower.state_dict())
    assert_same_function(shallower, variant, x)
    loss = F.cross_entropy(shallower.train()(x), torch.tensor([0, 1]))
    assert all(grad is not None for grad in torch.autograd.grad(loss, list(shallower.parameters())))


@pytest.mark.parametrize('aggregation', AGGREGATIONS)
def test_layers_go_from_networks_of_every_aggregation(aggregation):
    shallower = remove_layers(network(aggregation=aggregation), [[1], [0, 3]]).eval()
    variant = DelugeNet((3, 2), (4, 8), num_classes=5, stem_type='cifar', aggregation=aggregation).eval()
    variant.load_state_dict(shallower.state_dict())
    assert_same_function(shallower, variant, torch.randn(2, 3, 16, 16))


def test_layers_go_from_a_pruned_network(tmp_path):
    torch.manual_seed(0)
    pruned = prune_connections(away_from_start(timm.create_model('delugenet146', num_classes=5)), 0.4, 'random')
    layers = [[2], [0, 15], [7, 8, 9]]
    shallower = remove_layers(pruned, layers).eval()
    expected = [
        [[numbers.index(i) for i in sources if i in numbers] for k, sources in enumerate(block) if k not in removed]
        for block, removed in zip(pruned_connections(pruned), layers)
        for numbers in [[0, *(k + 1 for k in range(len(block)) if k not in removed)]]]
    assert pruned_connections(shallower) == expected
    save_pruned(shallower, tmp_path / 'shallower')
    assert (tmp_path / 'shallower' / 'model.safetensors').stat().st_mode & 0o777 == 0o644
    again = timm.create_model(f'local-dir:{tmp_path / "shallower"}', pretrained=True).eval()
    assert [len(block.layers) for block in again.stages] == [6, 14, 21]
    assert_same_function(again, shallower, torch.randn(2, 3, 32, 32))


def test_layers_that_cannot_go_are_named():
    model = network()
    with pytest.raises(ValueError, match='expected one list for each of 2 blocks, got 1'):
        remove_layers(model, [[1]])
    with pytest.raises(ValueError, match=r'stages.1.layers has the numbers 0 to 3, got \[4\]'):
        remove_layers(model, [[], [4]])
    with pytest.raises(ValueError, match='nor of residual sums, got a DelugeNet without Deluge blocks'):
        remove_layers(network(aggregation='residual'), [[1]])
    only_first = DelugeNet(
        DEPTHS, (4, 8), num_classes=5, stem_type='cifar', pruned_connections=[[[], [], []], [[], [0, 2], [], []]])
    with pytest.raises(ValueError, match='stages.1.cross_layers.1 would lose its last source'):
        remove_layers(only_first, [[], [0]])


def test_what_is_wrong_is_said():
    model = network()
    for fraction in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f'fraction={fraction}: must be from 0 to 1'):
            prune_connections(model, fraction)
    message = 'of 23 connections at most 16 can go, since each cross-layer convolution keeps one'
    with pytest.raises(ValueError, match=message):
        prune_connections(model, 0.75)
    with pytest.raises(ValueError, match="by='size': must be one of 'norm', 'taylor', 'random'"):
        prune_connections(model, 0.5, 'size')
    with pytest.raises(ValueError, match="unit='layer': must be one of 'connection', 'channel'"):
        prune_connections(model, 0.5, unit='layer')
    with pytest.raises(ValueError, match='of 296 weights at most 208 can go, since each channel keeps one'):
        prune_connections(model, 0.9, unit='channel')
    with pytest.raises(ValueError, match="with aggregation='last' there are no connections across layers"):
        prune_connections(network(aggregation='last'), 0.)
    with pytest.raises(ValueError, match='all channels of a connection have the same weight'):
        prune_connections(network(aggregation='scalar'), 0.5, unit='channel')
    with pytest.raises(ValueError, match="only aggregation='cross_layer' takes them"):
        network(aggregation='last', channel_masks=True)
    for batches in (None, iter([])):
        with pytest.raises(ValueError, match='needs batches'):
            prune_connections(model, 0.5, 'taylor', batches)
    for other in (network(aggregation='residual'), reparameterize_model(model)):
        with pytest.raises(ValueError, match='there are no cross-layer convolutions'):
            prune_connections(other, 0.5)


@pytest.mark.parametrize('connections, kwargs, message', [
    ([[[]] * 3], {}, r'expected lists for 3 \+ 4 cross-layer convolutions, got 3'),
    ([[[], [], []], [[], [], [], [5]]], {}, r'stages.1.cross_layers.3 has the sources 0 to 4, got \[5\]'),
    ([[[0, 1], [], []], [[]] * 4], {}, 'stages.0.cross_layers.0 would lose its last source'),
    ([[[]] * 3, [[]] * 4], {'aggregation': 'residual'}, "aggregation='residual' has no connections"),
    ([[[]] * 3, [[]] * 4], {'aggregation': 'last'}, "aggregation='last' has no connections"),
])
def test_configurations_are_checked(connections, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DelugeNet(DEPTHS, (4, 8), 5, stem_type='cifar', pruned_connections=connections, **kwargs)


@pytest.mark.parametrize('aggregation', [name for name in AGGREGATIONS if name != 'last'])
def test_saved_and_made_again(tmp_path, aggregation):
    torch.manual_seed(0)
    kwargs = dict(num_classes=5, in_chans=1, aggregation=aggregation)
    pruned = prune_connections(away_from_start(timm.create_model('delugenet146', **kwargs)).eval(), 0.5, 'random')
    like = timm.create_model('delugenet146', pruned_connections=pruned_connections(pruned), **kwargs).eval()
    like.load_state_dict(pruned.state_dict())
    save_pruned(pruned, tmp_path / 'pruned')
    loaded = timm.create_model(f'local-dir:{tmp_path / "pruned"}', pretrained=True, in_chans=1).eval()
    x = torch.randn(1, 1, 16, 16)
    for other in (like, loaded):
        torch.testing.assert_close(other(x), pruned(x))


def test_a_network_of_torch_hub_is_saved_with_its_options(tmp_path):
    repository = str(Path(__file__).resolve().parent.parent)
    model = torch.hub.load(repository, 'delugenet92', source='local', num_classes=5, output_stride=8)
    shallower = remove_layers(model, [[1], [], [], []]).eval()
    save_pruned(shallower, tmp_path / 'shallower')
    loaded = timm.create_model(f'local-dir:{tmp_path / "shallower"}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x), shallower(x))


def test_a_shallower_network_of_the_last_layers_is_saved_too(tmp_path):
    model = timm.create_model('delugenet146', num_classes=5, aggregation='last')
    shallower = remove_layers(model, [[1], [], []]).eval()
    save_pruned(shallower, tmp_path / 'shallower')
    loaded = timm.create_model(f'local-dir:{tmp_path / "shallower"}', pretrained=True).eval()
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(loaded(x), shallower(x))


def test_saved_from_channels_last(tmp_path):
    model = timm.create_model('delugenet146', num_classes=5).to(memory_format=torch.channels_last)
    save_pruned(model, tmp_path / 'saved')
    weight = model.stem.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).stem.conv.weight, weight)


def test_a_seed_decides_what_goes_at_random():
    first, again, other = (
        pruned_connections(prune_connections(network(), 0.5, 'random', seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize('implementation', ['auto', 'reference'])
def test_scores_of_frozen_and_pruned_networks(implementation):
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    set_implementation(implementation)
    pruned = prune_connections(network(), 0.65, 'random', seed=3).train()
    norm = next(module for module in pruned.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    expected = connection_scores(pruned, 'taylor', batches)
    assert pruned.training and not norm.training
    pruned.requires_grad_(False)
    with torch.no_grad():
        assert connection_scores(pruned, 'taylor', batches) == pytest.approx(expected)
    assert not any(parameter.requires_grad for parameter in pruned.parameters())


def test_command(scratch_weights, tmp_path):
    result = invoke('prune', 'delugenet146', '--fraction', '0.7', '--output', tmp_path / 'pruned')
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed['removed'] == 357 == 511 - printed['connections']
    assert printed['layers'] == 47 > printed['layers in inference'] > 0
    model = timm.create_model(printed['model'], pretrained=True).eval()
    expected = prune_connections(timm.create_model('delugenet146', pretrained=True), 0.7).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), expected(x))
    report, kept = create_report(printed['model']), 0
    for channels, size, stage in zip((64, 128, 256), (32, 16, 8), reparameterize_model(model).stages):
        sums = [*stage.cross_layers[1:], stage.last_cross_layer]  # the first is x_1 = h_0
        kept += channels * size ** 2 * sum(len(of_layers.sources) for of_layers in sums)
    assert report.cross_layer_macs == kept
    assert report.macs < create_report('delugenet146').macs
    norms = block_connectivity(read_state_dict(printed['model']))[0].norms
    assert [[norm == 0 for norm in of_sum] for of_sum in norms] == [
        [i in sources for i in range(k + 2)] for k, sources in enumerate(pruned_connections(model)[0])]
    channels = invoke(
        'prune', 'delugenet146', '--fraction', '0.5', '--unit', 'channel', '--output', tmp_path / 'channels')
    assert channels.exit_code == 0, channels.output
    printed = json.loads(channels.stdout)
    assert printed['weights'] == printed['removed weights']
    again = invoke('prune', 'delugenet146', '--fraction', '0.5', '--output', tmp_path / 'pruned')
    assert again.exit_code == 2 and 'exists' in again.stderr


def test_command_has_no_fraction_of_its_own(tmp_path):
    result = invoke('prune', 'delugenet146', '--output', tmp_path / 'pruned')
    assert result.exit_code == 2 and '--fraction' in result.stderr
    assert not list(tmp_path.iterdir())


def test_command_with_taylor_needs_images(scratch_weights, tmp_path, monkeypatch):
    for arguments in (['--by', 'taylor'], ['--data-dir', tmp_path]):
        result = invoke('prune', 'delugenet146', '--fraction', '0.1', '--output', tmp_path / 'pruned', *arguments)
        assert result.exit_code == 2 and 'need each other' in result.stderr
    by_taylor = [
        'prune', 'delugenet146', '--fraction', '0.1', '--num-images', '3', '--output', tmp_path / 'new',
        '--by', 'taylor', '--data-dir']
    result = invoke(*by_taylor, tmp_path / 'no')
    assert result.exit_code == 2 and 'no such folder' in result.stderr
    names = timm.create_model('delugenet146', pretrained=True).pretrained_cfg['label_names']
    for name in names:
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32), (len(name), 80, 200)).save(tmp_path / 'train' / name / 'image.png')

    def watched(model, fraction, by, batches, *options):
        batches = list(batches)
        assert (sum(len(images) for images, _ in batches), *options) == (3, 5, 'connection')
        return prune_connections(model, fraction, by, batches, *options)

    monkeypatch.setattr('timm_deluge.cli.prune_connections', watched)
    result = invoke(*by_taylor, tmp_path / 'train', '--seed', '5')
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)['removed'] == 51


def test_a_reparameterised_network_is_not_saved(tmp_path):
    model = reparameterize_model(timm.create_model('delugenet146', depths=DEPTHS, widths=(4, 8)).eval())
    with pytest.raises(ValueError, match='this is no DelugeNet, or it was reparameterised'):
        save_pruned(model, str(tmp_path / 'pruned'))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    model = prune_connections(timm.create_model('delugenet146', depths=DEPTHS, widths=(4, 8)), 0.5)
    monkeypatch.setattr('timm.models._hub.save_config_for_hf', interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(model, tmp_path / 'pruned')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('target', ['here', 'nowhere'])
def test_a_pruned_network_is_not_saved_over_anything(target, tmp_path):
    (tmp_path / 'here').mkdir()
    (tmp_path / 'pruned').symlink_to(tmp_path / target)
    with pytest.raises(FileExistsError, match='pruned exists: name a folder that does not'):
        save_pruned(timm.create_model('delugenet146'), tmp_path / 'pruned')
    assert {path.name for path in tmp_path.iterdir()} == {'here', 'pruned'}
