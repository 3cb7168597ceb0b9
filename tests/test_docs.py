"""What the documentation shows runs as it stands."""
import os
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / 'docs'


@pytest.mark.slow
@pytest.mark.parametrize('page', sorted(DOCS.glob('*.md')), ids=lambda path: path.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    blocks = re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
    names = {'folder': tmp_path / 'folder'}
    for block in blocks:
        exec(compile(block, str(page), 'exec'), names)
    assert blocks


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
