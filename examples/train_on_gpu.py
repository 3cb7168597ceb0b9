"""Train by a recipe of timm's train.py on one GPU, in minutes: images stay on the device, and a step is one CUDA graph.

    python examples/train_on_gpu.py $(timm-deluge recipe cifar100_delugenet146_muon40) cifar100 --output output/muon40

A step of a narrow, deep network consists of thousands of kernels that take microseconds each, and a processor cannot
launch them that fast; a graph launches them all at once. Images are cropped, flipped and erased as in timm, but a batch
at a time.

The script writes what `timm-deluge weights add` needs: args.yaml, summary.csv and last.pth.tar. The last has float16
weights and no optimizer state, so a run cannot be resumed.
"""
import math
import os
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.optim.muon import _COEFFICIENTS, _is_suitable_for_muon, get_lr_scale, zeropower_via_newtonschulz
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs, random_seed, update_summary
from torch import nn
from torch.utils.data import DataLoader

import timm_deluge  # noqa: F401 registers the models
from timm_deluge.validate import list_classes, open_folder

TRIES = 10  # attempts of timm's 'rrc' to find a crop that fits into the image
EAGER_STEPS = 3  # before a step is captured: they compile kernels and create the optimizer's state
DEFAULTS = dict(
    device='cuda', model_kwargs={}, pretrained=False, train_split='train', val_split='validation',
    validation_batch_size=500, opt_kwargs={}, sched='cosine', min_lr=0., train_crop_mode='rrc', scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3), hflip=0.5, reprob=0., smoothing=0.1, seed=42, val_interval=5)
FIXED = dict(  # the only values of these options that this script supports
    device_modules=['timm_deluge'], initial_checkpoint='', crop_pct=1.0, amp=True, amp_dtype='bfloat16',
    channels_last=True, color_jitter=0.0, remode='const', train_interpolation='bilinear', sched_on_updates=True,
    train_size_schedule='progressive', train_size_schedule_spread=0.0, train_size_random_mix=0.0)

NEEDED = {  # options that must be given: train.py's defaults are not what this script does
    'batch_size', 'epochs', 'lr', 'model', 'momentum', 'num_classes', 'opt', 'train_img_sizes', 'warmup_epochs',
    'warmup_lr', 'weight_decay', *FIXED.keys() - {'channels_last', 'device_modules', 'initial_checkpoint'}}


def read_recipe(path: Path) -> dict[str, object]:
    """Read the options of a recipe.

    Args:
        path: YAML file with options of train.py.

    Raises:
        ValueError: If with these options this script would do something else than train.py.
    """
    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f'{path}: expected options of train.py by name')
    missing = NEEDED - recipe.keys()
    if missing:
        raise ValueError(f'{path}: says nothing of {min(missing)}, where train.py does something else than this script')
    known = {*DEFAULTS, *NEEDED - FIXED.keys(), 'input_size', 'mean', 'std', 'interpolation', 'workers'}
    for name, value in recipe.items():
        if name not in known and FIXED.get(name) != value:
            raise ValueError(f'{path}: {name}: {value} is not known here; train by timm\'s train.py')
    recipe = {**DEFAULTS, **recipe}
    if recipe['opt'] != 'muon' or recipe['train_crop_mode'] not in ('rrc', 'rkrr'):
        raise ValueError(f'{path}: only opt: muon, and train_crop_mode: rrc or rkrr, are known here')
    if (recipe.get('input_size') or [3])[0] != 3:
        raise ValueError(f'{path}: input_size: expected 3 channels, as all images have here')
    if len(recipe['train_img_sizes']) != recipe['epochs']:
        raise ValueError(f'{path}: train_img_sizes: expected one for each of {recipe["epochs"]} epochs')
    return recipe


