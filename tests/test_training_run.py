"""A training run becomes a checkpoint with a measured accuracy, and the measurement can be repeated."""
import json
import os
import time
from argparse import Namespace
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image
from test_cli import invoke
from typer.testing import CliRunner

from timm_deluge import cli, settle, training_run, weights
from timm_deluge.card import model_card
from timm_deluge.training_run import add_checkpoint
from timm_deluge.validate import accuracy, create_validation_loader, rank_targets

PROVENANCE = dict(recipe='cifar100_delugenet146', dataset_name='Noise', provenance='numpy', hardware='none')


def write_args(folder, args):
    """Write a run's options, as if an hour ago, when it was started."""
    path = folder / 'args.yaml'
    path.write_text(yaml.safe_dump(args))
    os.utime(path, (time.time() - 3600,) * 2)


@pytest.fixture
def data_dir(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 2), ('validation', 7)):
        for c in range(3):
            for i in range(count):
                path = tmp_path / 'data' / split / f'class_{5 * c}' / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / 'data'


@pytest.fixture
def run_dir(tmp_path):
    """What timm's train.py leaves behind."""
    torch.manual_seed(0)
    model = timm.create_model('resnetlike146_1x1', num_classes=3).to(memory_format=torch.channels_last)
    folder = tmp_path / 'run'
    folder.mkdir()
    args = dict(model='resnetlike146_1x1', train_split='train', val_split='validation', epochs=8, seed=42,
                input_size=None, mean=[0.4, 0.4, 0.4], std=[0.2, 0.2, 0.2], interpolation='bilinear', crop_pct=1.0)
    write_args(folder, args)
    (folder / 'summary.csv').write_text('epoch,train_loss\n6,1.5\n7,1.4\n')
    torch.save({'state_dict': model.state_dict()}, folder / 'last.pth.tar')
    return folder


def add(run_dir, data_dir, **options):
    """Call `weights add`."""
    options = {'tag': 'test_noise', 'data-dir': data_dir, 'recipe': 'cifar100_delugenet146', 'dataset': 'Noise',
               'provenance': 'numpy', 'hardware': 'none', **options}
    return invoke('weights', 'add', run_dir, *chain(*((f'--{name}', value) for name, value in options.items())))


@pytest.fixture
def weights_dir(tmp_path, monkeypatch):
    folder = tmp_path / 'weights'
    folder.mkdir()
    (folder / 'manifest.json').write_text('{"checkpoints": []}')
    monkeypatch.setattr(weights, 'weights_dir', lambda: folder)
    monkeypatch.setattr('timm_deluge.training_run.weights_dir', lambda: folder)
    monkeypatch.setattr('timm_deluge.training_run.LOGS', tmp_path / 'reports' / 'training')
    (tmp_path / 'reports').mkdir()
    return folder


def test_accuracy_counts_right_answers():
    logits = torch.eye(10)[[0, 1, 2, 3]] + torch.tensor([0.] * 5 + [-1.] * 5)
    ranks = rank_targets(
        torch.nn.Identity(), [(logits[:2], torch.tensor([0, 2])), (logits[2:], torch.tensor([9, 3]))])
    assert accuracy(ranks) == dict(top1=50, top5=75, num_images=4)
    names = ['a.png', 'b.png', 'c.png', 'd.png']
    exact = dict(top1=66.67, top5=100, num_images=3)
    assert accuracy(ranks, names, ['c.png']) == dict(top1=50, top5=75, num_images=4, exact=exact)
    assert 'exact' not in accuracy(ranks, names, ['c.png', 'absent.png'])


def test_run_becomes_a_checkpoint(run_dir, data_dir, weights_dir):
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert weights.list_checkpoints() == [checkpoint] == [weights.find_checkpoint('resnetlike146_1x1.test_noise')]
    weights.verify_checkpoint(checkpoint)
    assert checkpoint.path.stat().st_mode & 0o777 == 0o644
    assert checkpoint.class_names == ['class_0', 'class_5', 'class_10']  # timm's natural order
    assert (checkpoint.epochs, checkpoint.seed, checkpoint.mean, checkpoint.std) == (8, 42, [0.4] * 3, [0.2] * 3)
    assert (checkpoint.crop_pct, checkpoint.interpolation) == (1.0, 'bilinear')
    assert (checkpoint.dataset['train_images'], checkpoint.dataset['test_images']) == (6, 21)
    trained = torch.load(run_dir / 'last.pth.tar')['state_dict']
    published = safetensors.torch.load_file(checkpoint.path)
    assert all(torch.equal(v, trained[k].half() if trained[k].is_floating_point() else trained[k])
               for k, v in published.items())

    model = timm.create_model('resnetlike146_1x1', num_classes=3).eval()
    model.load_state_dict(published)
    mean, std = 0.4, 0.2
    hits = 0
    for c in range(3):
        for path in sorted((data_dir / 'validation' / f'class_{5 * c}').iterdir()):
            x = (torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255 - mean) / std
            hits += int(model(x).argmax() == c)
    assert checkpoint.metrics == dict(top1=round(100 * hits / 21, 2), top5=100.0, num_images=21)

    again = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert weights.list_checkpoints() == [again]


