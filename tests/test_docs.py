"""What the documentation shows runs as it stands."""
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / 'docs'


@pytest.mark.parametrize('page', sorted(DOCS.glob('*.md')), ids=lambda path: path.stem)
def test_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    blocks = re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
    names = {'folder': tmp_path / 'folder'}
    for block in blocks:
        exec(compile(block, str(page), 'exec'), names)
    assert blocks
