"""Reports count everything, for any model of timm, and say what they leave out."""
import csv
import json

import pytest
import timm
import torch
from torch import nn

from timm_deluge.paper import PUBLISHED
from timm_deluge.report import create_report, format_reports

# what no convention counts: activations, pooling, the residual sum, the sum of a cross-layer convolution's biases
UNCOUNTED = {'relu_', 'max_pool2d', 'add', 'sum'}


@pytest.mark.parametrize('name', ['delugenet92', 'delugenet146', 'resnetlike146_3x3', 'resnetlike146_1x1'])
def test_no_operator_of_ours_is_silently_uncounted(name):
    report = create_report(name)
    assert report.uncounted.keys() <= UNCOUNTED
    assert report.uncounted['relu_'] == sum(isinstance(m, nn.ReLU) for m in timm.create_model(name).modules())
    assert (report.cross_layer_macs > 0) == (report.cross_layer_params > 0) == name.startswith('delugenet')


def test_uncounted_operators_are_named(monkeypatch):
    class Model(nn.Module):
        pretrained_cfg = {'input_size': (3, 8, 8)}

        def forward(self, x):
            return torch.cumsum(x.cos().relu(), 1)

    monkeypatch.setattr(timm, 'create_model', lambda name, **_: Model())
    assert create_report('any').uncounted == {'cos': 1, 'cumsum': 1, 'relu': 1}


@pytest.mark.parametrize('name', ['delugenet92', 'delugenet146', 'densenet121'])
def test_blocks_add_up(name):
    report = create_report(name)
    for key in ('params', 'macs', 'flops', 'paper_flops', 'cross_layer_params', 'cross_layer_macs',
                'cross_layer_flops', 'cross_layer_paper_flops'):
        assert sum(getattr(b, key) for b in report.blocks) == getattr(report, key)


def test_cross_layer_share_by_hand():
    report = create_report('delugenet146')
    elements = 0
    for depth, channels, size in ((7, 64, 32), (16, 128, 16), (24, 256, 8)):
        elements += sum(range(2, depth + 2)) * channels * size * size
    assert report.cross_layer_macs == elements
    assert report.cross_layer_paper_flops == 3 * elements
    normalised = 8 * 64 * 32 * 32 + 17 * 128 * 16 * 16 + 25 * 256 * 8 * 8
    assert report.cross_layer_flops == elements + normalised


def test_convolutional_model_of_timm():
    report = create_report('resnet18')
    assert (report.params, report.macs, report.cross_layer_macs) == (11_689_512, 1_814_073_344, 0)


def test_other_channels_than_usual():
    assert create_report('delugenet146', in_chans=1).input_size == (1, 32, 32)


def test_another_image_size_than_usual():
    assert create_report('vit_tiny_patch16_224', img_size=64).input_size == (3, 64, 64)


def test_fused_attention_counts_as_the_plain_one(monkeypatch):
    fused = create_report('vit_tiny_patch16_224')
    monkeypatch.setattr(timm.layers.config, '_USE_FUSED_ATTN', 0)
    plain = create_report('vit_tiny_patch16_224')
    assert 'softmax' in plain.uncounted and 'softmax' not in fused.uncounted
    assert plain.macs == fused.macs


def test_formats_agree():
    reports = [create_report(n) for n in ('delugenet146', 'resnetlike146_1x1')]
    data = json.loads(format_reports(reports, 'json'))
    rows = list(csv.DictReader(format_reports(reports, 'csv').splitlines()))
    for entry, report in zip(data, reports, strict=True):
        assert entry['paper_flops'] == report.paper_flops
        own = [r for r in rows if r['model'] == report.name]
        assert int(own[0]['params']) == report.params and own[0]['name'] == ''
        assert [r['name'] for r in own[1:]] == [b['name'] for b in entry['blocks']]
    for fmt in ('markdown', 'table'):
        text = format_reports(reports, fmt)
        assert '6,709,380' in text and f'{PUBLISHED["delugenet146"].gflops}' in text and 'add 48×' in text
    with pytest.raises(ValueError, match="format 'xml'"):
        format_reports(reports, 'xml')