def test_a_run_resumed_in_its_own_folder_has_two_headers(run_dir, data_dir, weights_dir):
    (run_dir / 'summary.csv').write_text('epoch,train_loss\n6,1.5\nepoch,train_loss\n7,1.4\n')
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert checkpoint.epochs == 8
    log = weights_dir.parent / 'reports' / 'training' / f'{checkpoint.name}.csv'
    assert log.read_text() == 'epoch,train_loss\n6,1.5\n7,1.4\n'


@pytest.mark.parametrize('model_ema', [True, False])
def test_the_moving_average_is_published_where_there_is_one(run_dir, data_dir, weights_dir, model_ema):
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    write_args(run_dir, {**args, 'model_ema': model_ema, 'model_ema_decay': 0.99})
    trained = torch.load(run_dir / 'last.pth.tar')['state_dict']
    average = {name: tensor + 1 for name, tensor in trained.items()}
    torch.save({'state_dict': trained, 'state_dict_ema': average}, run_dir / 'last.pth.tar')
    result = add(run_dir, data_dir)
    assert result.exit_code == 0, result.output
    assert ('moving average, decay 0.99' if model_ema else 'last weights') in result.stdout
    (checkpoint,) = weights.list_checkpoints()
    assert checkpoint.ema_decay == (0.99 if model_ema else None)
    published, expected = weights.load_checkpoint(checkpoint), average if model_ema else trained
    assert torch.equal(published['norm.bias'], expected['norm.bias'].half())
    assert ('weights averaged with decay 0.99' in model_card([checkpoint])) == model_ema


def test_large_checkpoint_is_split(run_dir, data_dir, weights_dir, monkeypatch):
    monkeypatch.setattr('timm_deluge.training_run.PART_BYTES', 5 * 2 ** 20)
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert [Path(part['file']).suffix for part in checkpoint.parts] == ['.safetensors'] * 3 + ['.json']
    trained = torch.load(run_dir / 'last.pth.tar')['state_dict']
    published = weights.load_checkpoint(checkpoint)
    assert published.keys() == trained.keys()
    assert all(torch.equal(v, trained[k].half() if trained[k].is_floating_point() else trained[k])
               for k, v in published.items())


def test_log_of_a_resumed_run_has_every_epoch_once(run_dir, data_dir, weights_dir, tmp_path):
    first = tmp_path / 'first'
    first.mkdir()
    for name in ('args.yaml', 'last.pth.tar'):
        (first / name).write_bytes((run_dir / name).read_bytes())
    (first / 'summary.csv').write_text('epoch,train_loss\n5,1.7\n6,1.6\n')
    add_checkpoint([first, run_dir], 'test_noise', data_dir, **PROVENANCE)
    log = tmp_path / 'reports' / 'training' / 'resnetlike146_1x1.test_noise.csv'
    assert log.read_text() == 'epoch,train_loss\n5,1.7\n6,1.5\n7,1.4\n'


def test_a_run_that_started_from_another_one_counts_on(run_dir, data_dir, weights_dir, tmp_path):
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    folders = [tmp_path / 'first', run_dir, tmp_path / 'resumed']
    for folder, arguments, rows in zip(folders, (
            {}, {'epochs': 3, 'initial_checkpoint': str(folders[0] / 'last.pth.tar')}, {'epochs': 3},
    ), ('6,1.7\n7,1.6\n', '0,1.8\n1,1.5\n', '1,1.4\n2,1.3\n')):
        folder.mkdir(exist_ok=True)
        write_args(folder, {**args, **arguments})
        (folder / 'summary.csv').write_text(f'epoch,train_loss\n{rows}')
        (folder / 'last.pth.tar').write_bytes((run_dir / 'last.pth.tar').read_bytes())
    with pytest.raises(ValueError, match='give the folder of the run that left it'):
        add_checkpoint(folders[1:], 'test_noise', data_dir, **PROVENANCE)
    with pytest.raises(ValueError, match='2 of 3 epochs are done'):
        add_checkpoint(folders[:2], 'test_noise', data_dir, **PROVENANCE)
    checkpoint = add_checkpoint(folders, 'test_noise', data_dir, **PROVENANCE)
    assert (checkpoint.epochs, checkpoint.base_model) == (11, None)
    log = tmp_path / 'reports' / 'training' / 'resnetlike146_1x1.test_noise.csv'
    assert log.read_text() == 'epoch,train_loss\n6,1.7\n7,1.6\n8,1.8\n9,1.4\n10,1.3\n'
    resumed = {  # by the same command with --resume
        'epochs': 3, 'initial_checkpoint': str(folders[0] / 'last.pth.tar'), 'resume': str(run_dir / 'last.pth.tar')}
    write_args(folders[2], {**args, **resumed})
    assert add_checkpoint(folders, 'test_noise', data_dir, **PROVENANCE).epochs == 11
    with pytest.raises(ValueError, match='epoch 0 is not there, as the run goes on from .* give the folder'):
        write_args(folders[2], {**args, **resumed, 'initial_checkpoint': ''})
        add_checkpoint(folders[2:], 'test_noise', data_dir, **PROVENANCE)


