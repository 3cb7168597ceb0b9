"""Write everything that is generated: the reports here, MODEL_CARD.md and the README's figures.

    python reports/generate.py
"""
import os
import re
import subprocess
import sys
from pathlib import Path

from timm_deluge.card import model_card, model_table
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
    if checkpoints:
        readme = _replace_block(readme, 'predict', f'```\n{_predict()}\n```')
    texts = {REPOSITORY / 'MODEL_CARD.md': model_card(checkpoints), REPOSITORY / 'README.md': readme}
    for name, reports in (('zoo', zoo), ('peers', peers)):
        for fmt, suffix in (('markdown', 'md'), ('csv', 'csv'), ('json', 'json')):
            texts[REPORTS / f'{name}.{suffix}'] = format_reports(reports, fmt) + '\n'
    return texts


def _replace_block(text: str, name: str, content: str) -> str:
    begin, end = f'<!-- {name}: written by reports/generate.py -->', f'<!-- end of {name} -->'
    return re.sub(f'{begin}.*?{end}', lambda _: f'{begin}\n{content}\n{end}', text, flags=re.DOTALL)


def _predict() -> str:
    command = [sys.executable, '-m', 'timm_deluge.cli', 'predict']
    environment = {**os.environ, 'COLUMNS': '100', 'NO_COLOR': '1'}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return '$ timm-deluge predict\n' + '\n'.join(line.rstrip() for line in result.stdout.strip().splitlines())


if __name__ == '__main__':
    for path, text in generate().items():
        path.write_text(text, encoding='utf-8')
        print(path.relative_to(REPOSITORY))
