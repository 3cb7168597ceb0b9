"""Try the tools that take a network of timm, each in a fresh environment, and write down what works: tools.md.

    TIMM_SCRIPTS=path/to/pytorch-image-models python reports/tools.py
"""
import ast
import os
import platform
import subprocess
import sys
import venv
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from junit import REPOSITORY, Outcome, run_tests
from tabulate import tabulate

REPORT = REPOSITORY / 'reports' / 'tools.md'
TESTS = REPOSITORY / 'tests' / 'tools'
EXPORTED = 'delugenet146'
EXPORTERS = ('onnx', 'onnxscript', 'onnxruntime')
# what `pip install` takes for the tests of each, by their names
TOOLS = {
    'transformers': ('transformers[torch]',), 'fastai': ('fastai',), 'lightning': ('lightning',),
    'grad_cam': ('grad-cam',), 'torchinfo': ('torchinfo',), 'torchao': ('torchao',),
    'timm': ('pandas', 'onnx', 'onnxruntime')}  # which its scripts need
INTRODUCTION = """# Tools that take a DelugeNet

Written by `python reports/tools.py`. Each tool was installed beside this package into an environment of its own, and
given a network as it is; the tests are in `tests/tools`.
"""
EXPORT = f"""## Exporters and compilers

All of `{EXPORTED}`, in inference, with the largest difference of any output for two sizes of batch, relative to the
largest output. A reparameterised network is what `timm.utils.reparameterize_model` makes.
"""


def install(folder: Path, *packages: str, base: Path | None = None) -> Path:
    """Make an environment, and see what another one has.

    Args:
        folder: Where.
        packages: What pip installs.
        base: Folder of the other environment.

    Returns:
        Its interpreter.
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
    """Get what each test says that it tries."""
    tree = ast.parse((TESTS / 'test_other_tools.py').read_text(encoding='utf-8'))
    return {node.name: ast.get_docstring(node) or '' for node in tree.body if isinstance(node, ast.FunctionDef)}


def result(outcome: Outcome) -> str:
    return {'passed': 'works'}.get(outcome.kind, f'{outcome.kind}: {outcome.message}').replace('\n', ' ')


def main() -> None:
    if not os.environ.get('TIMM_SCRIPTS'):
        sys.exit("TIMM_SCRIPTS: name a checkout of timm's repository, whose scripts are tried, too")
    tried = descriptions()
    rows, forms = [], {}
    with TemporaryDirectory() as folder:
        base = Path(folder, 'base')
        python = install(base, str(REPOSITORY), 'pytest', 'pytest-timeout')
        torch = version(python, 'torch')
        for name, packages in TOOLS.items():
            python = install(Path(folder, name), *packages, base=base)
            tool = name.replace('_', '-')
            label = f'{tool} {version(python, tool)}'
            for outcome in run_tests(python, TESTS / 'test_other_tools.py', '-k', f'test_{name}'):
                rows.append((label, tried[outcome.name], result(outcome)))
        python = install(Path(folder, 'export'), *EXPORTERS, base=base)
        versions = ', '.join(f'{package} {version(python, package)}' for package in EXPORTERS)
        for outcome in run_tests(python, TESTS / 'test_export.py', '--timeout=3600', EXPORTED=EXPORTED):
            exporter, _, form = outcome.name.partition('[')[2][:-1].rpartition('-')
            difference = outcome.properties.get('difference', '')
            forms.setdefault(exporter, {})[form] = f'{result(outcome)}, {difference}'.rstrip(', ')
    tools = tabulate(rows, ('tool', 'what', ''), tablefmt='github', disable_numparse=True)
    exporters = tabulate([{'': exporter, **found} for exporter, found in forms.items()], headers='keys',
                         tablefmt='github', disable_numparse=True)
    conditions = f'Python {platform.python_version()}, torch {torch}, {versions}, {date.today()}.'
    REPORT.write_text(f'{INTRODUCTION}\n{tools}\n\n{EXPORT}\n{exporters}\n\n{conditions}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
