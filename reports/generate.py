"""Write everything that is generated: the reports here, learning curves, MODEL_CARD.md and figures on other pages.

    python reports/generate.py
"""
import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import timm
from matplotlib.figure import Figure

from timm_deluge.card import DATA_SETS, best_table, checkpoint_table, markdown_table, model_card, model_table
from timm_deluge.connectivity import block_connectivity, draw_connectivity
from timm_deluge.paper import PUBLISHED
from timm_deluge.prune import CRITERIA
from timm_deluge.report import ModelReport, create_report, format_reports
from timm_deluge.weights import Checkpoint, list_checkpoints, load_checkpoint

REPORTS = Path(__file__).resolve().parent
REPOSITORY = REPORTS.parent
AGGREGATIONS = {
    '`cross_layer`': 'cross_layer', '`cross_layer`, `--lr-scale 10`': 'cross_layer.lr_10', '`scalar`': 'scalar',
    '`last`': 'last', '`residual`': 'residual'}
CROSS_LAYER_WEIGHTS = {
    'as in the recipes': 'fallback', '`--optimizer muon`': 'muon', '`--lr-scale 10`': 'lr_10',
    '`--lr-scale 0.1`': 'lr_0.1', '`--weight-decay 0`': 'no_decay', '`--start latest`': 'latest'}
RESULT_HEADERS = ('training loss', 'error %', 'epochs')
COUNTS = (
    'Counted by `timm-deluge report`, for one image in inference. GMACs are multiply-adds of convolutions (cross-layer '
    'convolutions included) and matrix products. fvcore counts each as one FLOP, and a batch normalisation as two per '
    'element (one without affine parameters). The paper counts a multiply-add of convolutions and classifier as two, '
    'and adds three FLOPs per input element of a cross-layer convolution, which cover its normalisation, and two per '
    'element of every other batch normalisation. The last column is the share of cross-layer convolutions in '
    'parameters / GMACs / GFLOPs (fvcore) / GFLOPs (paper).')
PEERS = ['resnetv2_101', 'resnetv2_152', 'resnet152', 'resnet200', 'wide_resnet50_2', 'densenet161']


def generate() -> dict[Path, str]:
    """Make every generated text.

    Returns:
        Text by path. For a page that also has other text, it is the whole page, with its figures renewed.
    """
    checkpoints = list_checkpoints()
    others = [name for name in timm.list_models(module='delugenet') if name not in PUBLISHED]
    zoo, peers = ([create_report(name) for name in names] for names in ([*PUBLISHED, *others], PEERS))
    blocks = {
        'README.md': {
            'models': model_table(zoo, checkpoints),
            'best': best_table(checkpoints),
            'checkpoints': checkpoint_table(checkpoints),
            'performance': _performance_summary(),
            **({'predict': f'```\n{_predict()}\n```'} if checkpoints else {}),
        },
        'reports/experiments.md': {
            'features': _features(checkpoints),
            'baselines': _baselines(zoo),
            'learning rates': _learning_rates(),
            'cross-layer weights': _cross_layer_weights(),
            'aggregations': _aggregations(),
            'connection drop': _connection_drop(),
        },
        'benchmarks/README.md': {'performance': _performance(), 'kernels': _kernels(), 'pruning': _pruning()},
    }
    texts = {REPOSITORY / 'MODEL_CARD.md': model_card(checkpoints)}
    for page, contents in blocks.items():
        text = (REPOSITORY / page).read_text(encoding='utf-8')
        for name, content in contents.items():
            text = _replace_block(text, name, content)
        texts[REPOSITORY / page] = text
    titles = {'zoo': 'Counts of this package’s networks', 'peers': 'Counts of other networks, for comparison'}
    for (name, title), reports in zip(titles.items(), (zoo, peers)):
        for fmt, suffix in (('markdown', 'md'), ('csv', 'csv'), ('json', 'json')):
            heading = f'# {title}\n\n{COUNTS}\n\n' if fmt == 'markdown' else ''
            texts[REPORTS / f'{name}.{suffix}'] = heading + format_reports(reports, fmt) + '\n'
    for checkpoint in checkpoints:
        if checkpoint.has_connections:
            texts[REPORTS / 'connectivity' / f'{checkpoint.name}.json'] = _connectivity(checkpoint)
    return texts


