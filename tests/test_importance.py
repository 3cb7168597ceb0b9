"""Losses that are measured by reusing are those of whole passes."""
import copy

import pytest
import torch
import torch.nn.functional as F
from test_prune import network

from timm_deluge import connection_scores, prune_connections, remove_layers
from timm_deluge.importance import layer_removal_losses, removal_losses


@pytest.mark.parametrize('keep_mean', [True, False])
@pytest.mark.parametrize('aggregation', ['cross_layer', 'scalar'])
def test_each_loss_is_that_of_a_whole_pass(keep_mean, aggregation):
    model = network(aggregation=aggregation)
    model = prune_connections(model, 0.2, 'random').double()
    torch.manual_seed(0)
    images, targets = torch.randn(6, 3, 16, 16).double(), torch.arange(6) % 5
    before = copy.deepcopy(model.state_dict())
    loss, losses = removal_losses(model, images, targets, keep_mean)
    assert losses.keys() == connection_scores(model).keys()
    for connection, actual in losses.items():
        without = copy.deepcopy(model)
        conv = without.get_submodule(connection.consumer)
        row = conv.sources.index(connection.source)
        with torch.no_grad():
            conv.weight[:, :, row] = 0
            if not keep_mean:
                conv.bias[:, :, row] = 0
        assert actual == pytest.approx(F.cross_entropy(without(images), targets).item(), rel=1e-9)
    assert loss == pytest.approx(F.cross_entropy(model(images), targets).item(), rel=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_each_loss_without_a_layer_is_that_of_the_network_without_it():
    model = network(drop_rate=0.5, drop_path_rate=0.5).double().train()  # which are for training only
    torch.manual_seed(0)
    images, targets = torch.randn(6, 3, 16, 16).double(), torch.arange(6) % 5
    before = copy.deepcopy(model.state_dict())
    loss, losses = layer_removal_losses(model, images, targets)
    plain = network().double().train()
    assert loss == pytest.approx(F.cross_entropy(plain(images), targets).item(), rel=1e-9)
    assert list(losses) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    for (block, layer), actual in losses.items():
        without = remove_layers(plain, [[layer] if i == block else [] for i in range(2)])
        assert actual == pytest.approx(F.cross_entropy(without(images), targets).item(), rel=1e-9)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_is_an_only_source_is_left_out():
    model = network(pruned_connections=[[[], [], []], [[], [0, 2], [], []]])
    _, losses = layer_removal_losses(model, torch.randn(6, 3, 16, 16), torch.arange(6) % 5)
    assert losses.keys() == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3)}


def test_what_is_wrong_is_said():
    images, targets = torch.randn(2, 3, 16, 16), torch.arange(2)
    with pytest.raises(ValueError, match='in training mode'):
        removal_losses(network().train(), images, targets)
    for losses in (removal_losses, layer_removal_losses):
        with pytest.raises(ValueError, match='no cross-layer convolutions'):
            losses(network(aggregation='residual').eval(), images, targets)
