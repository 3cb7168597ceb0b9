"""Gradient checkpointing of a block's layers: a layer runs again in the backward pass, on a recomputed input."""
import copy

import torch
from torch import nn

from .norm_act_conv import Recompute, refuse_batched, stand_in

__all__ = ['checkpoint_layer']


def checkpoint_layer(layer: nn.Module, x: torch.Tensor, recompute: Recompute | None = None) -> torch.Tensor:
    """Apply a layer without keeping any of its activations for the backward pass.

    Args:
        layer: The layer. Its batch normalisations update their running statistics again when it runs again, as under
            `torch.utils.checkpoint`.
        x: ``[N, C, H, W]``.
        recompute: Recomputes x in the backward pass; if None, x is kept.

    Returns:
        ``layer(x)``.
    """
    return _Checkpoint.apply(layer, recompute, x, *layer.parameters())


class _Checkpoint(torch.autograd.Function):

    @staticmethod
    def forward(ctx, layer, recompute, x, *parameters):  # parameters are arguments so that autograd tracks them
        ctx.layer, ctx.recompute, ctx.parameters = layer, recompute, dict(layer.named_parameters())
        ctx.autocast = dict(
            device_type=x.device.type, dtype=torch.get_autocast_dtype(x.device.type),
            enabled=torch.is_autocast_enabled(x.device.type))
        ctx.save_for_backward(None if recompute else x)
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        refuse_batched(grad)
        create_graph = torch.is_grad_enabled()
        x = ctx.recompute() if ctx.recompute else ctx.saved_tensors[0]
        needed = ctx.needs_input_grad[2:]
        renew = stand_in if create_graph else lambda tensor: tensor.detach().requires_grad_()
        inputs = [
            renew(tensor) if need else tensor for tensor, need in zip((x, *ctx.parameters.values()), needed)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = torch.func.functional_call(_twin(ctx.layer), dict(zip(ctx.parameters, inputs[1:])), inputs[0])
        wanted = [tensor for tensor, need in zip(inputs, needed) if need]
        grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph))
        return None, None, *(next(grads) if need else None for need in needed)


def _twin(module: nn.Module) -> nn.Module:
    """Copy a module but not its tensors, so that these can be replaced in the copy, unseen by other threads."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._modules = {name: part if part is None else _twin(part) for name, part in module._modules.items()}
    return twin
