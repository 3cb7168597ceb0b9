"""Modules with a second, fused forward pass, taken only while every part is of the type that it was made for."""
from typing import Any

import torch
from torch import nn

from .ops import has_hooks, takes_fast_path, why_not_fast
from .reparameterize import ChannelAffine, InferenceConv2d

__all__ = ['FusedModule']


class FusedModule(nn.Module):
    """A module that can compute the same with less memory traffic, and keep less of it for the backward pass.

    Attributes:
        places: Of each of its parts, at any depth, what may stand there: types, by the last part of its name, with
            ``[]`` for a number. A `transition` and its parts may be anything.
        unscaled: The places whose normalisation has no affine parameters; all others have.
    """
    places: dict[str, tuple[type[nn.Module], ...]] = {}
    unscaled: tuple[str, ...] = ()

    @torch.jit.ignore
    def runs_fused(self, x: torch.Tensor) -> bool:
        """Whether `forward` takes that path."""
        return takes_fast_path(self, x, self.why_not_fused(x))

    @torch.jit.ignore
    def why_not_fused(self, x: torch.Tensor) -> str | None:
        """Get the reason why it cannot be taken, None if it can.

        Args:
            x: What it would take.
        """
        reason = why_not_fast(x)
        if reason is None and x.numel() <= x.shape[1]:
            reason = f'an input {list(x.shape)} has no more than one value for each channel'
        if reason is None:
            for name, part in self.named_modules():
                if part is not self and name.split('.')[0] != 'transition':
                    reason = self._why_not_plain(name, part)
                    if reason:
                        return f'{name} {reason}'
        return reason

    def _why_not_plain(self, name: str, part: Any) -> str | None:
        """Get the reason why more than a part's parameters matters, None if nothing does."""
        *parents, last = name.split('.')
        place = f'{parents[-1]}[]' if last.isdigit() else last
        if isinstance(part, (ChannelAffine, InferenceConv2d)):
            return 'was reparameterised'
        if type(part) not in self.places.get(place, ()):
            return f'was replaced by a {type(part).__name__}'
        if has_hooks(part):
            return 'has hooks'
        if isinstance(part, nn.Conv2d) and not (
                part.bias is None and part.groups == 1 and part.padding_mode == 'zeros'
                and not isinstance(part.padding, str)):
            return 'was replaced by another kind of convolution'
        if isinstance(part, nn.BatchNorm2d):
            if not part.track_running_stats or any(buffer is None for buffer in part._buffers.values()):
                return 'has no running statistics'
            if part.affine and any(parameter is None for parameter in part._parameters.values()):
                return 'has only one parameter'
            if part.affine == (place in self.unscaled):
                return f'has {"parameters of its own" if part.affine else "no parameters"}'
        return None
