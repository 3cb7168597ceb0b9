"""The backend as C++ loops for a CPU: each read of a layer serves several sums, all of them in float32.

`kernels.cpp` is compiled for the processor at hand when this module is imported and, for bfloat16, at its first use,
which takes some seconds. The compiler is the one that the environment variable CXX names, or else `c++`. `compile.py`
keeps the libraries for later processes. The loops run in PyTorch's own threads.
"""
import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .backend import check_combine, check_combine_backward, check_moments, check_norm_act_backward
from .compile import compile_library
from .layout import same_layout

__all__ = ['combine', 'combine_backward', 'moments', 'norm_act_backward']

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
# every function also takes the shape, whether tensors are in channels_last, and the number of threads
_PARAMETERS: dict[str, list[Any]] = {
    'combine': [_POINTER, _NUMBER, *[_POINTER] * 3, _NUMBER, _POINTER, *[_NUMBER] * 3],
    'combine_backward': [_POINTER, _NUMBER, *[_POINTER] * 2, _NUMBER, *[_POINTER] * 3, *[_NUMBER] * 2, _POINTER],
    'moments': [_POINTER] * 3,
    'norm_act_backward': [*[_POINTER] * 6, _NUMBER, _NUMBER, *[_POINTER] * 3],
}


@cache
def _library(element: str) -> ctypes.CDLL:
    """Load the loops for one element type, compiled first if the cache has none.

    Raises:
        ImportError: If there is no compiler, or it cannot make a library for PyTorch's OpenMP.
    """
    options = ['-std=c++17', '-O3', '-march=native', '-fPIC', '-fopenmp', f'-DELEMENT={element}']
    library = compile_library(Path(__file__).with_name('kernels.cpp'), options)
    for name, parameters in _PARAMETERS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*parameters, _POINTER, _NUMBER, _NUMBER], None
    return library


_ELEMENTS = {torch.float32: 'float', torch.bfloat16: 'bfloat16'}
_library(_ELEMENTS[torch.float32])


def combine(
        layers: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor] | None = None,
        relu: bool = False,
        scales: Sequence[torch.Tensor] | None = None,
        begun: bool = False,
) -> list[torch.Tensor]:
    """See `Backend.combine`."""
    like = check_combine(layers, weights, biases, outs, scales, begun)
    layers, inner = same_layout(layers, like)
    outs = [torch.empty_like(layers[0]) for _ in weights] if outs is None else list(outs)
    of_results = _floats(weights), _floats(biases), scales and _floats(scales)
    _call('combine', like, inner, layers, len(layers), *of_results, like.shape[0], outs, len(outs), begun, relu)
    return outs


def combine_backward(
        grads: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        layers: Sequence[torch.Tensor],
        means: Sequence[torch.Tensor],
        begun: Sequence[torch.Tensor] | None = None,
        scales: Sequence[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """See `Backend.combine_backward`."""
    check_combine_backward(grads, weights, layers, means, begun, scales)
    tensors, inner = same_layout([*layers, *grads])
    layers, grads = tensors[:len(layers)], tensors[len(layers):]
    outs = [torch.empty_like(layer) for layer in layers] if begun is None else list(begun)
    dots = layers[0].new_zeros(
        len(layers), torch.get_num_threads(), len(grads), layers[0].shape[1], dtype=torch.float64)
    _call(
        'combine_backward', layers[0], inner, grads, len(grads), _floats(weights), scales and _floats(scales),
        layers[0].shape[0], layers, _floats(means), outs, len(outs), begun is not None, dots)
    return outs, dots.sum(1).float()


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `Backend.moments`."""
    check_moments(x)
    [x], inner = same_layout([x])
    mean, var = x.new_empty(2, x.shape[1], dtype=torch.float32).unbind()
    _call('moments', x, inner, x, mean, var)
    return mean, var


def norm_act_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        training: bool,
        relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `Backend.norm_act_backward`."""
    check_norm_act_backward([x, y, grad], weight, bias, mean, invstd)
    (x, grad), inner = same_layout([x, grad])
    weight_grad, bias_grad = x.new_zeros(2, x.shape[1], dtype=torch.float32).unbind()
    parameters = _floats((weight, bias, mean, invstd))
    _call('norm_act_backward', x, inner, grad, x, *parameters, training, relu, grad, weight_grad, bias_grad)
    return grad, weight_grad, bias_grad


def _floats(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.float().contiguous() for parameter in parameters]


def _call(name: str, like: torch.Tensor, inner: int, *arguments: Any) -> None:
    """Call a function of the library on tensors in one layout, that of `like`."""
    if like.device.type != 'cpu' or like.dtype not in _ELEMENTS:
        raise ValueError(f'the C++ loops take float32 and bfloat16 on a CPU, not {like.dtype} on {like.device}')
    if like.numel() == 0:
        return
    channels = like.shape[1]
    columns = channels if inner == 1 else inner
    getattr(_library(_ELEMENTS[like.dtype]), name)(
        *map(_argument, arguments),
        (_NUMBER * 3)(like.numel() // columns, columns, channels),
        inner == 1,
        torch.get_num_threads(),
    )


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, list):
        return (_POINTER * len(value))(*(tensor.data_ptr() for tensor in value))
    return value
