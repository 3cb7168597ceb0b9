"""Write everything that is generated: the reports here, MODEL_CARD.md and the README's table of models.

    python reports/generate.py
"""
from pathlib import Path

from timm_deluge.card import model_card, model_table
from timm_deluge.paper import PUBLISHED
from timm_deluge.report import create_report, format_reports
from timm_deluge.weights import list_checkpoints

REPORTS = Path(__file__).resolve().parent
REPOSITORY = REPORTS.parent
PEERS = ['resnetv2_101', 'resnetv2_152', 'resnet200', 'wide_resnet50_2', 'densenet161']
BEGIN, END = '<!-- begin: reports/generate.py -->', '<!-- end: reports/generate.py -->'


def generate() -> dict[Path, str]:
    """Make every generated text.

    Returns:
        Text by path; the README's whole, with its table renewed.
    """
    zoo, peers = ([create_report(name) for name in names] for names in (PUBLISHED, PEERS))
    readme = (REPOSITORY / 'README.md').read_text(encoding='utf-8')
    head, _, rest = readme.partition(BEGIN)
    tail = rest.partition(END)[2]
    texts = {
        REPOSITORY / 'MODEL_CARD.md': model_card(list_checkpoints()),
        REPOSITORY / 'README.md': f'{head}{BEGIN}\n{model_table(zoo, list_checkpoints())}\n{END}{tail}',
    }
    for name, reports in (('zoo', zoo), ('peers', peers)):
        for fmt, suffix in (('markdown', 'md'), ('csv', 'csv'), ('json', 'json')):
            texts[REPORTS / f'{name}.{suffix}'] = format_reports(reports, fmt) + '\n'
    return texts


if __name__ == '__main__':
    for path, text in generate().items():
        path.write_text(text, encoding='utf-8')
        print(path.relative_to(REPOSITORY))