def test_runs_that_do_not_go_on_from_each_other_are_refused(run_dir, data_dir, weights_dir, tmp_path):
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    other = tmp_path / 'other'
    other.mkdir()
    for folder in (run_dir, other):
        (folder / 'summary.csv').write_text('epoch,train_loss\n0,1.6\n1,1.5\n')
    for arguments in ({}, {'resume': str(other / 'last.pth.tar')}):  # from scratch, or unknown from what
        write_args(other, {**args, 'epochs': 2, **arguments})
        with pytest.raises(ValueError, match='other: the run has a first epoch, as one of a folder before it has'):
            add_checkpoint([run_dir, other], 'test_noise', data_dir, **PROVENANCE)


def test_accuracy_without_inexact_images(run_dir, data_dir, weights_dir):
    inexact = ['class_5/3.png', 'class_0/0.png']
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE, inexact=inexact)
    assert checkpoint.dataset['inexact'] == sorted(inexact)
    assert (checkpoint.metrics['num_images'], checkpoint.metrics['exact']['num_images']) == (21, 19)
    with pytest.raises(ValueError, match="no image 'class_5/99.png', .* such as 'class_0/0.png'"):
        add_checkpoint([run_dir], 'test_other', data_dir, **PROVENANCE, inexact=['class_5/99.png'])
    assert weights.list_checkpoints() == [checkpoint]


def test_the_command_takes_every_option(run_dir, data_dir, weights_dir, tmp_path):
    (tmp_path / 'inexact.txt').write_text('class_5/3.png\n\n')
    (tmp_path / 'words.txt').write_text('class_0\tzero\nclass_5\tfive\n\nclass_10\tten\n')
    result = add(run_dir, data_dir, **{
        'inexact': tmp_path / 'inexact.txt', 'class-descriptions': tmp_path / 'words.txt', 'img-size': 24,
        'settled-images': 5, 'split': 'validation'})
    assert result.exit_code == 0, result.output
    (checkpoint,) = weights.list_checkpoints()
    assert checkpoint.dataset['inexact'] == ['class_5/3.png'] and checkpoint.dataset['split'] == 'validation'
    assert checkpoint.class_descriptions == {'class_0': 'zero', 'class_5': 'five', 'class_10': 'ten'}
    assert (checkpoint.input_size, checkpoint.settled_images) == ([3, 24, 24], 5)
    assert (checkpoint.dataset['name'], checkpoint.dataset['provenance']) == ('Noise', 'numpy')
    assert (checkpoint.hardware, checkpoint.recipe) == ('none', 'cifar100_delugenet146')
    model = timm.create_model('resnetlike146_1x1', num_classes=3)
    assert checkpoint.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert checkpoint.command == f'timm-deluge validate {checkpoint.name} --data-dir DIR/validation'
    refused = add(run_dir, data_dir, **{'base-model': checkpoint.name})
    assert refused.exit_code == 2 and 'no --initial-checkpoint' in ' '.join(refused.stderr.split())


def test_class_descriptions_are_taken_from_a_list_of_words(run_dir, data_dir, weights_dir):
    words = {'class_0': 'zero, nought', 'class_5': 'five', 'class_10': 'ten', 'class_99': 'of no class here'}
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE, class_descriptions=words)
    assert checkpoint.class_descriptions == {'class_0': 'zero, nought', 'class_5': 'five', 'class_10': 'ten'}
    del words['class_5']
    with pytest.raises(ValueError, match="the class folder 'class_5' has no description"):
        add_checkpoint([run_dir], 'test_other', data_dir, **PROVENANCE, class_descriptions=words)
    assert weights.list_checkpoints() == [checkpoint]


def test_checkpoint_that_training_started_from_is_recorded(run_dir, data_dir, weights_dir, tmp_path):
    base = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert base.base_model is None
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    write_args(run_dir, {**args, 'model': base.name, 'pretrained': True})
    tuned = add_checkpoint([run_dir], 'test_noise_ft_noise', data_dir, **PROVENANCE)
    assert (tuned.model, tuned.base_model) == ('resnetlike146_1x1', 'resnetlike146_1x1.test_noise')
    further = tmp_path / 'further'
    further.mkdir()
    write_args(further, {**args, 'epochs': 2, 'initial_checkpoint': str(run_dir / 'last.pth.tar')})
    (further / 'summary.csv').write_text('epoch,train_loss\n0,1.3\n1,1.2\n')
    (further / 'last.pth.tar').write_bytes((run_dir / 'last.pth.tar').read_bytes())
    on = add_checkpoint([run_dir, further], 'test_noise_on', data_dir, **PROVENANCE)
    assert (on.base_model, on.epochs) == ('resnetlike146_1x1.test_noise', 10)


