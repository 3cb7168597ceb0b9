"""Run the tests of faults, and write down what was tried and what came of it: robustness.md.

    TIMM_SCRIPTS=pytorch-image-models python reports/robustness.py
"""
import ast
import platform
import sys
from datetime import date
from pathlib import Path

import torch
from junit import REPOSITORY, run_tests
from tabulate import tabulate

REPORT = REPOSITORY / 'reports' / 'robustness.md'
NUMBERS = dict(NUM_NETWORKS='500', NUM_KILLS='20')
INTRODUCTION = """# What goes wrong, and what comes of it

Written by `python reports/robustness.py`, which runs `tests/faults`: with 500 random networks, where the tests take
100, and 20 kills of a training, where they take 2. A case is a damaged file, a hostile image, a wrong option, a random
network, a kill, or a test; each has to end as the first column says.
"""


def purpose(path: Path) -> str:
    """Get the first line of a test file's docstring."""
    return str(ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))).splitlines()[0]


def main() -> None:
    rows = []
    for path in sorted((REPOSITORY / 'tests' / 'faults').glob('test_*.py')):
        outcomes = run_tests(sys.executable, path, **NUMBERS)
        kinds = [outcome.kind for outcome in outcomes]
        cases = sum(int(outcome.properties.get('cases', '1')) for outcome in outcomes if outcome.kind == 'passed')
        seconds = sum(outcome.seconds for outcome in outcomes)
        rows.append((purpose(path), f'{cases:,}', kinds.count('failed'), kinds.count('skipped'), f'{seconds:.0f}',
                     f'`pytest {path.relative_to(REPOSITORY)}`'))
    headers = ('', 'cases that did', 'tests that failed', 'skipped', 'seconds', 'command')
    table = tabulate(rows, headers, tablefmt='github', disable_numparse=True)
    conditions = f'Python {platform.python_version()}, torch {torch.__version__}, {date.today()}.'
    REPORT.write_text(f'{INTRODUCTION}\n{table}\n\n{conditions}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
