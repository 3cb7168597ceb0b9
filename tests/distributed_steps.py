"""Two steps of SGD in several processes, in each of some modes; torchrun runs this for test_distributed.py.

    torchrun --nproc-per-node=2 tests/distributed_steps.py IMAGES.pt FOLDER MODE…
"""
import os
import sys

import timm
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import timm_deluge  # noqa: F401 registers the models


def create_model(mode: str) -> nn.Module:
    """The same model in every process; with `frozen`, batch normalisation uses its running statistics.

    In float64: 146 layers of float32 turn a difference in the last digit, from sums in another order, into a visible
    one.
    """
    torch.manual_seed(0)
    model = timm.create_model('delugenet146', num_classes=3).to(memory_format=torch.channels_last)
    return model.double().train(mode != 'frozen')


def normalise_over_processes(module: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """What SyncBatchNorm computes; torch's own, and its DistributedDataParallel with it, insist on CUDA devices."""
    def mean(values: torch.Tensor) -> torch.Tensor:
        return all_reduce(values.mean((0, 2, 3), keepdim=True)) / dist.get_world_size()

    centred = x - mean(x)
    normalised = centred * (mean(centred.square()) + module.eps).rsqrt()
    if module.affine:
        normalised = normalised * module.weight[:, None, None] + module.bias[:, None, None]
    return normalised


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches) -> list[dict[str, torch.Tensor]]:
    """Train; return each step's gradients."""
    gradients = []
    for images, targets in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.double()), targets).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients


def main(images_path: str, folder: str, *modes: str) -> None:
    rank, size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    nn.SyncBatchNorm.forward = normalise_over_processes
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda ddp, module: None
    dist.init_process_group('gloo')
    batches = torch.load(images_path)
    mine = [(images.chunk(size)[rank], targets.chunk(size)[rank]) for images, targets in batches]
    for mode in modes:
        model = create_model(mode)
        if mode == 'synchronised':
            model = convert_sync_batchnorm(model)
        model = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        gradients = take_steps(model, optimizer, mine)
        if rank == 0:
            torch.save([{name.removeprefix('module.'): g for name, g in step.items()} for step in gradients],
                       os.path.join(folder, f'{mode}.pt'))
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