def test_a_distilled_run_names_its_teacher(run_dir, data_dir, weights_dir):
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    assert add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE).teacher is None
    write_args(run_dir, {**args, 'kd_model_name': 'delugenet146.test_teacher'})
    distilled = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert distilled.teacher == 'delugenet146.test_teacher'
    further = run_dir.parent / 'further'
    further.mkdir()
    write_args(further, {**args, 'initial_checkpoint': str(run_dir / 'last.pth.tar')})
    for name in ('summary.csv', 'last.pth.tar'):
        (further / name).write_bytes((run_dir / name).read_bytes())
    assert add_checkpoint([run_dir, further], 'test_noise_on', data_dir, **PROVENANCE).teacher == distilled.teacher
    write_args(run_dir, {**args, 'kd_model_name': 'delugenet146'})
    with pytest.raises(ValueError, match='kd_model_name: delugenet146: the checkpoint that was the default then'):
        add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert 'with `delugenet146.test_teacher` as teacher (distillation)' in model_card([distilled])


def test_a_run_may_start_from_what_was_made_of_a_published_checkpoint(run_dir, data_dir, weights_dir, tmp_path):
    base = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    start = tmp_path / 'start.safetensors'
    safetensors.torch.save_file(weights.load_checkpoint(base), start)
    with pytest.raises(ValueError, match='the run had no --initial-checkpoint'):
        add_checkpoint([run_dir], 'test_made', data_dir, **PROVENANCE, base_model=base.name)
    write_args(run_dir, {**args, 'initial_checkpoint': str(start)})
    with pytest.raises(ValueError, match='name the published one that it was made of'):
        add_checkpoint([run_dir], 'test_made', data_dir, **PROVENANCE)
    with pytest.raises(weights.CheckpointError, match="resnetlike146_1x1 has no checkpoint with the tag 'absent'"):
        add_checkpoint([run_dir], 'test_made', data_dir, **PROVENANCE, base_model='resnetlike146_1x1.absent')
    moved = start.rename(tmp_path / 'moved.safetensors')
    with pytest.raises(FileNotFoundError, match='start.safetensors: the run started from this file, which is'):
        add_checkpoint([run_dir], 'test_made', data_dir, **PROVENANCE, base_model=base.name)
    moved.rename(start)
    made = add_checkpoint([run_dir], 'test_made', data_dir, **PROVENANCE, base_model=base.name)
    assert (made.base_model, made.epochs) == (base.name, 8)
    wider = weights.load_checkpoint(base)  # as of widen_layers: the additional filters are copies
    wider['stem.conv.weight'] = wider['stem.conv.weight'].repeat(2, 1, 1, 1)
    safetensors.torch.save_file(wider, start)
    assert add_checkpoint([run_dir], 'test_made', data_dir, **PROVENANCE, base_model=base.model) == made
    for name in ('stem.conv.weight', 'head.fc.bias'):
        changed = weights.load_checkpoint(base)
        changed[name][-1] += 1
        safetensors.torch.save_file(changed, start)
        with pytest.raises(ValueError, match=f'start.safetensors: was not made of .*, whose {name} is another one'):
            add_checkpoint([run_dir], 'test_other', data_dir, **PROVENANCE, base_model=base.name)
    assert weights.list_checkpoints() == [base, made]


def test_a_run_may_be_resumed_by_the_same_command_twice(run_dir, data_dir, weights_dir, tmp_path):
    base = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    start, first = tmp_path / 'start.safetensors', tmp_path / 'first'
    safetensors.torch.save_file(weights.load_checkpoint(base), start)
    args = {**yaml.safe_load((run_dir / 'args.yaml').read_text()), 'initial_checkpoint': str(start)}
    first.mkdir()
    write_args(first, args)
    (first / 'summary.csv').write_text('epoch,train_loss\n0,1.7\n5,1.6\n')
    write_args(run_dir, {**args, 'resume': str(run_dir / 'last.pth.tar')})  # at last in its own folder
    checkpoint = add_checkpoint([first, run_dir], 'test_made', data_dir, **PROVENANCE, base_model=base.name)
    assert (checkpoint.base_model, checkpoint.epochs) == (base.name, 8)


