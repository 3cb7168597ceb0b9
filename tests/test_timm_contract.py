"""What timm's users and tools may expect of a model."""
import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2

from timm_deluge.aggregation import AGGREGATIONS
from timm_deluge.delugenet import DelugeNet
from timm_deluge.paper import PUBLISHED

NAMES = timm.list_models(module='delugenet')


def tiny(stem_type='cifar', **kwargs) -> DelugeNet:
    torch.manual_seed(0)
    depths = kwargs.pop('depths', (3, 3) if stem_type == 'cifar' else (2, 2, 2, 2))
    return DelugeNet(depths, [4 * 2 ** i for i in range(len(depths))], num_classes=5, stem_type=stem_type, **kwargs)


def test_all_networks_of_the_paper_are_registered():
    assert len(PUBLISHED) == 12 and PUBLISHED.keys() <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_every_model_takes_every_common_argument(name):
    model = timm.create_model(name, num_classes=37, in_chans=1, drop_rate=0.2, drop_path_rate=0.1, output_stride=16,
                              global_pool='avgmax', device='meta', dtype=torch.bfloat16)
    assert model(torch.empty(2, 1, 64, 64, device='meta', dtype=torch.bfloat16)).shape == (2, 37)


def test_unknown_options_say_what_is_allowed():
    choices = "'cross_layer', 'scalar', 'last', 'residual'"
    with pytest.raises(ValueError, match=f"aggregation='sum': must be one of {choices}"):
        timm.create_model('delugenet146', aggregation='sum')
    with pytest.raises(ValueError, match='output_stride=4: must be one of 8, 16, 32'):
        timm.create_model('delugenet122', output_stride=4)
    with pytest.raises(ValueError, match='same number of blocks'):
        DelugeNet((1, 2), (4,))
    with pytest.raises(ValueError, match='at least one block'):
        DelugeNet((), ())
    with pytest.raises(ValueError, match=r'depths \(0, 2\): expected at least one layer where it gives h_0'):
        tiny(depths=(0, 2))


def test_aggregation_is_reached_through_create_model():
    residual = timm.create_model('delugenet146', aggregation='residual', device='meta')
    baseline = timm.create_model('resnetlike146_3x3', device='meta')
    assert residual.state_dict().keys() == baseline.state_dict().keys()
    cross_layer = timm.create_model('delugenet146', device='meta')
    assert [n for n, _ in residual.named_parameters()] == [
        n for n, _ in cross_layer.named_parameters() if 'cross_layers' not in n]


@pytest.mark.parametrize('options', [{}, {'aggregation': 'residual', 'transition_type': '1x1'}], ids=str)
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride_gives_the_same_features_more_densely(output_stride, options):
    model, dense = (tiny('imagenet', output_stride=stride, **options).eval() for stride in (32, output_stride))
    dense.load_state_dict(model.state_dict())
    x, step = torch.randn(1, 3, 64, 96), 32 // output_stride
    features = dense.forward_features(x)
    assert features.shape[-2:] == (64 // output_stride, 96 // output_stride)
    torch.testing.assert_close(features[..., ::step, ::step], model.forward_features(x))
    assert max(f['reduction'] for f in dense.feature_info) == output_stride


def test_drop_rates_reach_their_places():
    model = tiny(drop_path_rate=0.5, drop_rate=0.3)
    rates = [getattr(drop_path, 'drop_prob', 0.) for stage in model.stages for drop_path in stage.drop_paths]
    assert rates == sorted(rates) and (rates[0], rates[-1]) == (0, pytest.approx(0.5)) and len(set(rates)) > 2
    assert model.head.drop.p == 0.3


@pytest.mark.parametrize('name', ['delugenet92', 'delugenet146', 'resnetlike146_1x1'])
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
def test_features_only(name, feature_cls):
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(1, 2)).eval()
    x = torch.randn(1, 3, 64, 64)
    features = model(x)
    features = list(features.values()) if isinstance(features, dict) else features
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [64 // f.shape[-1] for f in features] == model.feature_info.reduction()


def test_forward_intermediates_options():
    model = tiny('imagenet').eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    final, every = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    assert [64 // f.shape[-1] for f in every] == [2, 4, 8, 16, 32] == [f['reduction'] for f in model.feature_info]
    torch.testing.assert_close(model.norm(every[-1]), features)
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last[0], features)
    two = model.forward_intermediates(x, indices=[2, 4], norm=True, intermediates_only=True)
    torch.testing.assert_close(two, [every[2], features])
    final, _ = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    torch.testing.assert_close(final, every[2])
    calls = []
    for stage in model.stages:
        stage.register_forward_hook(lambda stage, *_: calls.append(stage))
    early = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [every[0], every[2]])
    assert calls == list(model.stages[:2])
    with pytest.raises(AssertionError, match='NCHW'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('stem_type, indices', [('imagenet', [0]), ('imagenet', [1, 3]), ('cifar', [0]), ('cifar', 1)])
def test_prune_intermediate_layers_leaves_nothing_unused(stem_type, indices):
    model = tiny(stem_type).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    taken = model.prune_intermediate_layers(indices, prune_norm=True)
    features = model.forward_intermediates(x, indices=taken, intermediates_only=True)
    torch.testing.assert_close(features, expected)
    model.train()
    sum(f.sum() for f in model.forward_intermediates(x, indices=taken, intermediates_only=True)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert model(x).shape[1] == model.num_features == expected[-1].shape[1]


def test_prune_intermediate_layers_can_keep_the_classifier():
    model = tiny('imagenet').eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model.prune_intermediate_layers([0, len(model.stages)], prune_head=False)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize('aggregation', [*AGGREGATIONS, 'residual'])
@pytest.mark.parametrize('drop_path_rate', [0., 0.3])
def test_torchscript(aggregation, drop_path_rate):
    model = tiny(aggregation=aggregation, drop_path_rate=drop_path_rate).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    getter = FeatureGetterNet(model, out_indices=(0, 1, 2)).eval()
    torch.testing.assert_close(torch.jit.script(getter)(x), getter(x))


def test_export():
    model = tiny().eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize('aggregation', [*AGGREGATIONS, 'residual'])
def test_grad_checkpointing_gives_the_same_gradients(aggregation):
    model = tiny(aggregation=aggregation).train()
    x = torch.randn(4, 3, 16, 16)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing is enable for stage in model.stages)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('aggregation', [*AGGREGATIONS, 'residual'])
def test_channels_last_gives_the_same_and_stays_channels_last(aggregation):
    model = tiny(aggregation=aggregation).eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected)
    features = last.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_reset_classifier_keeps_the_head():
    model = tiny()
    head, model.head.drop.p = model.head, 0.5
    model.reset_classifier(7)
    assert model.head is head and model.head.drop.p == 0.5


