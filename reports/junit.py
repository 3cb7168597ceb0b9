"""Run tests, in any environment, and get the outcome of each."""
import os
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import typer

REPOSITORY = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """The outcome of a test.

    Attributes:
        name: The test's name, with its parameters.
        kind: 'passed', 'failed' or 'skipped'.
        message: Why it was skipped, or the error.
        seconds: How long it took.
        properties: The properties that it recorded.
    """
    name: str
    kind: str
    message: str
    seconds: float
    properties: dict[str, str]


def find_timm_scripts() -> None:
    """Make TIMM_SCRIPTS an absolute path, as the tests run in the repository's folder.

    Raises:
        typer.BadParameter: If this environment variable does not name a checkout of timm's repository.
    """
    scripts = Path(os.environ.get('TIMM_SCRIPTS', ''))
    if not (scripts / 'train.py').is_file():
        raise typer.BadParameter('set TIMM_SCRIPTS to a checkout of pytorch-image-models, whose scripts are tried, too')
    os.environ['TIMM_SCRIPTS'] = str(scripts.resolve())


def run_tests(python: str | Path, *arguments: str | Path, **environment: str) -> list[Outcome]:
    """Call pytest in the repository.

    Args:
        python: The environment's interpreter.
        arguments: pytest's arguments.
        environment: Environment variables besides this process's.

    Returns:
        Each test's outcome; one failure without a name if pytest wrote nothing, as if it cannot read its configuration.
    """
    with TemporaryDirectory() as folder:
        results = Path(folder, 'results.xml')
        command = [python, '-m', 'pytest', '-q', *arguments, f'--junitxml={results}']
        process = subprocess.run(
            list(map(str, command)), cwd=REPOSITORY, env={**os.environ, **environment}, check=False)
        if not results.exists():
            return [Outcome('', 'failed', f'pytest ended with {process.returncode} and no results', 0., {})]
        return [_outcome(case) for case in ET.parse(results).getroot().iter('testcase')]


def _outcome(case: ET.Element) -> Outcome:
    kinds = {'failure': 'failed', 'error': 'failed', 'skipped': 'skipped'}
    kind, message = next(
        ((kinds[child.tag], child.get('message', '')) for child in case if child.tag in kinds), ('passed', ''))
    properties = {p.get('name', ''): p.get('value', '') for p in case.iter('property')}
    return Outcome(case.get('name', ''), kind, message, float(case.get('time', '0')), properties)
