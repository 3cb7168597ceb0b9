"""Modules with a second, fused forward pass, taken only while every part has a type that this pass supports."""
from typing import Any

import torch
from torch import nn

from .ops import takes_fast_path, why_called, why_not_fast
from .reparameterize import ChannelAffine, InferenceConv2d

__all__ = ['FusedModule']


class FusedModule(nn.Module):
    """A module that can also compute its result with less memory traffic, keeping less for the backward pass.

    Attributes:
        part_types: The types that a part at any depth may have, keyed by the last component of its name; ``layers[]``
            stands for the elements of ``layers``. A `transition` and its parts may have any type. The entries of this
            base class are the parts of timm's `BatchNormAct2d`.
        not_affine: Names of the batch normalisations without affine parameters; all others must have them.
    """
    part_types: dict[str, tuple[type[nn.Module], ...]] = {'act': (nn.ReLU, nn.Identity), 'drop': (nn.Identity,)}
    not_affine: tuple[str, ...] = ()

    @torch.jit.ignore
    def runs_fused(self, x: torch.Tensor) -> bool:
        """Whether `forward` takes the fused path."""
        return takes_fast_path(self, x, self.why_not_fused(x))

    @torch.jit.ignore
    def why_not_fused(self, x: torch.Tensor) -> str | None:
        """Get the reason why the fused path cannot be taken, None if it can.

        Args:
            x: The input of the fused path.
        """
        if reason := why_not_fast(x):
            return reason
        if x.numel() <= x.shape[1]:
            return f'an input {list(x.shape)} has no more than one value for each channel'
        for name, part in self.named_modules():
            if part is not self and name.split('.')[0] != 'transition':
                if reason := self._why_not_plain(name, part):
                    return f'{name} {reason}'
        return None

    def _why_not_plain(self, name: str, part: Any) -> str | None:
        """Get the reason why a part cannot be reduced to its parameters, None if it can."""
        *parents, last = name.split('.')
        last = f'{parents[-1]}[]' if last.isdigit() else last
        if isinstance(part, (ChannelAffine, InferenceConv2d)):
            return 'was reparameterised'
        if type(part) not in self.part_types.get(last, ()):
            return f'was replaced by a {type(part).__name__}'
        if reason := why_called(part):
            return reason
        if isinstance(part, nn.Conv2d) and not (
                part.bias is None and part.groups == 1 and part.padding_mode == 'zeros'
                and all(isinstance(arg, tuple) for arg in (part.stride, part.padding, part.dilation))):
            return 'was replaced by another kind of convolution'
        if isinstance(part, nn.BatchNorm2d):
            if not part.track_running_stats or any(buffer is None for buffer in part._buffers.values()):
                return 'has no running statistics'
            if part.affine and any(parameter is None for parameter in part._parameters.values()):
                return 'has no weight or no bias'
            if part.affine == (last in self.not_affine):
                return f'has {"parameters of its own" if part.affine else "no parameters"}'
        return None
