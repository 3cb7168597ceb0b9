"""What is generated is up to date: README, model card and reports say what the code and the manifest say."""
import csv
import json
import re
import runpy
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from timm_deluge.card import best_table, model_table
from timm_deluge.report import create_report
from timm_deluge.weights import list_checkpoints

REPOSITORY = Path(__file__).resolve().parent.parent
# a run logs the epochs after which it measures: all of them, but for runs with --val-interval
MEASURED = {'delugenet146.muon40_cifar100': [7, 15, 23, 31, 39], 'delugenet146.muon32_cifar10': [7, 15, 23, 31],
            'wide_delugenet146.muon62_avg_cifar100': [2, 5, 6],
            'delugenet122.muon26_avg_tinyin': [3, 7, 8],
            'delugenet92.from122_tinyin': [1], 'delugenet104.from122_tinyin': [1],
            'resnetlike146_1x1.muon6_cifar100': [2, 5], 'resnetlike146_3x3.muon6_cifar100': [2, 5]}


@pytest.fixture(scope='module')
def generator():
    return runpy.run_path(str(REPOSITORY / 'reports' / 'generate.py'))


def without_probabilities(text: str) -> str:
    """Leave out what another processor may round differently."""
    return re.sub(r'\d+\.\d%', '', text)


def test_a_block_that_is_not_there_is_named(generator):
    with pytest.raises(ValueError, match="expected one block 'nothing' .* found 0"):
        generator['_replace_block']('text', 'nothing', '')


@pytest.mark.slow
def test_generated_files_are_up_to_date(generator):
    for path, text in generator['generate']().items():
        stale = f'{path.name} is out of date: run `python reports/generate.py`'
        assert without_probabilities(path.read_text(encoding='utf-8')) == without_probabilities(text), stale


@pytest.mark.parametrize('child, kind, message', [
    ('', 'passed', ''), ('<failure message="a"/>', 'failed', 'a'), ('<error message="a"/>', 'failed', 'a'),
    ('<skipped message="a"/>', 'skipped', 'a')])
def test_outcomes_are_those_of_pytest(child, kind, message):
    outcome = runpy.run_path(str(REPOSITORY / 'reports' / 'junit.py'))['_outcome']
    case = ET.fromstring(f'<testcase name="test" time="1.5"><properties><property name="n" value="3"/></properties>'
                         f'{child}</testcase>')
    assert outcome(case) == ('test', kind, message, 1.5, {'n': '3'})


def test_readme_shows_the_model_table():
    readme = (REPOSITORY / 'README.md').read_text(encoding='utf-8')
    assert '| `delugenet122`' in readme and '63,620,392' in readme


@pytest.mark.parametrize('order', [1, -1])
def test_model_table_shows_the_best_checkpoint_for_a_data_set(order):
    checkpoint = list_checkpoints()[0]
    better, worse = (replace(checkpoint, metrics={**checkpoint.metrics, 'top1': top1}) for top1 in (92.5, 90.25))
    table = model_table([create_report(checkpoint.model)], [better, worse][::order])
    assert f'7.50 ({checkpoint.dataset["name"]}, {checkpoint.input_size[1]}²)' in table and '9.75' not in table


def test_first_table_shows_the_best_checkpoint_for_each_data_set():
    checkpoints = list_checkpoints()
    rows = best_table(checkpoints).splitlines()[2:]
    assert len(rows) == len({c.dataset_key for c in checkpoints})
    for checkpoint in checkpoints:
        better = any(
            c.dataset_key == checkpoint.dataset_key and c.metrics['top1'] > checkpoint.metrics['top1']
            for c in checkpoints)
        shown = [row for row in rows if f'`{checkpoint.name}`' in row]
        assert bool(shown) != better
        assert all(f'| {checkpoint.metrics["top1"]:.2f}' in row for row in shown)
    assert '\n'.join(rows) in (REPOSITORY / 'README.md').read_text(encoding='utf-8')


@pytest.mark.slow
def test_accuracy_is_drawn_for_every_checkpoint_and_every_figure_of_the_paper(generator, tmp_path):
    points = generator['accuracies']()
    assert {(p['name'], p['top1']) for p in points if p['source'] == 'ours'} == {
        (c.name, c.metrics['top1']) for c in list_checkpoints()}
    printed = {(p['name'], p['data']): (p['gflops'], p['top1']) for p in points if p['source'] == 'paper'}
    assert printed['delugenet146', 'cifar100'] == (1.43, pytest.approx(80.28))
    assert len(printed) == 12
    generator['draw_accuracies'](tmp_path / 'accuracy.png')
    assert (tmp_path / 'accuracy.png').stat().st_size > 10_000