@pytest.mark.parametrize('aggregation', [*AGGREGATIONS, 'residual'])
def test_weights_of_a_network_that_was_made_without_memory_are_initialised(aggregation):
    model = tiny(aggregation=aggregation, channel_masks=aggregation == 'cross_layer')
    empty = tiny(aggregation=aggregation, channel_masks=aggregation == 'cross_layer').to('meta').to_empty(device='cpu')
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.zero_()
    empty.init_weights()
    for name, tensor in empty.state_dict().items():
        expected = model.state_dict()[name]
        if 'conv' in name or name == 'head.fc.weight':
            assert tensor.std() == pytest.approx(expected.std(), rel=0.5), name
        else:
            assert torch.equal(tensor, expected), name


def test_a_frozen_network_comes_back_from_its_folder(tmp_path):
    model = timm.create_model('delugenet146', pretrained=True).eval()
    timm.utils.freeze(model)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)


def test_reset_classifier_keeps_or_replaces_pooling():
    model = tiny(global_pool='max')
    x = torch.randn(2, 3, 16, 16)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.head.global_pool.pool_type == 'max'
    model.reset_classifier(0, 'catavgmax')
    assert model(x).shape == (2, 2 * model.num_features) == (2, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, model.num_features, 8, 8)
    assert model.get_classifier() is model.head.fc


def test_modules_are_grouped_with_their_layers():
    model = timm.create_model('delugenet146')
    groups = timm.models.group_modules(model, model.group_matcher(), reverse=True)
    for others, name in ((('transition.conv', 'norm'), 'transition.norm'),
                         (('norms.3', 'cross_layers.3', 'layers.3.conv1'), 'layers.3.norm1')):
        assert {groups[f'stages.1.{other}'] for other in others} == {groups[f'stages.1.{name}']}
    assert groups['stages.1.norms.3'] < groups['stages.1.norms.4'] < groups['stages.2.norm'] < groups['head.fc']
    coarse = timm.models.group_modules(model, model.group_matcher(coarse=True), reverse=True)
    of_stages = [{number for name, number in coarse.items() if name.startswith(f'stages.{i}.')} for i in range(3)]
    numbers = [coarse['stem.conv'], *(number for (number,) in of_stages), coarse['head.fc']]
    assert numbers == sorted(set(numbers))


def test_layer_decay_orders_stem_to_head():
    model = timm.create_model('delugenet146')
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, layer_decay=0.9)
    scale = {p: g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    by_name = {n: scale[p] for n, p in model.named_parameters()}
    order = ['stem.conv.weight', 'stages.0.transition.conv1.weight', 'stages.0.layers.0.conv1.weight',
             'stages.0.layers.1.conv1.weight', 'stages.1.transition.conv.weight', 'stages.2.layers.23.conv3.weight',
             'head.fc.weight']
    scales = [by_name[n] for n in order]
    assert scales == sorted(scales) and len(set(scales)) == len(scales) and scales[-1] == 1
    assert by_name['stages.1.layers.3.conv1.weight'] == by_name['stages.1.cross_layers.3.weight']
