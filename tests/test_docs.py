"""What the documentation shows runs as it stands."""
import os
import re
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / 'docs'


def run_python_of(page, names, text=''):
    text = text or page.read_text(encoding='utf-8')
    blocks = re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        if 'download=True' not in block:
            exec(compile(block, str(page), 'exec'), names)
    assert len(blocks) > 1


@pytest.mark.slow
@pytest.mark.parametrize('page', sorted(DOCS.glob('*.md')), ids=lambda path: path.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    run_python_of(page, {'folder': tmp_path / 'folder'})


@pytest.mark.slow
def test_python_of_the_readme_runs(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    page = REPOSITORY / 'README.md'
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    text = page.read_text(encoding='utf-8').replace('path/to/checkout', str(REPOSITORY))
    run_python_of(page, {'loader': [(images, targets)], 'images': images}, text)


@pytest.mark.parametrize('page', sorted(
    page for folder in ('.', 'benchmarks', 'docs', 'reports') for page in (REPOSITORY / folder).glob('*.md')
), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_of_a_page_lead_somewhere(page):
    for link, anchor in re.findall(r'\]\(([^)#\s]*)(?:#([^)\s]+))?[^)]*\)', page.read_text(encoding='utf-8')):
        if '://' in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            titles = re.findall('^#+ (.+)$', target.read_text(encoding='utf-8'), re.MULTILINE)
            assert anchor in {re.sub(r'[^\w\- ]', '', title).lower().replace(' ', '-') for title in titles}, anchor


@pytest.mark.slow
def test_the_tour_runs(monkeypatch):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    monkeypatch.setenv('PYTHONPATH', str(DOCS.parent), prepend=os.pathsep)
    notebook = nbformat.read(DOCS / 'tour.ipynb', as_version=4)

    def numbers_of_layers():
        outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
        return re.findall(r'\d+ layers', ''.join(output.get('text', '') for output in outputs))

    expected = numbers_of_layers()
    nbclient.NotebookClient(notebook, timeout=500, resources={'metadata': {'path': str(DOCS)}}).execute()
    assert len(expected) == 2 and numbers_of_layers() == expected
    last = notebook.cells[-1].outputs[-1]['text']
    accuracy = re.fullmatch(r'([\d.]+)% of 400 digits that it has not seen\n', last)
    assert accuracy and float(accuracy[1]) > 50, last
