"""The switch between the implementations of the cross-layer depthwise convolution."""
import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

from . import aten
from .backend import Backend

__all__ = ['choose_backend', 'get_implementation', 'set_implementation', 'why_not_fast']

IMPLEMENTATIONS = ('auto', 'reference', 'aten', 'cpp', 'triton')
COMPILED = 'the model is compiled or exported'
_implementation = 'auto'
_logger = logging.getLogger(__name__)


def set_implementation(name: str) -> None:
    """Choose by hand how cross-layer depthwise convolutions are computed, for every model of this process.

    The environment variable `TIMM_DELUGE_IMPLEMENTATION` chooses the same before the package is imported.

    All implementations compute the same function; their results differ by rounding alone. The reference is always used
    while a model is traced, scripted, compiled or exported, under `torch.func`, forward-mode differentiation or a
    dispatch mode such as `FlopCounterMode`, in float16 on a CPU, and on devices other than CPU and CUDA.

    Args:
        name: One of

            * 'auto', the default: the fused path and, in a reparameterised model, several sums from each pass over the
              layers. Sums are computed by Triton's kernels on a CUDA device and by C++ loops on a CPU, where these
              compile, else by ATen's operators.
            * 'reference': differentiable operators only, layer by layer: for debugging.
            * 'aten', 'cpp', 'triton': as 'auto', but with this backend wherever it can run. Elsewhere, ATen's operators
              take its place, or for 'triton' on a CPU, the backend that 'auto' takes. 'cpp' and 'triton' also try again
              what did not compile before; on a CUDA device where Triton's kernels do not run, 'triton' lets its errors
              through.

    Raises:
        ValueError: If there is no such implementation.
        ImportError: If Triton is chosen but not installed, or the C++ loops are but do not compile.
    """
    global _implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'implementation {name!r}: must be one of {", ".join(map(repr, IMPLEMENTATIONS))}')
    if name == 'triton' and not _has_triton():
        raise ImportError("implementation 'triton' needs the package triton: pip install triton")
    if name == 'cpp':
        from . import cpp  # noqa: F401 raises if it does not compile
    if name in ('cpp', 'triton'):
        for backend in _cpp, _triton:
            backend.cache_clear()  # what it needs may have been installed since
    _implementation = name


def get_implementation() -> str:
    """Get the name that `set_implementation` set."""
    return _implementation


def why_not_fast(x: torch.Tensor) -> str | None:
    """Get the reason why fast paths may not run on a tensor, None if they may: in plain eager mode on most tensors."""
    if torch.compiler.is_compiling():
        return COMPILED
    if torch.jit.is_tracing():
        return 'the model is traced'
    if _implementation == 'reference':
        return "set_implementation('reference') was called"
    if type(x) is not torch.Tensor:
        return f'the input is a {type(x).__name__}, not a plain torch.Tensor'
    if x.device.type not in ('cpu', 'cuda'):
        return f'the device type is {x.device.type!r}, not cpu or cuda'
    if x.dtype is torch.float16 and not x.is_cuda:
        return 'float16 on a CPU is more exact in the reference'
    if torch._C._are_functorch_transforms_active():
        return 'a torch.func transform is active'
    if torch.autograd.forward_ad._current_level >= 0:
        return 'forward-mode differentiation is active'
    if x.is_inference() and torch.is_grad_enabled():
        return 'a tensor made in inference mode cannot be kept for the backward pass'
    if torch._C._len_torch_dispatch_stack():
        return 'a dispatch mode is active, such as FlopCounterMode, which has to see every operator'
    return None


def choose_backend(x: torch.Tensor) -> Backend:
    """Get the backend for a tensor: it depends on device, dtype and the implementation that was set."""
    if x.dtype is torch.float64:  # kernels and loops sum in float32
        return aten
    if _implementation == 'triton' and (x.is_cuda or os.environ.get('TRITON_INTERPRET') == '1'):
        from . import triton
        return triton
    if x.is_cuda:
        return _implementation == 'auto' and _triton(x.device, x.dtype) or aten
    if _implementation in ('auto', 'cpp', 'triton') and x.dtype in (torch.float32, torch.bfloat16):
        return _cpp(x.dtype) or aten
    return aten


@cache
def _cpp(dtype: torch.dtype) -> Backend | None:
    """Get the C++ loops for an element type, or None if they do not compile, which causes no more than one warning."""
    if dtype is not torch.float32 and not _cpp(torch.float32):
        return None
    try:
        from . import cpp
        cpp._library(cpp._ELEMENTS[dtype])
    except ImportError as error:
        _logger.warning(
            "ATen's operators take the place of the C++ loops, which are faster. These need a C++ compiler, such as "
            'g++ (Debian, Ubuntu: apt install g++), or the one that the environment variable CXX names: %s', error)
        return None
    return cpp


@cache
def _triton(device: torch.device, dtype: torch.dtype) -> Backend | None:
    """Get Triton's kernels, or None if Triton is not installed or, with a warning, if the kernels do not run."""
    if not _has_triton() or (dtype is not torch.float32 and not _triton(device, torch.float32)):
        return None
    try:
        from . import triton
        if dtype is torch.bfloat16 and device.type == 'cuda' and torch.cuda.get_device_capability(device) < (8, 0):
            raise TypeError('it has no bfloat16')
        one = torch.ones(1, device=device, dtype=dtype)
        triton.combine([one.view(1, 1, 1, 1)], [one.view(1, 1)], [one])
    except Exception as error:  # from Triton, the compilers that it needs, or the device
        _logger.warning(
            "ATen's operators take the place of Triton's kernels, which do not run on %s in %s: %s",
            device, dtype, error)
        return None
    return triton


def _has_triton() -> bool:
    return find_spec('triton') is not None


try:
    set_implementation(os.environ.get('TIMM_DELUGE_IMPLEMENTATION') or _implementation)
except (ImportError, ValueError) as error:
    raise type(error)(f'The environment variable TIMM_DELUGE_IMPLEMENTATION: {error}') from error