def read_images(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Read square images of one size, a folder for each class.

    Returns:
        Images ``[N, H, W, 3]`` of bytes, classes ``[N]``, and the names of the classes.

    Raises:
        ValueError: If there is no such folder, an image cannot be read, is not square, or is not as large as the first.
    """
    dataset = open_folder(folder)
    dataset.transform = np.asarray
    loader = DataLoader(dataset, 500, num_workers=os.cpu_count() or 1, collate_fn=list)
    images, targets = zip(*chain.from_iterable(loader))
    paths = [path for path, _ in dataset.reader.samples]
    height, width = images[0].shape[:2]
    for image, path in zip(images, paths):
        if image.shape != (height, height, 3):
            raise ValueError(f'{path}: has {image.shape[1]}x{image.shape[0]} pixels, {paths[0]} {width}x{height}; '
                             f'expected square images of one size')
    return torch.from_numpy(np.stack(images)), torch.tensor(targets), list_classes(dataset)


def augment(images: torch.Tensor, size: int, args: Namespace) -> torch.Tensor:
    """Crop and flip at random, as timm's 'rrc' and 'rkrr' do.

    Args:
        images: ``[N, H, W, 3]``, bytes.
        size: Height and width of the results.
        args: `train_crop_mode`, `scale`, `ratio` and `hflip`.

    Returns:
        ``[N, 3, size, size]`` between 0 and 255.
    """
    def uniform(low, high, *tries):
        return torch.empty(*tries, len(images), device=images.device).uniform_(low, high)

    tries = TRIES if args.train_crop_mode == 'rrc' else 1
    area, aspect = uniform(*args.scale, tries), uniform(*map(math.log, args.ratio), tries).exp()
    if args.train_crop_mode == 'rkrr':
        area, aspect = (factor.masked_fill(uniform(0, 1) < 0.5, 1.) for factor in (area, aspect))
    extent = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1)  # as fractions of width and height
    first = (extent <= 1).all(-1).int().argmax(0)  # the first one that fits
    extent = extent[first, torch.arange(len(images), device=images.device)]
    if args.train_crop_mode == 'rrc':
        extent = extent.clamp(max=1)  # where none fits
    centre = torch.stack([uniform(-1, 1), uniform(-1, 1)], 1) * (1 - extent)
    extent[:, 0] *= 1 - 2. * (uniform(0, 1) < args.hflip)
    oversampling = math.ceil(images.shape[1] / size)  # so that every pixel counts in a smaller image
    grid = F.affine_grid(
        torch.cat([torch.diag_embed(extent), centre[..., None]], 2),
        [len(images), 3, oversampling * size, oversampling * size], align_corners=False)
    cropped = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, padding_mode='reflection', align_corners=False)
    return F.avg_pool2d(cropped, oversampling)


def erase(images: torch.Tensor, probability: float) -> torch.Tensor:
    """Set a rectangle to zero, as timm's RandomErasing does by its defaults.

    Args:
        images: ``[N, 3, H, W]``, normalised.
        probability: Probability that an image is erased.
    """
    def uniform(low, high):
        return torch.empty(len(images), 1, device=images.device).uniform_(low, high)

    area, aspect = uniform(0.02, 1 / 3), uniform(math.log(0.3), math.log(1 / 0.3)).exp()
    positions = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    inside = []
    for part in (area * aspect).sqrt(), (area / aspect).sqrt():
        part = part.clamp(max=1)
        start = uniform(0, 1) * (1 - part)
        inside.append((positions >= start) & (positions < start + part))
    erased = inside[0][:, None, :, None] & inside[1][:, None, None] & (uniform(0, 1) < probability)[..., None, None]
    return images.masked_fill(erased, 0.)


class BatchedMuon:
    """The step of timm's Muon for all matrices of a shape at once, in a form that a CUDA graph can capture."""

    def __init__(self, optimizer: timm.optim.Muon) -> None:
        """
        Args:
            optimizer: Holds parameters and options; its own step is not used.
        """
        self.optimizer = optimizer
        self.lrs = [torch.zeros((), device=group['params'][0].device) for group in optimizer.param_groups]
        self.matrices = []  # group, lr, parameters of a shape, their momentum
        self.fallback_scales = []
        others = []
        for group, lr in zip(optimizer.param_groups, self.lrs):
            if (group['nesterov'] or group['algo'] != 'muon' or group['conv_mode'] != 'flatten'
                    or group['safety_factor'] != 1 or group['scale_eps'] or group['adjust_lr_fn'] is None
                    or not isinstance(group['ns_coefficients'], str)):
                raise ValueError('opt_kwargs: nesterov, algo, conv_mode, safety_factor, scale_eps, no adjust_lr_fn and '
                                 'ns_coefficients of your own are not known here')
            shapes = defaultdict(list)
            for parameter in group['params']:
                suits = not group.get('use_fallback') and _is_suitable_for_muon(parameter)
                shapes[tuple(parameter.shape) if suits else None].append(parameter)
            if None in shapes:
                options = {name: group[name] for name in ('weight_decay', 'betas', 'eps')}
                others.append(dict(params=shapes.pop(None), lr=lr.clone(), **options))
                self.fallback_scales.append((lr, group['fallback_lr_scale']))
            for parameters in shapes.values():
                momentum = torch.zeros(len(parameters), *parameters[0].flatten(1).shape, device=lr.device)
                self.matrices.append((group, lr, parameters, momentum))
        self.adamw = torch.optim.AdamW(others, capturable=lr.is_cuda)

    def take_learning_rates(self) -> None:
        """Take the learning rates that a scheduler has set in timm's optimizer."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs):
            lr.fill_(group['lr'])
        for group, (lr, scale) in zip(self.adamw.param_groups, self.fallback_scales):
            group['lr'].copy_(lr * scale)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters."""
        for group, lr, parameters, momentum in self.matrices:
            momentum.lerp_(torch.stack([parameter.grad.flatten(1) for parameter in parameters]), 1 - group['momentum'])
            coefficients = _COEFFICIENTS[group['ns_coefficients']]
            update = zeropower_via_newtonschulz(momentum, group['ns_steps'], coefficients, group['eps'])
            update = update.float() * (-lr * get_lr_scale(update.shape, group['adjust_lr_fn']))
            torch._foreach_mul_(parameters, 1 - lr * group['weight_decay'])
            torch._foreach_add_(parameters, [u.view_as(p) for u, p in zip(update, parameters)])
        self.adamw.step()


class GraphedStep:
    """A function without arguments, captured as a CUDA graph once it has run a few times; on the CPU it just runs."""

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function = function
        self.device = device
        self.num_eager = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.device.type != 'cuda':
            self.function()
        elif self.num_eager < EAGER_STEPS:
            self.num_eager += 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.function()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.function()
            self.graph.replay()


@torch.inference_mode()
def evaluate(model: nn.Module, images: torch.Tensor, targets: torch.Tensor, args: Namespace) -> dict[str, float]:
    """Get the loss and the percentages of right answers.

    Args:
        model: The model; in training mode afterwards.
        images: ``[N, H, W, 3]``, bytes.
        targets: ``[N]``.
        args: `input_size`, `interpolation`, `validation_batch_size` and the tensors `mean_` and `std_`.
    """
    model.eval()
    loss = hits1 = hits5 = 0.
    for batch, target in zip(images.split(args.validation_batch_size), targets.split(args.validation_batch_size)):
        x = batch.permute(0, 3, 1, 2).float()
        if x.shape[-2:] != tuple(args.input_size[-2:]):
            x = F.interpolate(x, args.input_size[-2:], mode=args.interpolation, antialias=True).clamp(0, 255)
        x = ((x - args.mean_) / args.std_).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = model(x).float()
        loss += F.cross_entropy(logits, target, reduction='sum').item()
        hits = logits.topk(min(5, logits.shape[1])).indices.eq(target[:, None])
        hits1, hits5 = hits1 + hits[:, 0].sum().item(), hits5 + hits.sum().item()
    model.train()
    percent = 100 / len(targets)
    return dict(loss=loss / len(targets), top1=hits1 * percent, top5=hits5 * percent)


def train(args: Namespace) -> None:
    """Train by a recipe.

    Args:
        args: The recipe's options, and `data_dir`, `output`, `val_interval`.
    """
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'device: {device}: PyTorch {torch.__version__} finds no GPU; to train on the CPU, write '
                         f'`device: cpu` into a copy of the recipe')
    if device.type == 'cuda':
        torch.cuda.set_device(device)  # graphs are captured on the current device
    if args.val_interval < 1:
        raise ValueError(f'val_interval: expected 1 or more epochs, got {args.val_interval}')
    random_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    if args.output.exists():
        raise FileExistsError(f'{args.output} exists: name a folder that does not')
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    splits = [read_images(args.data_dir / split) for split in (args.val_split, args.train_split)]  # the small one first
    *test_set, test_classes = splits[0]
    images, targets, classes = splits[1]
    if test_classes != classes:
        raise ValueError(
            f'{args.data_dir}: {args.train_split} and {args.val_split} must have images of the same classes; only one '
            f'has any in {min(set(classes) ^ set(test_classes))}')
    if len(classes) != args.num_classes:
        raise ValueError(f'{args.data_dir}: {len(classes)} classes; the recipe is for {args.num_classes}')
    if len(images) < args.batch_size:
        raise ValueError(f'{args.data_dir}: {len(images)} training images, fewer than a batch of {args.batch_size}')
    images, targets, *test_set = (tensor.to(device) for tensor in (images, targets, *test_set))
    model = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=args.num_classes, **args.model_kwargs)
    config = resolve_data_config(vars(args), model=model)
    args.input_size, args.interpolation = config['input_size'], config['interpolation']
    if args.interpolation not in ('bilinear', 'bicubic'):
        raise ValueError(f'interpolation: {args.interpolation} is not known here; expected bilinear or bicubic')
    args.mean_, args.std_ = (
        255 * torch.tensor(config[name], device=device)[:, None, None] for name in ('mean', 'std'))
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(
        model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum, **args.opt_kwargs)
    muon = BatchedMuon(optimizer)
    steps = len(images) // args.batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer, args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs, warmup_lr=args.warmup_lr,
        min_lr=args.min_lr, step_on_epochs=False, updates_per_epoch=steps)
    args.output.mkdir(parents=True)
    (args.output / 'args.yaml').write_text(yaml.safe_dump(plain))
    index = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    total_loss = torch.zeros((), device=device)

    def step_of(size: int) -> GraphedStep:
        def step() -> None:
            x = (augment(images[index], size, args) - args.mean_) / args.std_
            x = erase(x, args.reprob).contiguous(memory_format=torch.channels_last)
            for parameter in model.parameters():
                parameter.grad = None
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), targets[index], label_smoothing=args.smoothing)
            loss.backward()
            muon.step()
            total_loss.add_(loss.detach())
        return GraphedStep(step, device)

    step, size = None, None
    for epoch in range(args.epochs):
        start, count = time.perf_counter(), 0
        if size != args.train_img_sizes[epoch]:
            size = args.train_img_sizes[epoch]
            step = None  # frees the old graph's memory
            step = step_of(size)
        total_loss.zero_()
        for batch in torch.randperm(len(images), device=device)[:steps * args.batch_size].split(args.batch_size):
            muon.take_learning_rates()
            index.copy_(batch)
            step()
            count += 1
            scheduler.step_update(epoch * steps + count)
        loss = total_loss.item() / steps
        rate = steps * args.batch_size / (time.perf_counter() - start)
        print(f'{args.output.name} {epoch}: {size} px, loss {loss:.3f}, {rate:.0f} images/s', flush=True)
        if not math.isfinite(loss):
            raise FloatingPointError(f'the training loss is {loss} in epoch {epoch}')
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == args.epochs:
            metrics = evaluate(model, *test_set, args)
            print(f'{args.output.name} {epoch}: validation {metrics}', flush=True)
            update_summary(epoch, dict(loss=loss), metrics, args.output / 'summary.csv',
                           lr=optimizer.param_groups[0]['lr'])
            save(args.output / 'last.pth.tar', model, epoch, args.model)


