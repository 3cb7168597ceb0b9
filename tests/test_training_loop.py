"""What timm's train.py does with a model, step by step, without the script, which timm's packages do not have."""
import copy
import random
import re

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3

NUM_CLASSES, BATCH_SIZE, EPOCHS = 2, 4, 3


class Run:
    """train.py's parts, made from the same options as its."""

    def __init__(self, images, folder, opt='muon', mixup=True, **model_kwargs):
        torch.manual_seed(0)
        self.model = timm.create_model(
            'delugenet146', depths=(3, 2, 2), widths=(4, 8, 8), num_classes=NUM_CLASSES, **model_kwargs)
        config = resolve_data_config({'input_size': (3, 16, 16)}, model=self.model)
        self.loader = create_loader(
            create_dataset('', root=str(images / 'train')), config['input_size'], BATCH_SIZE, is_training=True,
            mean=config['mean'], std=config['std'], num_workers=0, persistent_workers=False, use_prefetcher=False,
            color_jitter=0.1, re_prob=0.2)
        self.optimizer = create_optimizer_v2(self.model, opt=opt, lr=0.01, weight_decay=0.02)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched='cosine', num_epochs=EPOCHS, warmup_epochs=1, step_on_epochs=False,
            updates_per_epoch=len(self.loader))
        self.ema = ModelEmaV3(self.model, decay=0.9)
        self.mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1., num_classes=NUM_CLASSES) if mixup else None
        self.loss = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, model_ema=self.ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
        self.losses = []

    def epoch(self, number: int) -> None:
        torch.manual_seed(number)  # the script's loader and mixing differ from epoch to epoch, and not from run to run
        random.seed(number)
        np.random.seed(number)
        self.model.train()
        for i, (x, target) in enumerate(self.loader):
            if self.mixup:
                x, target = self.mixup(x, target)
            with torch.autocast('cpu', torch.bfloat16):
                output = self.model(x.contiguous(memory_format=torch.channels_last))
            loss = self.loss(output.float(), target)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.)
            self.optimizer.step()
            updates = number * len(self.loader) + i + 1
            self.ema.update(self.model, step=updates)
            self.scheduler.step_update(updates)
            self.losses.append(loss.item())
        self.scheduler.step(number + 1)
        self.saver.save_checkpoint(number, metric=float(number))


def assert_same(a, b):
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize('opt, mixup, kwargs', [
    ('muon', True, {}), ('nadamw', False, {'drop_path_rate': 0.2, 'connection_drop_rate': 0.1}),
    ('sgd', False, {'aggregation': 'scalar'}), ('lamb', True, {'aggregation': 'residual', 'drop_rate': 0.1})])
def test_trains_and_resumes_to_the_same_weights(images, tmp_path, opt, mixup, kwargs):
    whole = Run(images, tmp_path, opt, mixup, **kwargs)
    start = copy.deepcopy(whole.model)
    for number in range(EPOCHS):
        whole.epoch(number)
    assert all(0 < loss < 20 for loss in whole.losses)
    trained = [n for n, p in whole.model.named_parameters() if not torch.equal(p, start.get_parameter(n))]
    others = {n for n, _ in whole.model.named_parameters()} - set(trained)
    assert all(re.fullmatch(r'stages.\d+.cross_layers.\d+.bias', name) for name in others)  # BN undoes them
    averaged = whole.ema.module.state_dict()
    assert any(not torch.equal(tensor, averaged[name]) for name, tensor in whole.model.state_dict().items())

    resumed = Run(images, tmp_path / 'resumed', opt, mixup, **kwargs)
    (tmp_path / 'resumed').mkdir()
    checkpoint = str(tmp_path / 'checkpoint-0.pth.tar')
    assert resume_checkpoint(resumed.model, checkpoint, resumed.optimizer) == 1
    timm.models.load_checkpoint(resumed.ema.module, checkpoint, use_ema=True)
    resumed.scheduler.step_update(len(resumed.loader))
    for number in range(1, EPOCHS):
        resumed.epoch(number)
    assert_same(resumed.model, whole.model)
    assert_same(resumed.ema.module, whole.ema.module)


def test_scheduled_images_of_other_sizes(images, tmp_path):
    run = Run(images, tmp_path, mixup=False)
    for size in (8, 16, 24):
        loss = run.loss(run.model(torch.randn(BATCH_SIZE, 3, size, size)), torch.arange(BATCH_SIZE) % NUM_CLASSES)
        loss.backward()
        run.optimizer.step()
        assert 0 < loss.item() < 20
