"""Gradient checkpointing of a block's layers: a layer runs again in the backward pass, on an input computed again."""
from collections.abc import Callable

import torch

from .norm_act_conv import FusedFunction, Recompute, refuse_batched

__all__ = ['checkpoint_layer']


def checkpoint_layer(
        forward: Callable[[torch.Tensor], torch.Tensor],
        parameters: list[torch.Tensor],
        x: torch.Tensor,
        recompute: Recompute | None = None,
) -> torch.Tensor:
    """Apply a layer, and keep nothing of it for the backward pass.

    Args:
        forward: The layer. Its batch normalisation counts a batch again when it runs again, as under
            `torch.utils.checkpoint`.
        parameters: What it learns.
        x: ``[N, C, H, W]``.
        recompute: Gives x in the backward pass; it is kept if None. Nothing else may take x.

    Returns:
        ``forward(x)``.
    """
    return _Checkpoint.apply(forward, recompute, x, *parameters)


class _Checkpoint(FusedFunction):

    @staticmethod
    def forward(ctx, forward, recompute, x, *parameters):
        ctx.layer, ctx.recompute, ctx.parameters = forward, recompute, parameters
        ctx.autocast = dict(
            device_type=x.device.type, dtype=torch.get_autocast_dtype(x.device.type),
            enabled=torch.is_autocast_enabled(x.device.type))
        ctx.save_for_backward(None if recompute else x)
        return forward(x)

    @staticmethod
    def backward(ctx, grad):
        refuse_batched(grad)
        create_graph = torch.is_grad_enabled()
        x = ctx.recompute() if ctx.recompute else ctx.saved_tensors[0]
        if not create_graph:
            x = x.detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = ctx.layer(x)
        needed = ctx.needs_input_grad[2:]
        wanted = [tensor for tensor, need in zip((x, *ctx.parameters), needed) if need]
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
        return None, None, *(next(grads) if need else None for need in needed)