def test_statistics_are_taken_anew_at_the_size_it_is_for(run_dir, data_dir, weights_dir):
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    write_args(run_dir, {**args, 'input_size': [3, 32, 32]})
    plain = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    settled = add_checkpoint([run_dir], 'test_settled', data_dir, **PROVENANCE, img_size=24, settled_images=5)
    assert (settled.input_size, settled.settled_images) == ([3, 24, 24], 5)
    assert (plain.input_size, plain.settled_images) == ([3, 32, 32], None)
    before, after = weights.load_checkpoint(plain), weights.load_checkpoint(settled)
    statistics = {name for name in before if name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))}
    assert all(torch.equal(before[name], after[name]) != (name in statistics) for name in before)
    assert 're-estimated on 5 training images' in model_card([settled]) and 're-estimated' not in model_card([plain])


def test_settled_statistics_are_those_of_the_images(tmp_path, monkeypatch):
    images = save_images(tmp_path, ('one', 'two'), 5)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(3)).train()
    model.pretrained_cfg = dict(
        input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1., label_names=['one', 'two'])
    monkeypatch.setattr(settle, 'BATCH_SIZE', 4)  # the last batch has two images
    settle.settle_on_folder(model, tmp_path, num_images=10, seed=0)
    torch.testing.assert_close(model[1].running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, images.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert model[1].momentum == 0.1 and not any(module.training for module in model.modules())


def test_variances_that_rounding_makes_negative_are_zero(tmp_path, monkeypatch):
    save_images(tmp_path, ('one',), 2)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    model.pretrained_cfg = dict(
        input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1., label_names=['one'])
    monkeypatch.setattr(settle, 'update_bn_stats', lambda *_: model[0].running_var.fill_(-1e-9))
    settle.settle_on_folder(model, tmp_path, num_images=2, seed=0)
    assert torch.equal(model[0].running_var, torch.zeros(3))


def save_images(folder, class_names, number) -> torch.Tensor:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(class_names), number, 8, 8, 3), dtype=np.uint8)
    for name, of_class in zip(class_names, images):
        (folder / name).mkdir()
        for i, image in enumerate(of_class):
            Image.fromarray(image).save(folder / name / f'{i}.png')
    return torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2) / 255


def test_batches_for_statistics_mix_the_classes(tmp_path, monkeypatch):
    for name, colour in (('black', 0), ('white', 255)):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.new('RGB', (8, 8), (colour,) * 3).save(tmp_path / name / f'{i}.png')
    model = torch.nn.Identity()
    model.pretrained_cfg = dict(input_size=(3, 8, 8), label_names=['black', 'white'])
    found = []
    monkeypatch.setattr(settle, 'BATCH_SIZE', 10)
    monkeypatch.setattr(settle, 'update_bn_stats', lambda model, batches, number: found.extend(batches))
    settle.settle_on_folder(model, tmp_path, num_images=30, seed=0)
    assert [len(images) for images in found] == [10, 10, 10]
    assert all(images[:, 0].amin() < images[:, 0].amax() for images in found)
    assert sum(int((images.mean((1, 2, 3)) > 0).sum()) for images in found) == 15


@pytest.mark.parametrize('tag', ['a/b_noise', '{x}_noise', 'noise', 'Test_Noise', ''])
def test_a_tag_that_is_none_is_refused_first(run_dir, data_dir, weights_dir, tag, monkeypatch):
    monkeypatch.setattr('timm_deluge.training_run.rank_targets', None)
    with pytest.raises(ValueError, match='tag=.*expected letters'):
        add_checkpoint([run_dir], tag, data_dir, **PROVENANCE)


def test_hours_of_a_resumed_run_add_up(run_dir, data_dir, weights_dir, tmp_path):
    parts = [tmp_path / 'first', run_dir]
    parts[0].mkdir()
    (parts[0] / 'args.yaml').write_bytes((run_dir / 'args.yaml').read_bytes())
    (parts[0] / 'summary.csv').write_text('epoch,train_loss\n6,1.5\n')
    for folder, started, ended in zip(parts, (0, 9000), (3600, 10800)):
        for name, seconds in (('args.yaml', started), ('summary.csv', ended)):
            (folder / name).touch()
            os.utime(folder / name, (seconds, seconds))
    assert add_checkpoint(parts, 'test_noise', data_dir, **PROVENANCE).hours == 1.5
    (parts[0] / 'args.yaml').touch()
    with pytest.raises(ValueError, match='first/args.yaml: was written after summary.csv, so that the hours'):
        add_checkpoint(parts, 'test_noise', data_dir, **PROVENANCE)


