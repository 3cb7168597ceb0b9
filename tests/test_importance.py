"""Losses that are measured by reusing are those of whole passes."""
import copy

import pytest
import torch
import torch.nn.functional as F
from test_prune import network

from timm_deluge import connection_scores, prune_connections
from timm_deluge.importance import removal_losses


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


def test_what_is_wrong_is_said():
    images, targets = torch.randn(2, 3, 16, 16), torch.arange(2)
    with pytest.raises(ValueError, match='in training mode'):
        removal_losses(network().train(), images, targets)
    with pytest.raises(ValueError, match='no cross-layer convolutions'):
        removal_losses(network(aggregation='residual'), images, targets)
