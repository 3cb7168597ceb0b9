"""Training on one GPU, tried on a processor: timm's Muon, timm's crops, and what a checkpoint is made of."""
import csv
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.optim.muon import zeropower_via_newtonschulz

from timm_deluge.recipes import recipe_path

EXAMPLE = Path(__file__).resolve().parent.parent / 'examples' / 'train_on_gpu.py'
CROPS = dict(scale=(0.5, 1.), ratio=(0.8, 1.25), hflip=0.5)


@pytest.fixture(scope='module')
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two classes that a network can tell apart: dark and bright pictures."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split in 'train', 'validation':
        for name, low in ('bright', 160), ('dark', 0):
            (folder / split / name).mkdir(parents=True)
            for i in range(16):
                pixels = rng.integers(low, low + 96, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{i}.png')
    return folder


def recipe(tmp_path, **options) -> Path:
    text = yaml.safe_load(recipe_path('cifar100_baselines').read_text())
    text.update({
        'device': 'cuda' if torch.cuda.is_available() else 'cpu', 'num_classes': 2, 'epochs': 2,
        'train_img_sizes': [16, 24], 'batch_size': 16, 'warmup_epochs': 0, **options})
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(text))
    return path


def test_data_that_cannot_be_trained_on_leave_nothing_behind(images, tmp_path):
    def errors(data_dir, **options):
        command = [sys.executable, EXAMPLE, recipe(tmp_path, **options), data_dir, '--output', tmp_path / 'output']
        return subprocess.run(command, capture_output=True, text=True).stderr

    assert '32 training images, fewer than a batch of 64' in errors(images, batch_size=64)
    assert 'interpolation: lanczos is not known here' in errors(images, interpolation='lanczos')
    assert 'Plateau LR only supports step per epoch' in errors(images, sched='plateau')
    assert '2 classes; the recipe is for 100' in errors(images, num_classes=100)
    assert 'no adjust_lr_fn and ns_coefficients of your own' in errors(images, opt_kwargs={'adjust_lr_fn': None})
    assert 'ns_coefficients of your own' in errors(images, opt_kwargs={'ns_coefficients': [3.4445, -4.775, 2.0315]})
    copy = tmp_path / 'copy'
    shutil.copytree(images, copy)
    shutil.rmtree(copy / 'validation' / 'bright')
    assert 'must have images of the same classes; only one has any in bright' in errors(copy)
    assert 'val_interval: expected 1 or more epochs, got 0' in errors(images, val_interval=0)
    if not torch.cuda.is_available():
        assert 'finds no GPU; to train on the CPU, write `device: cpu`' in errors(images, device='cuda')
    first = images / 'validation' / 'bright' / '0.png'
    other = copy / 'validation' / 'dark' / '3.png'
    shutil.copytree(images / 'validation' / 'bright', copy / 'validation' / 'bright')
    Image.new('RGB', (32, 24)).save(other)
    assert f'3.png: has 32x24 pixels, {copy / first.relative_to(images)} 32x32' in errors(copy)
    other.write_bytes(first.read_bytes()[:200])
    assert '3.png: cannot be read' in errors(copy)
    assert not (tmp_path / 'output').exists()
    (tmp_path / 'output').mkdir()
    assert 'output exists: name a folder that does not' in errors(images)
    assert not list((tmp_path / 'output').iterdir())


def test_a_step_is_that_of_timms_muon(example, monkeypatch):
    def exact(*args, **kwargs):  # a batch of bfloat16 products may round otherwise than one by one
        return zeropower_via_newtonschulz(*args, **{**kwargs, 'dtype': torch.float64})

    name = zeropower_via_newtonschulz.__name__
    monkeypatch.setattr(timm.optim.muon, name, exact)
    monkeypatch.setitem(example['BatchedMuon'].take_learning_rates.__globals__, name, exact)
    torch.manual_seed(0)
    ours, theirs = timm.create_model('delugenet146', num_classes=10), timm.create_model('delugenet146', num_classes=10)
    theirs.load_state_dict(ours.state_dict())
    options = dict(lr=0.01, weight_decay=0.05, momentum=0.95, fallback_lr_scale=0.3)
    optimizers = [create_optimizer_v2(model, 'muon', **options) for model in (ours, theirs)]
    muon = example['BatchedMuon'](optimizers[0])
    for step in range(2):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = 0.01 / (1 + step)  # as a scheduler does
        muon.take_learning_rates()
        muon.step()
        optimizers[1].step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_whole_image_stays_as_it_is(example):
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    for mode in 'rrc', 'rkrr':
        args = Namespace(train_crop_mode=mode, scale=(1, 1), ratio=(1, 1), hflip=0.)
        torch.testing.assert_close(example['augment'](images, 32, args), images.permute(0, 3, 1, 2).float())
        args.hflip = 1.
        flipped = example['augment'](images, 32, args).flip(3)
        torch.testing.assert_close(flipped, images.permute(0, 3, 1, 2).float(), rtol=0, atol=1e-3)


def test_a_smaller_image_sees_every_pixel(example):
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    args = Namespace(train_crop_mode='rrc', scale=(1, 1), ratio=(1, 1), hflip=0.)
    halved = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2)
    torch.testing.assert_close(example['augment'](images, 16, args), halved)


