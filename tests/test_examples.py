"""The examples run, on little data, and do what they say."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import FrozenBatchNormAct2d

EXAMPLES = Path(__file__).resolve().parent.parent / 'examples'


def example(name: str):
    return runpy.run_path(str(EXAMPLES / f'{name}.py'))


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['unet', 'deeplabv3plus'])
@pytest.mark.parametrize('encoder', ['tu-delugenet92', 'tu-delugenet122'])
def test_segmentation_learns(architecture, encoder):
    pytest.importorskip('segmentation_models_pytorch')
    losses = example('segmentation')['train'](architecture, encoder, steps=3, size=64)
    assert losses[-1] < losses[0] < 1


def test_segmentation_refuses_the_cifar_networks():
    smp = pytest.importorskip('segmentation_models_pytorch')
    with pytest.raises(ValueError, match='downsampling'):
        smp.create_model('unet', encoder_name='tu-delugenet146', encoder_weights=None)(torch.randn(1, 3, 64, 64))


def test_detection_trains_and_detects():
    pytest.importorskip('torchvision')
    detector = example('detection')['create_detector']('delugenet92')
    frozen = [module for module in detector.backbone.body.modules() if isinstance(module, FrozenBatchNormAct2d)]
    assert len(frozen) > 80 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in detector.backbone.modules())
    image = torch.rand(3, 96, 96)
    losses = detector([image], [{'boxes': torch.tensor([[10., 10., 60., 60.]]), 'labels': torch.tensor([1])}])
    sum(losses.values()).backward()
    gradients = [p.grad for p in detector.backbone.body.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    (found,) = detector.eval()([image])
    assert set(found) == {'boxes', 'labels', 'scores'} and found['boxes'].shape[1] == 4


@pytest.mark.slow
def test_frozen_features_tell_colours_apart(tmp_path):
    pytest.importorskip('sklearn')
    rng = np.random.default_rng(0)
    for split, count in (('train', 20), ('test', 5)):
        for c, colour in enumerate(('blue', 'red')):
            for i in range(count):
                noise = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
                noise[..., 2 - 2 * c] += 150
                path = tmp_path / split / colour / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise).save(path)
    command = [sys.executable, str(EXAMPLES / 'frozen_features.py'), 'delugenet146', str(tmp_path / 'train'),
               str(tmp_path / 'test'), '--num-train', '20']
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert printed == {'model': 'delugenet146', 'data': tmp_path.name, 'train images': 20, 'test images': 10,
                       'nearest neighbours': 100.0, 'linear probe': 100.0}
    of_both = [*command[:3], str(tmp_path), *command[4:]]
    refused = subprocess.run(of_both, capture_output=True, text=True)
    assert refused.returncode == 2
    assert 'is not in the folder of its class' in ' '.join(refused.stderr.replace('│', ' ').split())
    (tmp_path / 'test' / 'red').rename(tmp_path / 'test' / 'green')
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and 'only one has any in green' in ' '.join(refused.stderr.split())


def test_muon_runs_in_float32_where_the_processor_has_no_bfloat16(tmp_path):
    script = tmp_path / 'train.py'
    script.write_text('import torch\nfrom timm.optim import muon\n'
                      'update = muon.zeropower_via_newtonschulz(torch.randn(8, 4), 5, [(3.4445, -4.775, 2.0315)])\n'
                      'print(update.dtype, muon.zeropower_via_newtonschulz.func.__name__)\n')
    command = [sys.executable, str(EXAMPLES / 'train_without_bf16.py'), str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['torch.float32', 'zeropower_via_newtonschulz']