@pytest.mark.parametrize('rows, resumed_rows, val_interval', [
    ('0,1.8\n1,1.7\n', '3,1.5\n', 1),  # resumed from a recovery checkpoint of epoch 2
    ('2,1.8\n5,1.7\n', '6,1.5\n', 3),  # the last epoch is measured whatever its number
])
def test_a_resumed_run_may_lack_epochs(rows, resumed_rows, val_interval, run_dir, data_dir, weights_dir, tmp_path):
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())
    resumed = tmp_path / 'resumed'
    resumed.mkdir()
    (resumed / 'last.pth.tar').write_bytes((run_dir / 'last.pth.tar').read_bytes())
    goes_on = {'resume': str(run_dir / 'last.pth.tar')}
    for folder, text, changes in (run_dir, rows, {}), (resumed, resumed_rows, goes_on):
        write_args(folder, {**args, 'epochs': 1 + int(resumed_rows[0]), 'val_interval': val_interval, **changes})
        (folder / 'summary.csv').write_text(f'epoch,train_loss\n{text}')
    assert add_checkpoint([run_dir, resumed], 'test_noise', data_dir, **PROVENANCE).epochs == 1 + int(resumed_rows[0])
    with pytest.raises(ValueError, match=f'epoch {int(resumed_rows[0]) - 1} is not there, as the run goes on from'):
        add_checkpoint([resumed], 'test_noise', data_dir, **PROVENANCE)


def test_validate_command_compares_with_the_manifest(run_dir, data_dir, weights_dir, monkeypatch):
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    create_model = timm.create_model

    def create_unregistered(name, pretrained, **kwargs):  # timm's registry was filled before this checkpoint existed
        overlay = {**checkpoint.pretrained_cfg(), **kwargs.get('pretrained_cfg_overlay', {})}
        return create_model(name.split('.')[0], pretrained=pretrained, pretrained_cfg_overlay=overlay)

    monkeypatch.setattr(cli.timm, 'create_model', create_unregistered)
    loaders = []

    def watched(*args):
        loaders.append(args[2:])
        return create_validation_loader(*args)

    monkeypatch.setattr(cli, 'create_validation_loader', watched)
    args = ['validate', 'resnetlike146_1x1', '--data-dir', str(data_dir / 'validation'), '--workers', '0',
            '--batch-size', '7']
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0, result.output
    assert loaders == [(7, 0)]
    figures = json.loads(result.stdout)
    assert figures['measured']['top1'] == pytest.approx(figures['manifest']['top1'], abs=0.01)

    manifest = json.loads((weights_dir / 'manifest.json').read_text())
    (entry,) = manifest['checkpoints']
    for key, difference, exit_code in ('top1', 0.06, 1), ('top5', 0.06, 1), ('top1', 0.04, 0):
        entry['metrics'] = {**checkpoint.metrics, key: checkpoint.metrics[key] + difference}
        entry['dataset']['inexact'] = ['class_0/0.png']
        (weights_dir / 'manifest.json').write_text(json.dumps(manifest))
        result = CliRunner().invoke(cli.app, args)
        assert result.exit_code == exit_code and json.loads(result.stdout)['measured']['exact']['num_images'] == 20


def test_images_are_prepared_as_the_configuration_says(tmp_path):
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name / '0.png')
    model = torch.nn.Identity()
    model.pretrained_cfg = dict(
        input_size=(3, 24, 24), label_names=['a', 'b'], mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.75,
        interpolation='bilinear')
    ((images, _),) = create_validation_loader(model, tmp_path, 2, 0)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    expected = [transform(Image.open(tmp_path / name / '0.png')) for name in 'ab']
    assert torch.equal(images, torch.stack(expected))
    model.pretrained_cfg.update(input_size=(1, 24, 24), mean=(0.1,), std=(0.4,), crop_mode='squash')
    ((images, _),) = create_validation_loader(model, tmp_path, 2, 0)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    expected = [transform(Image.open(tmp_path / name / '0.png').convert('L')) for name in 'ab']
    assert torch.equal(images, torch.stack(expected))


def test_wrong_folders_are_named(data_dir):
    model = timm.create_model('resnetlike146_1x1', num_classes=3)
    with pytest.raises(ValueError, match='absent: no such folder'):
        create_validation_loader(model, data_dir / 'absent', 4, 0)
    model.pretrained_cfg['label_names'] = ['class_0', 'class_5', 'zebra']
    with pytest.raises(ValueError, match='its 3 class folders are not the 3 classes .* such as class_10'):
        create_validation_loader(model, data_dir / 'validation', 4, 0)
    model.pretrained_cfg['label_names'] = ['class_0', 'class_10', 'class_5']
    with pytest.raises(ValueError, match='another order than timm does, and has class_10 in the place of class_5'):
        create_validation_loader(model, data_dir / 'validation', 4, 0)
    stray = data_dir / 'validation' / 'stray.png'
    stray.write_bytes((data_dir / 'validation' / 'class_0' / '0.png').read_bytes())
    with pytest.raises(ValueError, match='stray.png is not in the folder of its class'):
        create_validation_loader(model, data_dir / 'validation', 4, 0)


def test_a_folder_of_several_splits_is_not_taken_for_one(data_dir):
    model = timm.create_model('resnetlike146_1x1', num_classes=3)
    model.pretrained_cfg['label_names'] = ['class_0', 'class_5', 'class_10']
    for name in 'validation', 'test':
        (data_dir / 'validation').rename(data_dir / name)
        with pytest.raises(ValueError, match='is not in the folder of its class; name the folder that holds'):
            create_validation_loader(model, data_dir, 4, 0)
        (data_dir / name).rename(data_dir / 'validation')


