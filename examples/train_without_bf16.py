"""timm's train.py on a processor without bfloat16: Muon's iterations run in float32.

    python examples/train_without_bf16.py path/to/pytorch-image-models/train.py \
        --config $(timm-deluge recipe cifar100_resnetlike146) --data-dir cifar100

timm's Muon orthogonalises every update in bfloat16. A processor that only emulates bfloat16 takes many times as long
for this as in float32, a large part of each training step. On such a processor, `lscpu | grep bf16` prints nothing.
"""
from functools import partial

import torch
from timm.optim import muon

import timm_deluge.run

if __name__ == '__main__':
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    timm_deluge.run.main()
