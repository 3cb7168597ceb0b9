"""Any network, however built and called, computes on the fast path what the reference does."""
import copy
import os
from contextlib import nullcontext
from statistics import mean

import pytest
import torch
from test_implementations import LAYOUTS, differentiate
from timm.utils import reparameterize_model

from timm_deluge import explain_implementation, set_implementation
from timm_deluge.delugenet import DelugeNet

hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies
NUM_NETWORKS = int(os.environ.get('NUM_NETWORKS', 100))
NUM_INPUTS = 6
BASE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

networks = st.fixed_dictionaries(dict(
    depths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    in_chans=st.integers(1, 4),
    stem_type=st.sampled_from(['cifar', 'imagenet']),
    output_stride=st.sampled_from([8, 16, 32]),
    aggregation=st.sampled_from(['cross_layer', 'cross_layer', 'scalar', 'last', 'residual']),
    transition_type=st.sampled_from(['3x3', '1x1']),
    drop_path_rate=st.sampled_from([0., 0., 0.3]),
    connection_drop_rate=st.sampled_from([0., 0., 0.3]),
))
calls = st.fixed_dictionaries(dict(
    width=st.integers(1, 9),
    batch=st.integers(1, 4),
    size=st.sampled_from([24, 33, 40]),
    dtype=st.sampled_from(list(BASE)),
    autocast=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
    training=st.booleans(),
    frozen=st.booleans(),
    checkpointing=st.booleans(),
))


def error(actual, expected) -> float:
    """Relative to the largest element, or 1."""
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1))


def mean_errors(model, x, dtype, autocast) -> tuple[float, float]:
    """Get how far all results and gradients are from double precision, on the fast path and by the reference."""
    exact = differentiate(copy.deepcopy(model).double(), x.double(), 'reference')
    found = []
    for implementation in ('auto', 'reference'):
        context = torch.autocast('cpu', torch.bfloat16) if autocast else nullcontext()
        found.append(differentiate(copy.deepcopy(model).to(dtype), x.to(dtype), implementation, context))
    fast, plain = found
    names = [name for name in exact if plain[name] is not None]
    assert names == [name for name in exact if fast[name] is not None]
    of_fast, of_plain = (mean(error(tensors[name], exact[name]) for name in names) for tensors in (fast, plain))
    return of_fast, of_plain


def check(network, call, seed):
    torch.manual_seed(seed)
    if network['aggregation'] in ('last', 'residual'):
        network = {**network, 'connection_drop_rate': 0.}
    widths = [call['width'] * 2 ** i for i in range(len(network['depths']))]
    model = DelugeNet(widths=widths, num_classes=3, **network).train(call['training'])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if call['frozen']:
        for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.eval().requires_grad_(False)
    model.set_grad_checkpointing(call['checkpointing'])

    def images():
        return LAYOUTS[call['layout']](torch.randn(call['batch'], network['in_chans'], call['size'], call['size']))

    dtype = call['dtype']
    autocast = call['autocast'] and dtype is torch.float32
    base = BASE[torch.bfloat16 if autocast else dtype]
    # rounding may put a value on the other side of a ReLU's kink, on any path; one is wrong that is so for all images
    for _ in range(1 if dtype is torch.float64 else NUM_INPUTS):
        of_fast, of_plain = mean_errors(model, images(), dtype, autocast)
        if of_fast <= base + 3 * of_plain:
            break
    assert of_fast <= base + 3 * of_plain
    set_implementation('auto')
    decisions = explain_implementation(copy.deepcopy(model).to(dtype), images().to(dtype))
    assert {decision.reason for decision in decisions.values()} <= {None, 'there are no layers'}
    if not call['training']:
        with torch.no_grad():
            x = images()
            expected = copy.deepcopy(model).double()(x.double())
            fused = reparameterize_model(copy.deepcopy(model)).to(memory_format=torch.channels_last)
            assert error(fused(x), expected) <= 1e-5 + 10 * error(model(x), expected)


@pytest.mark.slow
def test_as_near_to_double_precision_as_the_reference(record_property):
    settings = hypothesis.settings(max_examples=NUM_NETWORKS, deadline=None, derandomize=True, database=None)
    settings(hypothesis.given(networks, calls, st.integers(0, 2 ** 31))(check))()
    record_property('cases', NUM_NETWORKS)
