"""Whatever is wrong on the command line, it ends with 1 or 2 and one clear line, and nothing is left behind."""
from itertools import chain

import pytest
from test_cli import invoke

MODEL = 'delugenet146'
ADD = dict(tag='x_y', recipe='imagenet', dataset='d', provenance='p', hardware='h')
LONG = 'a' * 300
NUMBERS = ('x', '', '1.5', '-1', 'nan')


def options(command: str, **values: str) -> list[str]:
    given = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return [*command.split(), *chain(*given)]


BAD = [
    ['nonsense'], ['--nonsense'], ['weights', 'nonsense'],
    *([command, '--nonsense'] for command in (
        'predict', 'report', 'connectivity', 'prune', 'demo', 'validate', 'publish', 'recipe')),
    *(['weights', command, '--nonsense'] for command in ('add', 'list', 'verify', 'download', 'show')),
    *(['predict', image] for image in ('absent.jpg', '', 'absent/*.jpg', '/dev/null', '\n', 'a' * 5000)),
    *(options('predict', model=model) for model in ('', 'nonsense', 'delugenet1', 'delugenet146.x', 'resnet18')),
    *(options('predict', top=number) for number in (*NUMBERS, '0')),
    *(options('predict', batch_size=number) for number in (*NUMBERS, '0')),
    *(options('predict', device=device) for device in ('', 'gpu', 'cuda:99', 'cpu:x', 'meta:')),
    ['predict', '--model'],
    ['report'], *(['report', name] for name in (
        '', 'nonsense', 'delugenet146.x', 'hf-hub:', 'local-dir:', 'local-dir:absent', 'DELUGENET146')),
    *(options('report delugenet146', format=text) for text in ('', 'xml', 'JSON ')),
    *(options('report delugenet146', model_kwargs=text) for text in (
        '', '=', '=1', 'aggregation', 'aggregation=sum', 'nonsense=1', 'depths=1', 'output_stride=3', 'widths=(1,)',
        'global_pool=False')),
    ['connectivity'], *(['connectivity', source] for source in (
        '', 'nonsense', 'resnetlike146_1x1', 'absent.safetensors', '/dev/null', '/', 'delugenet146.x',
        'local-dir:absent', LONG)),
    *(options('connectivity delugenet146', output=path) for path in ('', 'x', 'x.gif', '.png/x', 'absent/x.png')),
    ['prune'], ['prune', MODEL],
    *(options(f'prune {name}', output='{new}', fraction='0.3') for name in (
        'nonsense', 'resnetlike146_1x1', 'delugenet146.x')),
    *(options(f'prune {MODEL}', output='{new}', fraction=number) for number in ('x', '', '-0.1', '1.1', '1')),
    *(options(f'prune {MODEL}', output='{new}', fraction='0.3', by=by) for by in ('', 'size', 'taylor')),
    *(options(f'prune {MODEL}', output='{new}', fraction='0.3', by='taylor', data_dir=path) for path in (
        'absent', '/dev/null')),
    *(options(f'prune {MODEL}', output=path, fraction='0.3') for path in ('.', LONG)),
    options(f'prune {MODEL}', output='{new}', fraction='0.3', seed='x'),
    *(options('demo', port=port) for port in ('x', '0', '65536', '')),
    *(options('demo', model=name) for name in ('nonsense', 'resnetlike146_3x3')),
    ['validate'], ['validate', MODEL], options('validate nonsense', data_dir='.'),
    *(options(f'validate {MODEL}', data_dir=path) for path in ('', 'absent', '/dev/null', LONG)),
    *(options(f'validate {MODEL}', data_dir='.', **{name: value}) for name, value in (
        ('batch_size', '0'), ('workers', '-1'), ('device', 'gpu'))),
    ['weights', 'add'], options('weights add absent', **ADD), options('weights add absent', data_dir='.', **ADD),
    options('weights add absent', data_dir='.', **{**ADD, 'recipe': 'nonsense'}),
    ['weights', 'show'], *(['weights', 'show', name] for name in ('', 'nonsense', 'delugenet146.x', '.')),
    ['weights', 'download'], *(['weights', 'download', name] for name in ('', 'nonsense', 'delugenet146.x')),
    ['publish'], ['publish', MODEL], options('publish nonsense', repo_id='a/b'),
    *([*options(f'publish {MODEL}', repo_id=repo), '--dry-run'] for repo in (
        '', 'bad repo id', 'a/b/c', 'a/', '-/-', 'a--b/..')),
    *(['recipe', name] for name in ('', 'nonsense', '../pyproject', 'imagenet.yaml')),
]


@pytest.mark.parametrize('arguments', BAD, ids=lambda arguments: ' '.join(arguments)[:60] or 'nothing')
def test_bad_options_are_refused_in_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*(text.replace('{new}', 'new') for text in arguments))
    assert result.exit_code in (1, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert 'Traceback' not in result.output and result.stderr.strip()
    assert 'error:' not in result.stderr or len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
