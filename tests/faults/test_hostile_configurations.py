"""A configuration from elsewhere, as of a Hub repository, that asks for too much is refused before it is built."""
import json
import math
import resource

import pytest
import timm
from typer.testing import CliRunner

from timm_deluge import cli

CONFIG = {'architecture': 'delugenet146', 'num_classes': 10, 'pretrained_cfg': {}}


@pytest.fixture
def memory_limit():
    """Make what is built nevertheless fail instead of the machine."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = 64 * 2 ** 30 if limits[1] == resource.RLIM_INFINITY else min(64 * 2 ** 30, limits[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize('config', [
    {'model_args': {'depths': [1_000_000] * 3}},
    {'model_args': {'depths': [8, 16, 1_000_000], 'widths': [1, 1, 1]}},
    {'model_args': {'widths': [32, 64, 1_000_000]}},
    {'model_args': {'in_chans': 1_000_000_000}},
    {'num_classes': 1_000_000_000},
    {'model_args': {'depths': [2, 0], 'widths': [3000, 300_000]}},
], ids=json.dumps)
def test_a_network_of_any_size_is_not_built(config, tmp_path, memory_limit):
    (tmp_path / 'config.json').write_text(json.dumps({**CONFIG, **config}))
    with pytest.raises(ValueError, match='this network has about .* parameters; at most 1,000,000,000 are built'):
        timm.create_model(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('model_args, error, message', [
    ({'depths': [1, 2]}, ValueError, 'must name the same number of blocks'),
    ({'aggregation': '__import__("os")'}, ValueError, "must be one of 'cross_layer', 'scalar'"),
    ({'num_classes': -10 ** 9, 'widths': [32, 64, 20_000]}, ValueError, 'num_classes=-1000000000: must be from 0 to '),
    ({'in_chans': 0}, ValueError, 'in_chans=0: must be from 1 to '),
    ({'widths': [32, 64, -128]}, ValueError, 'widths=-128: must be from 1 to 1,000,000,000'),
    ({'num_classes': math.nan}, ValueError, 'num_classes=nan: must be from 0 to '),
    ({'depths': [2], 'widths': [math.inf]}, ValueError, 'widths=inf: must be from 1 to '),
    ({'depths': [2], 'widths': [1e200]}, ValueError, 'widths=1e.200: must be from 1 to '),
    ({'depths': [-1, 2], 'widths': [4, 8]}, ValueError, 'depths=-1: must be from 0 to '),
    ({'stem_type': ['cifar']}, ValueError, "must be one of 'imagenet', 'cifar'"),
    ({'code': 'print(1)'}, TypeError, "unexpected keyword argument 'code'")], ids=str)
def test_what_is_no_option_is_refused(model_args, error, message, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({**CONFIG, 'model_args': model_args}))
    with pytest.raises(error, match=message):
        timm.create_model(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('config', [
    {**CONFIG, 'model_args': {'code': 1}}, {'num_classes': 10},
    *({**CONFIG, key: None} for key in ('model_args', 'pretrained_cfg', 'architecture'))], ids=json.dumps)
@pytest.mark.parametrize('command', ['connectivity', 'prune', 'report'])
def test_a_configuration_that_is_none_is_an_error_of_each_command(command, config, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    output = ['--output', str(tmp_path / 'pruned'), '--fraction', '0.3'] if command == 'prune' else []
    result = CliRunner().invoke(cli.app, [command, f'local-dir:{tmp_path}', *output])
    assert result.exit_code == 2 and 'error:' in result.stderr, result.exception
