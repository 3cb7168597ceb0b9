"""Try the tools that take a network of timm, each in a fresh environment, and write down what works: tools.md.

    TIMM_SCRIPTS=path/to/pytorch-image-models python reports/tools.py [NAME …]
"""
import ast
import json
import platform
import subprocess
import sys
import venv
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from junit import REPOSITORY, Outcome, find_timm_scripts, run_tests
from tabulate import tabulate

REPORT = REPOSITORY / 'reports' / 'tools.md'
RESULTS = REPORT.with_suffix('.json')
TESTS = REPOSITORY / 'tests' / 'tools'
EXPORTED = 'delugenet146'
EXPORTERS = 'exporters'
# the arguments of `pip install` for the tests of each tool
TOOLS = {
    'transformers': ('transformers[torch]',), 'fastai': ('fastai',), 'lightning': ('lightning',),
    'grad_cam': ('grad-cam',), 'torchinfo': ('torchinfo',), 'torchao': ('torchao',),
    'timm': ('pandas', 'onnx', 'onnxruntime'),  # which its scripts need
    EXPORTERS: ('onnx', 'onnxscript', 'onnxruntime')}
INTRODUCTION = """# Tools that take a DelugeNet

Written by `python reports/tools.py`. Each tool was installed with this package in an environment of its own, and given
an unmodified network; the tests are in `tests/tools`. Each result is of the code and tests of the date given with it.

There are two limitations that this package can only work around. timm does not load other packages' networks by
itself, so `import timm_deluge` has to come first, in every process. And transformers passes `num_classes` twice if the
`model_args` in a repository's configuration contain it, so `timm-deluge publish` writes no `model_args`.
"""
EXPORT = f"""## Exporters and compilers

The whole of `{EXPORTED}` in inference; the numbers are the largest difference of any output, for two batch sizes,
relative to the largest output. `timm.utils.reparameterize_model` makes the reparameterised network.
"""


def install(folder: Path, *packages: str, base: Path | None = None) -> Path:
    """Make an environment, which may also see the packages of another one.

    Args:
        folder: Where to make it.
        packages: What pip installs.
        base: Folder of the other environment, if any.

    Returns:
        The interpreter of the new environment.
    """
    venv.create(folder, with_pip=True)
    if base:
        (other,) = base.glob('lib/python*/site-packages')
        (own,) = folder.glob('lib/python*/site-packages')
        (own / 'base.pth').write_text(f'{other}\n')
    python = folder / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', *packages], check=True)
    return python


def version(python: Path, package: str) -> str:
    code = f'from importlib.metadata import version; print(version({package!r}))'
    return subprocess.run([python, '-c', code], check=True, capture_output=True, text=True).stdout.strip()


def descriptions() -> dict[str, str]:
    """Get the docstring of each test, by its name: it says what is tried."""
    tree = ast.parse((TESTS / 'test_other_tools.py').read_text(encoding='utf-8'))
    return {node.name: ast.get_docstring(node) or '' for node in tree.body if isinstance(node, ast.FunctionDef)}


def result(outcome: Outcome) -> str:
    return 'works' if outcome.kind == 'passed' else f'{outcome.kind}: {outcome.message.splitlines()[0]}'


def listed(versions: dict[str, str]) -> str:
    return ', '.join(f'{name} {number}' for name, number in versions.items())


def try_tools(names: Sequence[str], results: dict[str, Any]) -> None:
    """Try some tools, and write down the results."""
    tried = descriptions()
    with TemporaryDirectory() as folder:
        base = Path(folder, 'base')
        python = install(base, str(REPOSITORY), 'pytest', 'pytest-timeout')
        versions = {'Python': platform.python_version(), 'torch': version(python, 'torch')}
        for name in names:
            python = install(Path(folder, name), *TOOLS[name], base=base)
            if name == EXPORTERS:
                used = {**versions, **{package: version(python, package) for package in TOOLS[name]}}
                results['exported with'] = f'{listed(used)}, {date.today()}'
                for outcome in run_tests(python, TESTS / 'test_export.py', '--timeout=3600', EXPORTED=EXPORTED):
                    exporter, _, form = outcome.name.partition('[')[2].rstrip(']').rpartition('-')
                    found = ', '.join(filter(None, (result(outcome), outcome.properties.get('difference'))))
                    results['exporters'].setdefault(exporter, {})[form] = found
            else:
                tool = name.replace('_', '-')
                outcomes = run_tests(python, TESTS / 'test_other_tools.py', '-k', f'test_{name}')
                results['tools'][name] = [{
                    'tool': f'{tool} {version(python, tool)}', 'what': tried.get(outcome.name, outcome.name),
                    'result': result(outcome), 'with': listed(versions), 'date': str(date.today())}
                    for outcome in outcomes]
            RESULTS.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
            REPORT.write_text(report(results), encoding='utf-8')


def report(results: dict[str, Any]) -> str:
    tools = [row for name in TOOLS for row in results['tools'].get(name, [])]
    exporters = [{'': exporter, **found} for exporter, found in results['exporters'].items()]
    tables = (tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True) for rows in (tools, exporters))
    return '\n'.join(
        (INTRODUCTION, next(tables), '', EXPORT, next(tables), '', f'{results["exported with"]}.', ''))


def main(names: Annotated[list[str] | None, typer.Argument(help=f'Of {", ".join(TOOLS)}; all by default.')] = None):
    """Try the tools named; what was found of the others stays."""
    find_timm_scripts()
    if unknown := set(names or ()) - set(TOOLS):
        sys.exit(f'{unknown.pop()}: must be one of {", ".join(TOOLS)}')
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {
        'tools': {}, 'exporters': {}, 'exported with': 'Not tried yet'}
    try_tools(names or list(TOOLS), results)


if __name__ == '__main__':
    typer.run(main)