def _connectivity(checkpoint: Checkpoint) -> str:
    """Write a checkpoint's connections as JSON, a line for each block."""
    blocks = [json.dumps(block.as_dict()) for block in block_connectivity(load_checkpoint(checkpoint))]
    rounded = [json.dumps(json.loads(block, parse_float=lambda number: round(float(number), 4))) for block in blocks]
    return '[\n' + ',\n'.join(rounded) + '\n]\n'


def _replace_block(text: str, name: str, content: str) -> str:
    begin, end = f'<!-- {name}: written by reports/generate.py -->', f'<!-- end of {name} -->'
    text, count = re.subn(f'{begin}.*?{end}', lambda _: f'{begin}\n{content}\n{end}', text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f'expected one block {name!r} between the comments that name it, found {count}')
    return text


def draw_learning_curves(path: Path) -> Figure:
    """Plot each checkpoint's loss and error over the epochs of its training log.

    Args:
        path: PNG file to write.

    Returns:
        What was drawn.
    """
    figure, (loss, error) = plt.subplots(1, 2, figsize=(9, 4.2), layout='constrained')
    dark, light = (plt.get_cmap('tab20').colors[i::2] for i in (0, 1))
    for axis in (loss, error):
        axis.set_prop_cycle(color=dark + light)
    for checkpoint in list_checkpoints():
        with (REPORTS / 'training' / f'{checkpoint.name}.csv').open(newline='') as f:
            rows = list(csv.DictReader(f))
        epochs = [1 + int(row['epoch']) for row in rows]
        loss.plot(epochs, [float(row['train_loss']) for row in rows], marker='o', label=checkpoint.name)
        error.plot(epochs, [100 - float(row['eval_top1']) for row in rows], marker='o', label=checkpoint.name)
    loss.set(title='training loss', xlabel='epoch')
    error.set(title='error on the test or validation images, %', xlabel='epoch')
    for axis in (loss, error):
        axis.set_ylim(bottom=0)
        axis.set_xscale('log', base=2)
        axis.xaxis.set_major_formatter('{x:.0f}')
    figure.legend(*error.get_legend_handles_labels(), loc='outside lower center', ncols=2)
    figure.savefig(path, dpi=150)
    return figure


def accuracies() -> list[dict[str, Any]]:
    """Get the paper's results and our checkpoints': data set, network, GFLOPs as the paper counts, and top-1 in %."""
    points = [
        {'data': data, 'source': 'paper', 'name': name, 'gflops': published.gflops, 'top1': 100 - error}
        for name, published in PUBLISHED.items() if published.gflops for data, error in published.top1_error.items()]
    return points + [
        {'data': c.dataset_key, 'source': 'ours', 'name': c.name, 'gflops': create_report(c.name).paper_flops / 1e9,
         'top1': c.metrics['top1']} for c in list_checkpoints()]


def draw_accuracies(path: Path) -> None:
    """Plot accuracy against GFLOPs, ours and the paper's, for each data set.

    Args:
        path: PNG file to write.
    """
    points = accuracies()
    data_sets = {**DATA_SETS, **{c.dataset_key: c.dataset['name'] for c in list_checkpoints()}}
    figure, axes = plt.subplots(1, len(data_sets), figsize=(9, 3.6), layout='constrained')
    for axis, (data, title) in zip(axes, data_sets.items()):
        for source, marker, size, colour in (('paper', 'o', 30, '#0072B2'), ('ours', '*', 90, '#D55E00')):
            for network, face in (('DelugeNets', colour), ('ResNet-like', 'none')):
                chosen = [p for p in points if (p['data'], p['source']) == (data, source)
                          and ('resnetlike' in p['name']) == (network == 'ResNet-like')]
                axis.scatter([p['gflops'] for p in chosen], [p['top1'] for p in chosen], size, facecolors=face,
                             edgecolors=colour, marker=marker, label=f'{network}, {source}')
        axis.set(title=title, xlabel='GFLOPs, paper’s way')
        axis.margins(0.15)
    axes[0].set_ylabel('top-1 accuracy, %')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=150)


