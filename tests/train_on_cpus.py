"""Run timm's train.py in torchrun's processes where there is no GPU.

train.py names each process's device to DistributedDataParallel, which takes no name of a CPU.
"""
import runpy
import sys

from torch.nn.parallel import DistributedDataParallel

_init = DistributedDataParallel.__init__
DistributedDataParallel.__init__ = lambda ddp, module, device_ids, **kwargs: _init(ddp, module, **kwargs)

if __name__ == '__main__':
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
