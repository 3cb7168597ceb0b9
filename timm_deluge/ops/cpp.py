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
        weight: torch.Tensor,
        bias: torch.Tensor,
        relu: bool = False,
) -> torch.Tensor:
    """Sum layers, each channel with its own weights: see `timm_deluge.ops.aten.combine`."""
    layers, inner = same_layout(layers)
    out = torch.empty_like(layers[0])
    _call('combine', layers, inner, weight.float().contiguous(), bias.float().contiguous(), out, ctypes.c_int(relu))
    return out


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
    _call('combine_backward', grads, inner, weight.float().contiguous(), layer, mean.float().contiguous(), out, dots)
    return out, dots.sum(0).float()


def _call(name: str, layers: list[torch.Tensor], inner: int, *arguments: torch.Tensor | ctypes.c_int) -> None:
    if layers[0].numel() == 0:
        return
    channels = layers[0].shape[1]
    columns = channels if inner == 1 else inner
    dtype = str(layers[0].dtype).removeprefix('torch.')
    _LIBRARY[f'{name}_{dtype}'](
        (ctypes.c_void_p * len(layers))(*(layer.data_ptr() for layer in layers)),
        ctypes.c_int64(len(layers)),
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments),
        (ctypes.c_int64 * 3)(layers[0].numel() // columns, columns, channels),
        ctypes.c_int(inner == 1),
        ctypes.c_int(torch.get_num_threads()),
    )