def _performance() -> str:
    """Show what was measured: tables for inference time, training time and memory, with a column for each machine."""
    machines = _measured('results/*.json')
    return '\n\n'.join((
        *(_performance_table(subject, lines, machines) for subject, lines in _performance_lines(machines).items()),
        *(_conditions(machine) + _doubts(machine) for machine in machines),
        *(f'![Cost of a layer against the length of its block, {machine["machine"]}](results/{figure.name})'
          for machine in machines if (figure := machine['path'].with_suffix('.png')).exists()),
    ))


def _performance_summary() -> str:
    """Show two networks' time and memory relative to the same with residual sums, and how many goals were missed."""
    machines = _measured('results/*.json')
    lines = _performance_lines(machines)
    chosen = {f'{subject.partition(":")[0]}: {what}': line for subject, of_subject in lines.items()
              for what, line in of_subject.items()
              if what.startswith('`') and what.endswith((', of R', 'time, of fused R'))}
    with_goal = [line for of_subject in lines.values() for line in of_subject.values() if line['goal']]
    missed = []
    for machine in machines:
        cells = [line[machine['machine']] for line in with_goal if machine['machine'] in line]
        missed.append(f'{sum("missed" in cell for cell in cells)} of {len(cells)} on the {machine["machine"]}')
    kernels = _measured('kernels/*.json')
    slow_loops = [row['time, of copy_'] > machine['at_most'] for machine in kernels for row in machine['rows']]
    return '\n\n'.join((
        _performance_table('', chosen, machines),
        f'Missed goals for whole networks, here and on the [benchmarks page](benchmarks/README.md): '
        f'{", ".join(missed)}; for single C++ loops, on that page: {sum(slow_loops)} of {len(slow_loops)}. Some '
        'results, missed or met, differ from their goal by less than the rounds from each other.',
        *(_conditions(machine) + _doubts(machine, ('inference', 'training', 'autocast')) for machine in machines)))


def _performance_lines(machines: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, str]]]:
    """Get the measured figures and their goals, by subject, then by what was measured, then by machine or 'goal'."""
    lines: dict[str, dict[str, dict[str, str]]] = {}
    for machine in machines:
        for name, row in machine['rows'].items():
            for figure in row['figures'] if not name.startswith('growth') or name == 'growth 64' else ():
                mode, _, what = figure['what'].partition(', ')
                subject = f'{mode}: bytes kept' if 'bytes kept' in what else mode
                line = lines.setdefault(subject, {}).setdefault(what, {'goal': _goal(figure)})
                line[machine['machine']] = _cell(figure)
    return lines


def _performance_table(subject: str, lines: dict[str, dict[str, str]], machines: list[dict[str, Any]]) -> str:
    columns = [*(machine['machine'] for machine in machines), 'goal']
    rows = [(what, *(line.get(column, '–') for column in columns)) for what, line in lines.items()]
    return markdown_table(rows, headers=(subject, *columns))


def _measured(pattern: str) -> list[dict[str, Any]]:
    """Read what a script of benchmarks/ has measured, such as on each machine, and the paths of these files."""
    files = sorted((REPOSITORY / 'benchmarks').glob(pattern))
    return [{**json.loads(path.read_text(encoding='utf-8')), 'path': path} for path in files]


