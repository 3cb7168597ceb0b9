"""Which implementation a module takes, and why not a fast one."""
import copy
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from .implementation import COMPILED, choose_backend

__all__ = ['METHODS', 'Decision', 'explain_implementation', 'takes_fast_path', 'why_called']

METHODS = 'forward', '_conv_forward', 'bottleneck'  # those that say what a module computes
_logger = logging.getLogger(__name__)
_decisions: ContextVar[dict[nn.Module, 'Decision'] | None] = ContextVar('decisions', default=None)
_in_compiled: ContextVar[bool] = ContextVar('in_compiled', default=False)


class Decision(NamedTuple):
    """The implementation that a module takes.

    Attributes:
        implementation: 'reference', or the backend of the fast path: 'aten', 'cpp' or 'triton'.
        reason: Why it is the reference, None if it is not.
    """
    implementation: str
    reason: str | None


def takes_fast_path(module: nn.Module, x: torch.Tensor, reason: str | None) -> bool:
    """Let a module take its fast path unless there is a reason against it, which is logged at debug level.

    Args:
        module: The module that asks.
        x: The input of its fast path.
        reason: Why it cannot take that path, None if it can.
    """
    if not torch.compiler.is_compiling():
        if _in_compiled.get():
            reason = COMPILED
        _note(module, x, reason)
    return reason is None


def _note(module: nn.Module, x: torch.Tensor, reason: str | None) -> None:
    decisions = _decisions.get()
    if decisions is not None:
        name = 'reference' if reason else choose_backend(x).__name__.rpartition('.')[2]
        decisions[module] = Decision(name, reason)
    if reason:
        _logger.debug('%s takes the reference implementation: %s', type(module).__name__, reason)


def explain_implementation(model: nn.Module, x: torch.Tensor) -> dict[str, Decision]:
    """Tell which implementation a call of a model takes, and why not a fast one, by calling a copy of it.

    Args:
        model: A DelugeNet, or a module that contains one, compiled or not, in the mode in which it is to be called.
        x: Its input, such as images ``[N, in_chans, H, W]``.

    Returns:
        The decision of each module that had to make one, by the module's name. A block that takes its fast path
        decides for its layers, too, unless it recomputes them (gradient checkpointing).
    """
    original, model = model, copy.deepcopy(model)
    parts: Any = zip(original.modules(), model.modules())
    for module, twin in parts:
        if hasattr(module, '_orig_mod'):  # by torch.compile or, then without a callback, torch.compiler.disable
            twin.forward = _stand_in(twin._orig_mod.__call__, module.dynamo_ctx.callback is not None)
        elif module._compiled_call_impl is not None:  # by its own method
            twin._compiled_call_impl = _stand_in(twin._call_impl, True)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    decisions: dict[nn.Module, Decision] = {}
    token = _decisions.set(decisions)
    try:
        with torch.random.fork_rng(devices):
            model(x)
    finally:
        _decisions.reset(token)
    return {name: decisions[module] for name, module in model.named_modules() if module in decisions}


def _stand_in(call: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """Get a call that decides as a compiled one does, or as one excluded from compilation, without compiling."""
    def decide(*args: Any, **kwargs: Any) -> Any:
        token = _in_compiled.set(compiled)
        try:
            return call(*args, **kwargs)
        finally:
            _in_compiled.reset(token)
    return decide


def why_called(module: nn.Module) -> str | None:
    """Get the reason why a module must be called, instead of using its parameters elsewhere; None if there is none."""
    if torch.nn.modules.module._has_any_global_hook():
        return 'has hooks, as all modules have'
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return 'has hooks'
    if any(name in vars(module) for name in METHODS):
        return 'has another forward'
    if module._compiled_call_impl is not None:
        return 'was compiled'
    return None