@pytest.mark.parametrize('value, limits, cell', [
    (1.04, {'at_most': 1.05}, '1.04 ×'), (1.06, {'at_most': 1.05}, '1.06 ×, missed'),
    (1.0521, {'at_most': 1.05}, '1.052 ×, missed'),
    (1.9, {'at_least': 2.}, '1.90 ×, missed'), (2.1, {'at_least': 2.}, '2.10 ×'), (9., {}, '9.00 ×')])
def test_performance_table_says_what_is_missed(generator, value, limits, cell):
    figure = {'at_most': None, 'at_least': None, **limits, 'value': value}
    assert generator['_cell'](figure) == cell


def test_model_card_is_in_hugging_face_form():
    card = ModelCard((REPOSITORY / 'MODEL_CARD.md').read_text(encoding='utf-8'))
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0'
    measured = {(r.metric_name, r.metric_value) for r in card.data.eval_results or []}
    for checkpoint in list_checkpoints():
        assert (f'Top-1 accuracy, {checkpoint.name}', checkpoint.metrics['top1']) in measured
        assert checkpoint.sha256 in card.text


@pytest.mark.parametrize('checkpoint', list_checkpoints(), ids=lambda c: c.name)
def test_training_log_ends_with_the_published_accuracy(checkpoint):
    with (REPOSITORY / 'reports' / 'training' / f'{checkpoint.name}.csv').open(newline='') as f:
        epochs = list(csv.DictReader(f))
    assert [int(e['epoch']) for e in epochs] == MEASURED.get(checkpoint.name, list(range(checkpoint.epochs)))
    logged, published = float(epochs[-1]['eval_top1']), checkpoint.metrics['top1']
    if checkpoint.settled_images or '_avg_' in checkpoint.tag:  # after the log was written
        assert logged < published
    else:  # logged from float32 weights, and in the run's own arithmetic
        assert logged == pytest.approx(published, abs=0.3)
    assert all(float(e['train_loss']) > 0 for e in epochs)


def test_what_was_not_recorded_is_not_called_calm(generator):
    doubts, old = generator['_doubts'], {'rounds': 5}
    assert doubts({'rows': {'training a': old}}).endswith('was not recorded.')
    machine = {'max_load': 1.15, 'max_disagreement': 0.15, 'rows': {
        'training a': old, 'training b': {'load': 1.2, 'disagreement': 0.1},
        'training c': {'load': 1.1, 'disagreement': 0.2}}}
    assert doubts(machine) == (
        ' Another load was present, or the clock rate lower, in: training b. Rounds disagree (interquartile range '
        'relative to the median) in: training c (20%). Neither was recorded for: training a.')


def test_learning_curves_are_those_of_the_logs(generator, tmp_path):
    figure = generator['draw_learning_curves'](tmp_path / 'curves.png')
    for axis, column, of_percent in zip(figure.axes, ('train_loss', 'eval_top1'), (lambda x: x, lambda x: 100 - x)):
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert len({line.get_color() for line in lines.values()}) == len(list_checkpoints())
        for checkpoint in list_checkpoints():
            log = (REPOSITORY / 'reports' / 'training' / f'{checkpoint.name}.csv').read_text().splitlines()
            at = log[0].split(',').index(column)
            expected = [of_percent(float(row.split(',')[at])) for row in log[1:]]
            assert list(lines[checkpoint.name].get_ydata()) == pytest.approx(expected)
            assert list(lines[checkpoint.name].get_xdata()) == [1 + int(row.split(',')[0]) for row in log[1:]]
    with Image.open(tmp_path / 'curves.png') as drawn, \
            Image.open(REPOSITORY / 'reports' / 'training' / 'learning_curves.png') as published:
        assert drawn.size == published.size


def test_figures_on_the_page_are_those_of_the_manifest():
    """By reading both files, without what writes the one from the other."""
    manifest = json.loads((REPOSITORY / 'weights' / 'manifest.json').read_text(encoding='utf-8'))
    page = (REPOSITORY / 'README.md').read_text(encoding='utf-8')
    table = page[page.index('<!-- checkpoints:'):page.index('<!-- end of checkpoints -->')]
    rows = {cells[1].strip(' `'): [cell.strip() for cell in cells] for cells in
            (line.split('|') for line in table.splitlines()) if len(cells) > 3}
    for checkpoint in manifest['checkpoints']:
        row = rows[f'{checkpoint["model"]}.{checkpoint["tag"]}']
        assert f'{100 - checkpoint["metrics"]["top1"]:.2f}' in row
        assert str(checkpoint['epochs']) in row and str(checkpoint['hours']) in row