def _kernels() -> str:
    """Show the time of every C++ loop as a multiple of a copy_ of as many bytes: a table for each processor."""
    parts = []
    for machine in _measured('kernels/*.json'):
        lines: dict[str, dict[str, str]] = {}
        for row in machine['rows']:
            cell = _cell({'value': row['time, of copy_'], 'at_most': machine['at_most'], 'at_least': None})
            lines.setdefault(row['kernel'], {})[f'{row["dtype"]}, {row["layout"]}'] = cell
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        rows = [(kernel, *(line[column] for column in columns)) for kernel, line in lines.items()]
        missed = sum('missed' in cell for line in lines.values() for cell in line.values())
        parts += [
            markdown_table(rows, headers=(machine['machine'], *columns)),
            f'{machine["threads"]} threads, layers {" × ".join(map(str, machine["shape"]))}, torch {machine["torch"]}, '
            f'{machine["date"]}; medians of {machine["rounds"]} interleaved rounds; goal ≤ {machine["at_most"]}, '
            f'missed by {missed} of {len(machine["rows"])}.']
    return '\n\n'.join(parts)


def _by(criterion: str) -> str:
    return 'at random' if criterion == 'random' else f'by {criterion}'


def _pruning() -> str:
    """Show what connections are worth: accuracy and time without the weakest, and how well scores rank them."""
    path = REPOSITORY / 'benchmarks' / 'pruning.json'
    if not path.exists():
        return 'Not measured yet: `python benchmarks/pruning.py`.'
    results = json.loads(path.read_text(encoding='utf-8'))
    whole, *pruned = results['rows']
    rows = []
    for fraction in sorted({row['fraction'] for row in pruned}):
        by = {row['by']: row for row in pruned if row['fraction'] == fraction}
        rows.append({
            'connections gone': f'{fraction:.0%}',
            **{f'top-1, {_by(name)}': f'{row["top1"]:.2f} %' for name, row in by.items()},
            'layers left, by norm': f'{by["norm"]["layers"]} of {whole["layers"]}',
            **{f'time, batch {n}': f'{ratio:.2f} ×' for n, ratio in by['norm']['time'].items()}})
    tuned = _measured(f'fine_tuning/{results["checkpoint"]}-*.json')
    trained = {(row['by'], row['fraction']): row['top1'] for row in tuned}
    measured = '; '.join(sorted({f'{row["machine"]}, {row["date"]}' for row in tuned}))
    after = [
        {'connections gone': f'{fraction:.0%}', **{
            f'top-1, {_by(by)}': f'{trained[by, fraction]:.2f} %' for by in CRITERIA if (by, fraction) in trained}}
        for fraction in sorted({fraction for _, fraction in trained})]
    importance = results['importance']
    correlations = [
        {'': part, 'connections': importance[part]['connections'], **{
            f'{by}, {what}': f'{importance[part][what][by]:.2f}'
            for what in ('replaced by its mean', 'set to zero') for by in ('norm', 'taylor')},
            'lower loss without it': f'{importance[part]["replaced by its mean"]["share of lower losses"]:.0%}'}
        for part in importance if part not in ('num_images', 'loss')]
    tables = [markdown_table(table) for table in (rows, after, correlations)]
    return '\n\n'.join((
        f'`{results["checkpoint"]}`, {results["connections"]} connections, top-1 {whole["top1"]:.2f} % on '
        f'{whole["num_images"]:,} test images in {results["dtype"]}, without fine-tuning; times are of inference after '
        f'pruning by norm, as multiples of the whole network\'s:',
        tables[0],
        *(['After one epoch of training with the recipe `cifar100_fine_tuning`, and with BatchNorm statistics '
           f're-estimated on training images, unlike in the table above ({measured}):',
           tables[1]] if after else []),
        f'Spearman\'s rank correlation of a connection\'s score with how much the loss on {importance["num_images"]} '
        f'training images changes, in absolute value, when only that connection is removed; and the share of '
        f'connections without which, replaced by their means, the loss is lower:',
        tables[2],
        f'The first and the last table: {results["machine"]}, {results["threads"]} threads, channels_last, torch '
        f'{results["torch"]}, {results["date"]}; times are medians of {results["rounds"]} interleaved rounds.',
        '![Accuracy and time against the share of connections gone](pruning.png)',
    ))