@pytest.mark.parametrize('mode', ['rrc', 'rkrr'])
def test_crops_are_as_large_as_timms(example, mode):
    torch.manual_seed(0)
    gradient = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(2000, 32, 32, 3)
    cropped = example['augment'](gradient, 32, Namespace(train_crop_mode=mode, **CROPS))
    width = (cropped[..., 16, 20] - cropped[..., 16, 12])[:, 0].abs() / 8  # of the crop, as a part of the image's
    if mode == 'rrc':
        random.seed(0)
        image = Image.new('RGB', (320, 320))
        get_params = timm.data.transforms.RandomResizedCropAndInterpolation.get_params
        expected = mean(get_params(image, CROPS['scale'], CROPS['ratio'])[3] / 320 for _ in range(20000))
        largest = 1.
    else:  # every other image
        expected = (1 + torch.empty(20000).uniform_(0.5, 1.).sqrt().mean().item()) / 2
        largest = math.sqrt(1.25)
    assert width.mean().item() == pytest.approx(expected, abs=0.01)
    assert width.max() <= largest + 0.01
    turned = example['augment'](gradient.transpose(1, 2), 32, Namespace(train_crop_mode=mode, **CROPS))
    height = (turned[..., 20, 16] - turned[..., 12, 16])[:, 0].abs() / 8
    assert height.mean().item() == pytest.approx(expected, abs=0.01) and height.max() <= largest + 0.01
    for centre in cropped[..., 16, 15:17], turned[..., 15:17, 16]:
        offset = centre.mean((1, 2)) - 15.5
        assert offset.min() < -3 and offset.max() > 3 and abs(offset.mean()) < 0.3


@pytest.mark.parametrize('size', [8, 4])
def test_evaluation_counts_right_answers(example, size):
    levels = torch.linspace(-1, 1, 10)

    class Nearest(torch.nn.Module):
        def forward(self, x):
            return -10 * (x.mean((1, 2, 3))[:, None] - levels).abs()

    images = (128 + 64 * levels).round().to(torch.uint8)[:, None, None, None].expand(10, 8, 8, 3)
    targets = torch.tensor([0, 1, 2, 3, 4, 5, 9, 9, 0, 0])
    args = Namespace(input_size=(3, size, size), interpolation='bicubic', validation_batch_size=4,
                     mean_=torch.tensor(128.), std_=torch.tensor(64.))
    found = example['evaluate'](Nearest(), images, targets, args)
    assert (found['top1'], found['top5']) == (60, 70)


def test_erases_as_often_as_asked(example):
    torch.manual_seed(0)
    erased = example['erase'](torch.ones(2000, 3, 32, 32), 0.25)
    parts = 1 - erased[:, 0].mean((1, 2))
    assert (parts > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert parts[parts > 0].mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    assert torch.equal(erased[:, 0], erased[:, 2])


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_a_checkpoint_needs(images, tmp_path):
    path = recipe(tmp_path, epochs=6, train_img_sizes=[16] * 6, lr=0.005, smoothing=0.)
    subprocess.run(
        [sys.executable, EXAMPLE, path, images, '--output', tmp_path / 'run', '--val-interval', '1', '--seed', '7',
         '--model-kwargs', 'drop_rate=0.1'], check=True,
        env={name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'})  # it takes a GPU
    rows = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))
    assert [int(row['epoch']) for row in rows] == list(range(6))
    assert float(rows[-1]['train_loss']) < 0.7 * float(rows[0]['train_loss'])
    left = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)
    timm.create_model('delugenet146', num_classes=2).load_state_dict(left['state_dict'])
    args = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert (args['model'], args['epochs'], args['train_split'], args['seed']) == ('delugenet146', 6, 'train', 7)
    assert args['model_kwargs'] == {'drop_rate': 0.1}


def test_a_folder_that_is_not_there_is_named_before_anything_is_written(images, tmp_path):
    command = [sys.executable, EXAMPLE, recipe(tmp_path), images, '--output', tmp_path / 'run', '--val-split', 'absent']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and 'absent: no such folder' in result.stderr
    assert not (tmp_path / 'run').exists()


def test_an_unknown_option_is_refused_by_name(example, tmp_path):
    with pytest.raises(ValueError, match='cutmix: 1.0 is not known here; train by timm'):
        example['read_recipe'](recipe(tmp_path, cutmix=1.0))
    with pytest.raises(ValueError, match='initial_checkpoint: start.safetensors is not known here'):
        example['read_recipe'](recipe(tmp_path, initial_checkpoint='start.safetensors'))
    with pytest.raises(ValueError, match='crop_pct: 0.875 is not known here'):
        example['read_recipe'](recipe(tmp_path, crop_pct=0.875))
    with pytest.raises(ValueError, match='only opt: muon'):
        example['read_recipe'](recipe(tmp_path, opt='sgd'))
    with pytest.raises(ValueError, match='input_size: expected 3 channels'):
        example['read_recipe'](recipe(tmp_path, input_size=[1, 32, 32]))
    with pytest.raises(ValueError, match='train_img_sizes: expected one for each of 3 epochs'):
        example['read_recipe'](recipe(tmp_path, epochs=3))
    with pytest.raises(ValueError, match='says nothing of amp, where train.py does something else'):
        example['read_recipe'](Path(recipe_path('cifar10_delugenet146')))
    path = recipe(tmp_path, val_interval=1)
    assert example['read_recipe'](path)['val_interval'] == 1
    for name in 'remode', 'train_size_schedule', 'warmup_lr', 'crop_pct', 'num_classes':
        path.write_text(''.join(line for line in recipe(tmp_path).open() if not line.startswith(f'{name}:')))
        with pytest.raises(ValueError, match=f'says nothing of {name}, where train.py does something else'):
            example['read_recipe'](path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_graph_does_what_it_captured(example):
    device = torch.device('cuda')
    total, addend = torch.zeros((), device=device), torch.ones((), device=device)
    step = example['GraphedStep'](lambda: total.add_(addend), device)
    for i in range(6):
        addend.fill_(i)
        step()
    assert total.item() == sum(range(6)) and step.graph is not None