def test_classes_without_names_are_counted(data_dir):
    model = timm.create_model('resnetlike146_1x1', num_classes=3)
    assert len(create_validation_loader(model, data_dir / 'validation', 7, 0)) == 3
    model = timm.create_model('resnetlike146_1x1', num_classes=4)
    with pytest.raises(ValueError, match='it has 3 class folders, and the model 4 classes'):
        create_validation_loader(model, data_dir / 'validation', 7, 0)


def test_a_network_with_another_classifier_and_stem_than_its_checkpoint(data_dir):
    overlay = {'label_names': ['cat', 'dog'], 'num_classes': 2, 'input_size': (3, 32, 32)}
    model = timm.create_model('resnetlike146_1x1', pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1).eval()
    images, targets = next(iter(create_validation_loader(model, data_dir / 'validation', 7, 0)))
    assert images.shape == (7, 1, 32, 32) and len(rank_targets(model, [(images, targets)])) == 7


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_read_is_not_replaced_by_another(run_dir, data_dir, weights_dir, workers):
    model = timm.create_model('resnetlike146_1x1', num_classes=3)
    damaged = data_dir / 'validation' / 'class_5' / '3.png'
    damaged.write_bytes(b'no image')
    with pytest.raises(ValueError, match=f'{damaged}: cannot be read'):
        list(create_validation_loader(model, data_dir / 'validation', 4, workers))
    result = add(run_dir, data_dir)
    assert result.exit_code == 2 and '3.png' in result.stderr and 'Traceback' not in result.stderr
    assert not weights.list_checkpoints()


def test_a_run_that_cannot_be_published_is_refused_and_nothing_is_written(run_dir, data_dir, weights_dir, monkeypatch):
    published = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    args = yaml.safe_load((run_dir / 'args.yaml').read_text())

    def refuse(error, match, data=data_dir, tag='test_noise', **changes):
        write_args(run_dir, {**args, **changes})
        with pytest.raises(error, match=match):
            add_checkpoint([run_dir], tag, data, **PROVENANCE)
        assert weights.list_checkpoints() == [published]
        weights.verify_checkpoint(published)
        assert len(list(weights_dir.iterdir())) == 2

    refuse(ValueError, 'run of resnet18', model='resnet18')
    refuse(ValueError, 'epochs: None: expected int', epochs=None)
    refuse(ValueError, 'model: 3: expected str', model=3)
    refuse(ValueError, 'val_split: None: expected str', val_split=None)
    with monkeypatch.context() as full:
        full.setattr(training_run, '_write_log', Mock(side_effect=OSError('no space left')))
        refuse(OSError, 'no space left', tag='other_noise')
    with monkeypatch.context() as full:
        full.setattr(training_run, 'write_weights', Mock(side_effect=OSError('no space left')))
        refuse(OSError, 'no space left', tag='other_noise')
        assert not list(training_run.LOGS.glob('resnetlike146_1x1.other_noise.*'))
    refuse(ValueError, "model_kwargs {'aggregation': 'residual'}", model_kwargs={'aggregation': 'residual'})
    refuse(ValueError, 'started from mine.pth', initial_checkpoint='mine.pth')
    refuse(weights.CheckpointError, "no checkpoint with the tag 'absent'",
           model='resnetlike146_1x1.absent', pretrained=True)
    refuse(ValueError, 'the checkpoint of resnetlike146_1x1 that was the default then', pretrained=True)
    refuse(ValueError, '8 of 9 epochs are done; resume', epochs=9)
    for option in ({'cooldown_epochs': 2}, {'warmup_prefix': True}, {'lr_cycle_limit': 2}):
        refuse(ValueError, 'how many epochs it was to have is not known', **option)
    refuse(ValueError, 'no weights of delugenet146 with 3 input channels and the 3 classes', model='delugenet146')
    refuse(ValueError, 'absent: no such folder', val_split='absent')
    refuse(ValueError, 'absent: no such folder', train_split='absent')
    (data_dir / 'empty').mkdir()
    refuse(ValueError, 'empty: there are no images', train_split='empty')
    refuse(ValueError, 'a run with gp: max, which cannot be published', gp='max')
    refuse(ValueError, 'a run with pretrained_path: mine.pth', pretrained_path='mine.pth')
    refuse(ValueError, 'a run with class_map: mine.txt', class_map='mine.txt')
    refuse(ValueError, 'a run with start_epoch: 0', start_epoch=0)
    refuse(ValueError, 'a run with bn_eps: 0.001, which cannot be published', bn_eps=0.001)
    write_args(run_dir, args)
    monkeypatch.setattr('timm_deluge.training_run.LOGS', data_dir / 'absent' / 'training')
    with pytest.raises(FileNotFoundError, match='publish from a checkout'):
        add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    with pytest.raises(LookupError, match="no recipe 'nonsense'"):
        add_checkpoint([run_dir], 'test_noise', data_dir, **{**PROVENANCE, 'recipe': 'nonsense'})
    with pytest.raises(ValueError, match="split='nonsense': must be test or validation"):
        add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE, split='nonsense')