def _features(checkpoints: list[Checkpoint]) -> str:
    """Show the accuracy of frozen features beside that of networks trained on the same data."""
    lines = (REPORTS / 'frozen_features.jsonl').read_text(encoding='utf-8').splitlines()
    frozen = [json.loads(line) for line in lines]
    rows = [(f'{what}, `{found["model"]}`', f'{found["train images"]:,}', '', f'{found[what]:.2f}')
            for found in frozen for what in ('nearest neighbours', 'linear probe')]
    rows += [
        (f'from {f"`{c.base_model}`" if c.base_model else "random weights"}, `{c.name}`',
         f'{c.dataset["train_images"]:,}', c.epochs, f'{c.metrics["top1"]:.2f}')
        for c in checkpoints
        if c.dataset_key == frozen[0]['data'] and not (c.base_model or '').endswith(f'_{c.dataset_key}')]
    headers = ('', 'training images', 'epochs', f'top-1 %, {frozen[0]["test images"]:,} test images')
    return markdown_table(rows, headers=headers)


def _baselines(zoo: list[ModelReport]) -> str:
    """Compare networks that one recipe trained: the error of each seed, and how fast a training step is."""
    speeds = {
        f'images/s, {row["conditions"]}, {machine["machine"]}': row['images_per_second']
        for machine in _measured('results/*.json') if (row := machine['rows'].get('baselines delugenet146'))}
    rows = []
    for report in zoo:
        results = [_result(path) for path in sorted((REPORTS / 'baselines').glob(f'{report.name}.*.csv'))]
        if results:
            _, errors, epochs = zip(*results)
            rows.append((
                f'`{report.name}`', f'{report.params:,}', f'{report.paper_flops / 1e9:.2f}',
                *(f'{speed[report.name]:.0f}' for speed in speeds.values()), f'{mean(map(float, errors)):.2f}',
                ', '.join(errors), epochs[-1],
                f'{PUBLISHED[report.name].top1_error["cifar100"]:.2f}'))
    headers = ('', 'parameters', 'GFLOPs, paper’s way', *speeds, 'error %, mean', 'of each seed', 'epochs',
               'paper: error %, 300 epochs')
    return markdown_table(rows, headers=headers)


def _learning_rates() -> str:
    """Compare networks' errors after one epoch at several learning rates, with one recipe and seed."""
    errors: dict[str, dict[str, str]] = {}
    for path in sorted((REPORTS / 'learning_rates').glob('*.csv')):
        model, _, rate = path.stem.partition('.')
        errors.setdefault(model, {})[f'error %, {rate}'] = _result(path)[1]
    rows = [{'': f'`{model}`', **of_rates} for model, of_rates in errors.items()]
    return markdown_table(rows)


def _cross_layer_weights() -> str:
    """Compare one network's errors under several rules for its cross-layer weights, with one recipe, seed by seed."""
    rows = []
    for options, name in CROSS_LAYER_WEIGHTS.items():
        results = [_result(path) for path in sorted((REPORTS / 'cross_layer_weights').glob(f'{name}.*.csv'))]
        losses, errors, epochs = zip(*results)
        rows.append((options, ', '.join(losses), ', '.join(errors), epochs[0]))
    return markdown_table(rows, headers=('', *RESULT_HEADERS))


def _aggregations() -> str:
    """Compare one network's errors by what connects its layers, with one recipe and seed."""
    rows = []
    for label, name in AGGREGATIONS.items():
        report = create_report('delugenet146', aggregation=name.partition('.')[0])
        rows.append((label, f'{report.params:,}', f'{report.paper_flops / 1e9:.2f}',
                     *_result(REPORTS / 'aggregations' / f'{name}.csv')))
    headers = ('`aggregation`', 'parameters', 'GFLOPs, paper’s way', *RESULT_HEADERS)
    return markdown_table(rows, headers=headers)


def _connection_drop() -> str:
    """Compare one network's errors at several rates of connection drop in training, with one recipe and seed."""
    logs = {'0': REPORTS / 'aggregations' / 'cross_layer.csv'}
    logs.update((path.stem, path) for path in sorted((REPORTS / 'connection_drop').glob('*.csv')))
    rows = [(rate, *_result(path)) for rate, path in logs.items()]
    return markdown_table(rows, headers=('`connection_drop_rate`', *RESULT_HEADERS))


