"""Write everything that is generated: the reports here, their learning curves, MODEL_CARD.md and the README's figures.

    python reports/generate.py
"""
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from tabulate import tabulate

from timm_deluge.card import checkpoint_table, model_card, model_table
from timm_deluge.paper import PUBLISHED
from timm_deluge.report import create_report, format_reports
from timm_deluge.weights import list_checkpoints

REPORTS = Path(__file__).resolve().parent
REPOSITORY = REPORTS.parent
PEERS = ['resnetv2_101', 'resnetv2_152', 'resnet200', 'wide_resnet50_2', 'densenet161']


def generate() -> dict[Path, str]:
    """Make every generated text.

    Returns:
        Text by path; the README's whole, with its figures renewed.
    """
    checkpoints = list_checkpoints()
    zoo, peers = ([create_report(name) for name in names] for names in (PUBLISHED, PEERS))
    readme = (REPOSITORY / 'README.md').read_text(encoding='utf-8')
    readme = _replace_block(readme, 'models', model_table(zoo, checkpoints))
    readme = _replace_block(readme, 'checkpoints', checkpoint_table(checkpoints))
    if checkpoints:
        readme = _replace_block(readme, 'predict', f'```\n{_predict()}\n```')
    readme = _replace_block(readme, 'performance', _performance())
    texts = {REPOSITORY / 'MODEL_CARD.md': model_card(checkpoints), REPOSITORY / 'README.md': readme}
    for name, reports in (('zoo', zoo), ('peers', peers)):
        for fmt, suffix in (('markdown', 'md'), ('csv', 'csv'), ('json', 'json')):
            texts[REPORTS / f'{name}.{suffix}'] = format_reports(reports, fmt) + '\n'
    return texts


def _replace_block(text: str, name: str, content: str) -> str:
    begin, end = f'<!-- {name}: written by reports/generate.py -->', f'<!-- end of {name} -->'
    return re.sub(f'{begin}.*?{end}', lambda _: f'{begin}\n{content}\n{end}', text, flags=re.DOTALL)


def draw_learning_curves(path: Path) -> None:
    """Plot each checkpoint's loss and error over the epochs of its training log.

    Args:
        path: PNG file to write.
    """
    figure, (loss, error) = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    for checkpoint in list_checkpoints():
        with (REPORTS / 'training' / f'{checkpoint.name}.csv').open(newline='') as f:
            rows = list(csv.DictReader(f))
        epochs = [1 + int(row['epoch']) for row in rows]
        loss.plot(epochs, [float(row['train_loss']) for row in rows], marker='o', label=checkpoint.name)
        error.plot(epochs, [100 - float(row['eval_top1']) for row in rows], marker='o', label=checkpoint.name)
    loss.set(title='training loss', xlabel='epoch')
    error.set(title='error on the test images, %', xlabel='epoch')
    for axis in (loss, error):
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*error.get_legend_handles_labels(), loc='outside lower center', ncols=2)
    figure.savefig(path, dpi=150)


def _performance() -> str:
    measured = json.loads((REPOSITORY / 'benchmarks' / 'cpu.json').read_text(encoding='utf-8'))
    rows = []

    def row(what: str, ratio: float, bar: str, met: bool) -> None:
        rows.append({'': what, 'measured': f'{ratio:.2f} ×', 'goal': bar, 'met': 'yes' if met else 'no'})

    for kind, verb in (('inference', 'inference, reparameterised'), ('training', 'training step')):
        for name, result in measured[kind].items():
            bar = measured['bars'][f'{kind} {name}']
            what = f'{verb}, `{name}`, batch {measured["batch"][name][kind]}: time, of R'
            row(what, result['ratio_to_R'], f'≤ {bar:.2f}', result['ratio_to_R'] <= bar)
    for name, result in measured['training'].items():
        row(f'kept for the backward pass, `{name}`: bytes, of R', result['kept_ratio_to_R'], '≤ 1.00',
            result['kept_ratio_to_R'] <= 1)
    speedup = measured['reparameterization']['delugenet122']['speedup']
    row('speedup by `reparameterize_model`, `delugenet122`', speedup, '≥ 1.25', speedup >= 1.25)
    for name, result in measured['released'].items():
        speedup, kept = result['speedup'], result['kept_ratio']
        row(f'training step, `{name}`: faster than the released form', speedup, '≥ 2.2', speedup >= 2.2)
        row(f'kept bytes, `{name}`: fewer than the released form', kept, '≥ 3', kept >= 3)
    for names, result in measured['peers'].items():
        name, peer = names.split()
        speedup, bar = result['speedup'], max(1., result['flops_ratio'])
        row(f'inference, `{name}`, reparameterised: faster than `{peer}`', speedup, f'≥ {bar:.2f}', speedup >= bar)
    share = measured['growth']['64']['cross_layer_share']
    images = ', '.join(
        f'{name} {rate:.1f}' for result in measured['peers'].values()
        for name, rate in result['images_per_second'].items())
    return '\n\n'.join((
        tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True),
        f'{measured["machine"]}, {measured["threads"]} threads, {measured["dtype"]}, channels_last, eager, '
        f'torch {measured["torch"]}, {measured["date"]}; medians of {measured["rounds"]} interleaved rounds. '
        f'Images per second at 224², batch 4: {images}. In a block of 64 layers, {share["inference"]:.0%} of the time '
        f'in inference and {share["training"]:.0%} in training is what the residual block does not take.',
        '![Cost of a layer against the length of its block](benchmarks/cpu.png)',
    ))


def _predict() -> str:
    command = [sys.executable, '-m', 'timm_deluge.cli', 'predict']
    environment = {**os.environ, 'COLUMNS': '100', 'NO_COLOR': '1'}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return '$ timm-deluge predict\n' + '\n'.join(line.rstrip() for line in result.stdout.strip().splitlines())


if __name__ == '__main__':
    for path, text in generate().items():
        path.write_text(text, encoding='utf-8')
        print(path.relative_to(REPOSITORY))
    draw_learning_curves(REPORTS / 'training' / 'learning_curves.png')