def save(path: Path, model: nn.Module, epoch: int, arch: str) -> None:
    """Write a checkpoint as timm does, in the precision in which it is published."""
    state_dict = {k: (v.half() if v.is_floating_point() else v).cpu() for k, v in model.state_dict().items()}
    torch.save(dict(epoch=epoch, arch=arch, state_dict=state_dict), path.with_suffix('.tmp'))
    path.with_suffix('.tmp').replace(path)


def main() -> None:
    """Parse the arguments and train."""
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('recipe', type=Path, help='YAML file, see `timm-deluge recipe`')
    parser.add_argument('data_dir', type=Path, help='folders for training and validation with a folder for each class')
    parser.add_argument('--output', type=Path, required=True, help='new folder')
    parser.add_argument('--model', default=SUPPRESS, help='instead of the recipe\'s')
    parser.add_argument('--model-kwargs', nargs='*', default=SUPPRESS, action=ParseKwargs)
    parser.add_argument('--pretrained', action='store_true', default=SUPPRESS)
    parser.add_argument('--seed', type=int, default=SUPPRESS)
    parser.add_argument('--lr', type=float, default=SUPPRESS)
    parser.add_argument('--val-split', default=SUPPRESS, help='name of a folder')
    parser.add_argument('--val-interval', type=int, default=SUPPRESS, help='epochs between two validations')
    given = vars(parser.parse_args())
    train(Namespace(**{**read_recipe(given['recipe']), **given}))


if __name__ == '__main__':
    main()