def _result(log: Path) -> tuple[str, str, str]:
    """Get the last epoch's training loss, error in % and number from a log of train.py."""
    with log.open(newline='') as f:
        *_, last = csv.DictReader(f)
    return f'{float(last["train_loss"]):.3f}', f'{100 - float(last["eval_top1"]):.2f}', str(int(last['epoch']) + 1)


def _goal(figure: dict[str, Any]) -> str:
    if figure['at_most'] is not None:
        return f'≤ {figure["at_most"]:.2f}'
    return '' if figure['at_least'] is None else f'≥ {figure["at_least"]:.2f}'


def _cell(figure: dict[str, Any]) -> str:
    value = figure['value']
    missed = value > (figure['at_most'] or math.inf) or value < (figure['at_least'] or 0)
    goals = [round(goal, 2) for goal in (figure['at_most'], figure['at_least']) if goal]
    digits = 3 if missed and round(value, 2) in goals else 2
    return f'{value:.{digits}f} ×' + (', missed' if missed else '')


def _conditions(machine: dict[str, Any]) -> str:
    rows = machine['rows'].values()
    dates, torches, rounds = (sorted({row[key] for row in rows}) for key in ('date', 'torch', 'rounds'))
    seconds = [row.get('wall_seconds', math.nan) for row in rows]
    took = '' if any(map(math.isnan, seconds)) else f', in {sum(seconds) / 60:.0f} minutes'
    return (
        f'{machine["machine"]}: {machine["threads"]} threads, channels_last, eager, torch {", ".join(torches)}, '
        f'{", ".join(dates)}; medians of {" or ".join(map(str, rounds))} interleaved rounds{took}.')


def _doubts(machine: dict[str, Any], kinds: tuple[str, ...] = ('',)) -> str:
    """Name the comparisons whose figures may be off, among those whose names begin with one of `kinds`."""
    named = [(_comparison(name), row) for name, row in machine['rows'].items() if name.startswith(kinds)]
    rows = [(name, row) for name, row in named if 'load' in row]
    if not rows:
        return ' Whether another load was present, or rounds disagreed, was not recorded.'
    disturbed = [name for name, row in rows if row['load'] > machine['max_load']]
    unsteady = [
        f'{name} ({row["disagreement"]:.0%})' for name, row in rows
        if row['disagreement'] > machine['max_disagreement']]
    unknown = [name for name, row in named if 'load' not in row]
    return (
        (f' Another load was present, or the clock rate lower, in: {", ".join(disturbed)}.' if disturbed else '')
        + (f' Rounds disagree (interquartile range relative to the median) in: {", ".join(unsteady)}.'
           if unsteady else '')
        + (f' Neither was recorded for: {", ".join(unknown)}.' if unknown else ''))


def _comparison(name: str) -> str:
    """Describe in words the comparison of benchmarks/run.py that has this name."""
    kind, _, networks = name.partition(' ')
    words = {'growth': f'a block of {networks} layers', 'peer': ' beside '.join(networks.split())}
    return words.get(kind, name)


def _predict() -> str:
    command = [sys.executable, '-m', 'timm_deluge.cli', 'predict']
    environment = {**os.environ, 'COLUMNS': '100', 'NO_COLOR': '1'}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return '$ timm-deluge predict\n' + '\n'.join(line.rstrip() for line in result.stdout.strip().splitlines())


if __name__ == '__main__':
    for path, text in generate().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding='utf-8')
        print(path.relative_to(REPOSITORY))
    draw_learning_curves(REPORTS / 'training' / 'learning_curves.png')
    draw_accuracies(REPORTS / 'training' / 'accuracy.png')
    for checkpoint in list_checkpoints():
        if checkpoint.has_connections:
            figure = draw_connectivity(block_connectivity(load_checkpoint(checkpoint)), checkpoint.name)
            figure.savefig(REPORTS / 'connectivity' / f'{checkpoint.name}.png', dpi=150)
