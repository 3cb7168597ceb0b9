"""Run the tests of faults, and write down what was tried and what came of it: robustness.md.

    python reports/robustness.py
"""
import ast
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tabulate import tabulate

REPORT = Path(__file__).resolve().parent / 'robustness.md'
FAULTS = REPORT.parent.parent / 'tests' / 'faults'
NUM_NETWORKS = '500'
INTRODUCTION = """# What goes wrong, and what comes of it

Written by `python reports/robustness.py`, which runs `tests/faults` with 500 random networks, where the tests take 100.
A case is a damaged file, a hostile image, a wrong option or a random network; each has to end as the first column says.
"""


def purpose(path: Path) -> str:
    """Get the first line of a test file's docstring."""
    return str(ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))).splitlines()[0]


def main() -> None:
    rows = []
    for path in sorted(FAULTS.glob('test_*.py')):
        with TemporaryDirectory() as folder:
            results = Path(folder, 'results.xml')
            command = [sys.executable, '-m', 'pytest', '-q', str(path), f'--junitxml={results}']
            environment = {**os.environ, 'NUM_NETWORKS': NUM_NETWORKS}
            subprocess.run(command, cwd=FAULTS.parent.parent, env=environment, check=False)
            root = ET.parse(results).getroot()
        tests = list(root.iter('testcase'))
        outcomes = {test: {child.tag for child in test} & {'failure', 'error', 'skipped'} for test in tests}
        cases = sum(
            int(next((p.get('value', '1') for p in test.iter('property') if p.get('name') == 'cases'), '1'))
            for test, outcome in outcomes.items() if not outcome)
        failed, skipped = (sum(bool(outcome & kinds) for outcome in outcomes.values())
                           for kinds in ({'failure', 'error'}, {'skipped'}))
        seconds = sum(float(test.get('time', '0')) for test in tests)
        rows.append((purpose(path), f'{cases:,}', str(failed), str(skipped), f'{seconds:.0f}',
                     f'`pytest {path.relative_to(FAULTS.parent.parent)}`'))
    headers = ('', 'cases that did', 'tests that failed', 'skipped', 'seconds', 'command')
    table = tabulate(rows, headers, tablefmt='github', disable_numparse=True)
    conditions = f'Python {platform.python_version()}, torch {torch.__version__}, {date.today()}.'
    REPORT.write_text(f'{INTRODUCTION}\n{table}\n\n{conditions}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
