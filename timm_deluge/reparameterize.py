"""Batch normalisation in inference is affine: here it becomes part of a neighbour's weights."""
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .ops import is_lean, rows

__all__ = ['ChannelAffine', 'InferenceConv2d', 'affine_of', 'fold_into_conv']


def affine_of(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the scale and the shift, ``[C]``, by which a batch normalisation acts in inference."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


class InferenceConv2d(nn.Conv2d):
    """Convolution, and ReLU or nothing, that keeps its weight in the order it computes with.

    This is for float32 and bfloat16 on a CPU in channels_last, without gradients, where it saves reordering the weight
    at each call and a pass for the ReLU; elsewhere it is the ordinary convolution. The parameters stay what they are;
    the reordered copy is not saved, and made anew when they or the input size change.
    """
    __jit_ignored_attributes__ = ['_reordered']

    def __init__(
            self,
            conv: Any,
            scale: torch.Tensor | None = None,
            bias: torch.Tensor | None = None,
            relu: bool = False,
    ):
        """
        Args:
            conv: The `nn.Conv2d` to copy, without bias.
            scale: Scale of each output channel, ``[C]``.
            bias: Shift of each output channel, ``[C]``.
            relu: Whether a ReLU follows.
        """
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            bias=False, device='meta')
        weight = conv.weight.detach()
        self.weight = nn.Parameter(weight.clone() if scale is None else weight * scale[:, None, None, None])
        if bias is not None:
            self.bias = nn.Parameter(bias)
        self.relu = relu
        self._reordered: tuple[Any, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve.

        Args:
            x: ``[N, C, H, W]``.
            out: Memory in channels_last that the result of a 1x1 convolution may take.

        Returns:
            ``[N, C', H', W']``.
        """
        if not torch.jit.is_scripting():
            if self.keeps_order(x):
                return self.forward_onednn(x) if out is None else self.forward_matmul(x, out)
        x = self._conv_forward(x, self.weight, self.bias)
        return torch.relu(x) if self.relu else x

    @torch.jit.ignore
    def keeps_order(self, x: torch.Tensor) -> bool:
        """Whether keeping the reordered weight pays, and is possible."""
        return bool(
            not torch.is_grad_enabled()
            and is_lean(x)
            and x.device.type == 'cpu'
            and x.dtype == self.weight.dtype
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled('cpu')
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
            and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
            and (x.dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )

    @torch.jit.ignore
    def forward_onednn(self, x: torch.Tensor) -> torch.Tensor:
        """The same by the operators that TorchInductor calls when it freezes a model."""
        args = self.padding, self.stride, self.dilation, self.groups
        weight = self.reordered(x.shape, lambda weight: torch.ops.mkldnn._reorder_convolution_weight(
            weight, *args, list(x.shape)))
        post_op = ('relu', [], '') if self.relu else ('none', [None], '')
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *args, *post_op)

    @torch.jit.ignore
    def forward_matmul(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """A 1x1 convolution as a matrix product, which can write where it is told to, as oneDNN's operators cannot."""
        weight = self.reordered((), lambda weight: weight.flatten(1).t().contiguous())
        torch.mm(rows(x), weight, out=rows(out))
        return out

    @torch.jit.ignore
    def reordered(self, size: tuple[int, ...], reorder: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Get the weight as reordered for an input size, at the last call or now."""
        version = None if self.weight.is_inference() else self.weight._version
        key = self.weight.data_ptr(), version, size
        kept = self._reordered  # once: another thread may replace it
        if kept is None or kept[0] != key:
            kept = self._reordered = key, reorder(self.weight)
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_reordered': None}


def fold_into_conv(conv: nn.Conv2d, norm: nn.Module) -> InferenceConv2d:
    """Fold a batch normalisation with ReLU into the convolution before it.

    Args:
        conv: Convolution without bias; left as it is.
        norm: The batch normalisation and the ReLU of its output.

    Returns:
        One convolution, with bias, that gives what both gave in inference.
    """
    return InferenceConv2d(conv, *affine_of(norm), relu=True)


class ChannelAffine(nn.Module):
    """Scale and shift of each channel, then ReLU or nothing: a batch normalisation that has no convolution before."""

    def __init__(self, norm: nn.Module, act: nn.Module):
        super().__init__()
        scale, shift = affine_of(norm)
        self.weight = nn.Parameter(scale[:, None, None])
        self.bias = nn.Parameter(shift[:, None, None])
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(torch.addcmul(self.bias, x, self.weight))