@pytest.mark.parametrize('file, content, message', [
    ('last.pth.tar', '', 'last.pth.tar: this is no checkpoint, or damaged'),
    ('last.pth.tar', 'text', 'last.pth.tar: this is no checkpoint, or damaged'),
    ('args.yaml', '', 'args.yaml: expected the options of a run of train.py, there is no epochs'),
    ('args.yaml', 'epochs: 3', 'args.yaml: expected the options of a run of train.py, there is no model'),
    ('args.yaml', 'epochs: [3', 'args.yaml: this is no YAML: while parsing'),
    ('summary.csv', 'step,train_loss\n7,1.4\n', 'summary.csv: expected a summary of train.py'),
    ('summary.csv', 'epoch,train_loss\nseven,1.4\n', 'summary.csv: expected a summary of train.py'),
    ('summary.csv', 'epoch,train_loss,eval_top1\n', 'summary.csv: no epoch is done yet'),
    ('words.txt', 'noise\tnoise\n\ngrey scale\n', "words.txt: expected NAME, a tab and what it stands for"),
])
def test_a_damaged_file_is_named(file, content, message, run_dir, data_dir, weights_dir):
    (run_dir / file).write_text(content)
    options = {'class-descriptions': run_dir / file} if file == 'words.txt' else {}
    result = add(run_dir, data_dir, **options)
    assert result.exit_code == 2 and message in ' '.join(result.stderr.split()), result.output
    assert not weights.list_checkpoints()


@pytest.mark.parametrize('option', ['inexact', 'class-descriptions'])
def test_a_text_file_in_another_encoding_is_named(option, run_dir, data_dir, weights_dir):
    path = run_dir / 'words.txt'
    path.write_text('noise\tnoise\n', encoding='utf-16')
    result = add(run_dir, data_dir, **{option: path})
    assert result.exit_code == 2 and 'words.txt: this is no text in UTF-8' in ' '.join(result.stderr.split())
    assert not weights.list_checkpoints()


def test_a_run_without_weights(run_dir, data_dir, weights_dir):
    (run_dir / 'last.pth.tar').unlink()
    result = add(run_dir, data_dir)
    assert result.exit_code == 2 and 'last.pth.tar: no such file' in ' '.join(result.stderr.split())


def test_weights_of_another_epoch_than_the_summarys_last_are_refused(run_dir, data_dir, weights_dir):
    last = run_dir / 'last.pth.tar'
    left = {**torch.load(last), 'args': Namespace(lr=0.1)}
    torch.save({**left, 'epoch': 6}, last)  # as of a run that was stopped after the summary's row
    with pytest.raises(ValueError, match='has the weights of epoch 6, and the last of .* is epoch 7; resume'):
        add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    torch.save({**left, 'epoch': 7}, last)
    assert add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE).epochs == 8


def test_the_published_file_is_what_is_measured(run_dir, data_dir, weights_dir, monkeypatch):
    def watched(model, loader):
        measured.update(model.state_dict())
        return rank_targets(model, loader)

    measured = {}
    monkeypatch.setattr('timm_deluge.training_run.rank_targets', watched)
    published = weights.load_checkpoint(add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE))
    assert all(torch.equal(tensor, published[name].to(tensor.dtype)) for name, tensor in measured.items())
    assert measured.keys() == published.keys()


def test_no_more_images_settle_than_there_are(run_dir, data_dir, weights_dir):
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE, settled_images=10 ** 6)
    assert checkpoint.settled_images == checkpoint.dataset['train_images']


def test_parts_of_a_replaced_checkpoint_go(run_dir, data_dir, weights_dir, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr('timm_deluge.training_run.PART_BYTES', 5 * 2 ** 20)
        assert add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE).parts
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    assert {path.name for path in weights_dir.iterdir()} == {checkpoint.file, 'manifest.json'}
    monkeypatch.setattr('timm_deluge.training_run.PART_BYTES', 5 * 2 ** 20)
    checkpoint = add_checkpoint([run_dir], 'test_noise', data_dir, **PROVENANCE)
    parts = {part['file'] for part in checkpoint.parts}
    assert {path.name for path in weights_dir.iterdir()} == {*parts, 'manifest.json'}


def test_incomplete_run(tmp_path, data_dir):
    result = add(tmp_path, data_dir)
    assert result.exit_code == 2 and 'args.yaml' in result.stderr


def test_a_file_is_no_run(run_dir, data_dir):
    result = add(run_dir / 'last.pth.tar', data_dir)
    assert result.exit_code == 2 and 'last.pth.tar' in result.stderr
