"""The two sums over layers as C++ loops for a CPU: every layer is read once, and all sums run in float32.

Importing this module compiles `kernels.cpp` for the processor at hand, in two or three seconds, with the C++ compiler
that `torch.compile` would take. The loops run in PyTorch's own OpenMP threads.
"""
import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .layout import same_layout

__all__ = ['combine', 'combine_backward']


def _compile(source: Path) -> ctypes.CDLL:
    """Compile a C++ file and load it.

    Raises:
        ImportError: If there is no compiler, or it cannot make a library for PyTorch's OpenMP.
    """
    compiler = shlex.split(os.environ.get('CXX', 'c++'))
    with tempfile.TemporaryDirectory() as folder:
        compiled, library = f'{folder}/kernels.o', f'{folder}/kernels.so'
        try:
            # linked without -fopenmp: a second OpenMP beside PyTorch's would fight it for the cores
            for arguments in (
                ['-std=c++17', '-O3', '-march=native', '-fPIC', '-fopenmp', '-c', str(source), '-o', compiled],
                ['-shared', compiled, '-o', library],
            ):
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True)
            return ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, 'stderr', '') or error
            raise ImportError(f'{source.name} cannot be compiled with {compiler[0]!r}: {reason}') from error


_LIBRARY = _compile(Path(__file__).with_name('kernels.cpp'))


def combine(
        layers: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor] | None = None,
        relu: bool = False,
) -> list[torch.Tensor]:
    """Sum layers, each channel with its own weights: see `timm_deluge.ops.aten.combine`."""
    layers, inner = same_layout(layers)
    outs = [torch.empty_like(layers[0]) for _ in weights] if outs is None else list(outs)
    weights, biases = ([p.float().contiguous() for p in parameters] for parameters in (weights, biases))
    _call(
        'combine', layers, inner, _addresses(weights), _addresses(biases), _addresses(outs),
        ctypes.c_int64(len(outs)), ctypes.c_int(relu))
    return outs


def combine_backward(
        grads: Sequence[torch.Tensor],
        weight: torch.Tensor,
        layer: torch.Tensor,
        mean: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate `combine` by one layer and its weights: see `timm_deluge.ops.aten.combine_backward`."""
    (layer, *grads), inner = same_layout([layer, *grads])
    out = torch.empty_like(layer)
    dots = torch.zeros(torch.get_num_threads(), len(grads), layer.shape[1], dtype=torch.float64)
    weight, mean = weight.float().contiguous(), mean.float().contiguous()
    _call(
        'combine_backward', grads, inner,
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, layer, mean, out, dots)))
    return out, dots.sum(0).float()


def _addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _call(name: str, layers: list[torch.Tensor], inner: int, *arguments: Any) -> None:
    if layers[0].numel() == 0:
        return
    channels = layers[0].shape[1]
    columns = channels if inner == 1 else inner
    dtype = str(layers[0].dtype).removeprefix('torch.')
    _LIBRARY[f'{name}_{dtype}'](
        _addresses(layers),
        ctypes.c_int64(len(layers)),
        *arguments,
        (ctypes.c_int64 * 3)(layers[0].numel() // columns, columns, channels),
        ctypes.c_int(inner == 1),
        ctypes.c_int(torch.get_num_threads()),
    )
