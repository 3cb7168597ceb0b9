"""Run the tests of faults, and write down what was tried and what came of it: robustness.md.

    TIMM_SCRIPTS=pytorch-image-models python reports/robustness.py [FILE …]
"""
import ast
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import torch
import typer
from junit import REPOSITORY, find_timm_scripts, run_tests
from tabulate import tabulate

REPORT = REPOSITORY / 'reports' / 'robustness.md'
RESULTS = REPORT.with_suffix('.json')
NUMBERS = dict(NUM_NETWORKS='500', NUM_KILLS='20')
INTRODUCTION = """# What goes wrong, and what comes of it

Written by `python reports/robustness.py`, which runs `tests/faults` with 500 random networks (`NUM_NETWORKS=500`; by
default 100) and 20 kills of a training run (`NUM_KILLS=20`; by default 2, and none without `TIMM_SCRIPTS`). A case is a
damaged file, a hostile image, a wrong option, a random network, a kill, or a test; each has to end as the first column
says. Each row was measured with the code and tests of the day in its last column.
"""


def purpose(path: Path) -> str:
    """Get the first line of a test file's docstring."""
    return str(ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))).splitlines()[0]


def main(names: Annotated[list[str] | None, typer.Argument(help='Test files; all by default.')] = None) -> None:
    """Run the tests in the files named; what was found of the others stays."""
    files = {path.name: path for path in sorted((REPOSITORY / 'tests' / 'faults').glob('test_*.py'))}
    find_timm_scripts()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if unknown := set(names or ()) - set(files):
        raise typer.BadParameter(f'{unknown.pop()}: must be one of {", ".join(files)}')
    for name in names or files:
        outcomes = run_tests(sys.executable, files[name], **NUMBERS)
        kinds = [outcome.kind for outcome in outcomes]
        cases = sum(int(outcome.properties.get('cases', '1')) for outcome in outcomes if outcome.kind == 'passed')
        results[name] = {
            'what has to hold': purpose(files[name]), 'cases that passed': f'{cases:,}',
            'tests that failed': kinds.count('failed'), 'skipped': kinds.count('skipped'),
            'seconds': round(sum(outcome.seconds for outcome in outcomes)),
            'command': f'`pytest {files[name].relative_to(REPOSITORY)}`',
            'when': f'{date.today()}, Python {platform.python_version()}, torch {torch.__version__}'}
        RESULTS.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    rows = [results[name] for name in files if name in results]
    table = tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)
    REPORT.write_text(f'{INTRODUCTION}\n{table}\n', encoding='utf-8')


if __name__ == '__main__':
    typer.run(main)
