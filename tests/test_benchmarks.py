"""What the benchmarks compute from what they measure, and what they refuse."""
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from timm_deluge.aggregation import CrossLayerDepthwiseConv2d
from timm_deluge.delugenet import DelugeNet

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'


@pytest.fixture(autouse=True)
def benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def run(monkeypatch):
    run = importlib.import_module('run')
    monkeypatch.setattr(run, 'DEVICE', 'cpu')
    monkeypatch.setattr(run, 'BATCH', {'training': {'delugenet146': 2}})
    monkeypatch.setattr(run, 'cpu_info', lambda: ('Some(R) Processor', ['avx2']))
    return run


def test_medians_are_of_all_rounds_but_the_first(run, monkeypatch):
    now = 0.
    durations = {'ours': iter([100., 1., 9., 2.]), 'theirs': iter([100., 4., 4., 5.])}

    def side(name):
        def call():
            nonlocal now
            now += next(durations[name])
        return call

    monkeypatch.setattr(run, 'time', SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(run, 'reference_seconds', lambda: 3.)
    for name, value in (('rounds', 3), ('spreads', []), ('probes', [])):
        monkeypatch.setattr(run, name, value)
    assert run.median_seconds({name: side(name) for name in durations}) == {'ours': 2, 'theirs': 4}
    assert run.probes == [3, 3, 3]
    assert run.spreads == [(5.5 - 1.5) / 2, (4.5 - 4) / 4]  # the interquartile range of each side, of its median


def test_figures_are_ratios_of_the_sides_that_they_name(run, monkeypatch):
    seconds = {'fused': 3., 'R': 4., 'fused R': 2.}
    kept = {(True, 'auto'): 30, (False, 'reference'): 50, (False, 'auto'): 25}
    monkeypatch.setattr(run, 'median_seconds', lambda sides: {name: seconds[name] for name in sides})
    monkeypatch.setattr(run, 'create', lambda name, aggregation='cross_layer': aggregation == 'cross_layer')
    monkeypatch.setattr(run, 'kept_bytes', lambda model, x, implementation, autocast: kept[model, implementation])
    monkeypatch.setattr(run, 'training_step', lambda *args: None)
    figures = run.measure_training('delugenet146', autocast=False)['figures']
    assert [figure['value'] for figure in figures] == [0.75, 1.5, 0.6, 1.2]
    assert ['of fused R' in figure['what'] for figure in figures] == [False, True, False, True]


def test_processors_of_one_name_are_told_apart(run, monkeypatch):
    assert run.cpu_name() == 'Some(R) Processor with AVX2 alone' and not run.has_bfloat16()
    assert run.slug(run.cpu_name()) == 'some-processor-with-avx2-alone'
    monkeypatch.setattr(run, 'cpu_info', lambda: ('Some(R) Processor', ['avx2', 'avx512f', 'avx512_bf16']))
    assert run.cpu_name() == 'Some(R) Processor' and run.has_bfloat16()
    monkeypatch.setattr(run, 'cpu_info', lambda: ('Some(R) Processor', ['avx2', 'avx512f', 'amx_bf16']))
    assert run.cpu_name() == 'Some(R) Processor with AMX' and run.has_bfloat16()


@pytest.mark.parametrize('options, message', [
    ({'only': 'nonsense *'}, 'fits none of'), ({'only': 'autocast *'}, 'need a processor with bfloat16'),
    ({'machine': 'Other'}, 'is of the Other: name another'), ({'threads': 8}, 'is of 2 threads: name another')])
def test_results_of_other_conditions_are_not_mixed(run, tmp_path, options, message):
    output = tmp_path / 'results.json'
    arguments = {'only': '*', 'output': output, 'rounds': 1, 'threads': 2, **options}
    content = json.dumps({'machine': arguments.pop('machine', run.cpu_name()), 'threads': 2, 'rows': {}})
    output.write_text(content)
    with pytest.raises(typer.BadParameter, match=message):
        run.main(**arguments)
    assert output.read_text() == content


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_a_kernel_is_compared_with_a_copy_of_as_many_bytes(monkeypatch):
    kernels = importlib.import_module('kernels')
    of_kernel, of_copy = iter([100., 100., 3., 9., 1.]), iter([100., 100., 2., 2., 8.])

    def kernel():
        raise AssertionError('it is timed by what takes the place of `seconds`')

    def seconds(run):
        if run is kernel:
            return next(of_kernel)
        assert 2 * run().nbytes == 3 * 4 * 250_000  # read and written
        return next(of_copy)

    monkeypatch.setattr(kernels, 'seconds', seconds)
    found = kernels.measure(kernel, 3, torch.empty(250_000, dtype=torch.float32), 3)
    assert found == {'GB/s': 3e6 / 3 / 1e9, 'copy_ GB/s': 3e6 / 2 / 1e9, 'time, of copy_': 1.5}


def test_rank_correlation():
    rank_correlation = importlib.import_module('pruning').rank_correlation
    assert rank_correlation([0.1, 9., 0., 5.], [1., 3., 2., 4.]) == pytest.approx(0.6)
    assert rank_correlation([1., 2., 3.], [1., 100., 1000.]) == pytest.approx(1)
    assert rank_correlation([1., 2., 3.], [3., 2., 1.]) == pytest.approx(-1)


def test_only_cross_layer_weights_learn_at_another_rate():
    parameter_groups = importlib.import_module('cross_layer_weights').parameter_groups
    model = DelugeNet((2, 3), (4, 8), num_classes=5)
    of_cross_layers = {
        id(p) for m in model.modules() if isinstance(m, CrossLayerDepthwiseConv2d) for p in m.parameters()}
    groups = list(parameter_groups(model, 0.05, 3., 0.01))
    seen = [id(p) for group in groups for p in group['params']]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for parameter in group['params']:
            chosen = id(parameter) in of_cross_layers
            assert group['lr_scale'] == (3. if chosen else 1.)
            assert group['weight_decay'] == (0.01 if chosen else 0.05 if parameter.ndim > 1 else 0)
