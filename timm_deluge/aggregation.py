"""What a Deluge block may learn of the way from all earlier outputs to a layer's input: one class each.

The paper's cross-layer depthwise convolution has a weight per source layer and channel. The two others leave out the
one or the other, which shows what each is worth. All are special cases of the first: their `kernel` is one of its
weights, with which they train and are folded for inference as it is.
"""
import torch
import torch.nn.functional as F
from torch import nn

from .ops import cross_layer_depthwise_conv

__all__ = ['AGGREGATIONS', 'CrossLayerDepthwiseConv2d', 'LastLayerScale', 'WeightedLayerSum']


class CrossLayerDepthwiseConv2d(nn.Module):
    """Cross-layer depthwise convolution over the normalised outputs of ``num_layers`` layers (paper, Eq. 1)."""

    def __init__(self, num_layers: int, channels: int, device=None, dtype=None):
        """
        Args:
            num_layers: Number of source layers l.
            channels: Number of channels C of each.
        """
        super().__init__()
        self.num_layers = num_layers
        self.channels = channels
        shape = self.parameter_shape()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def parameter_shape(self) -> tuple[int, int, int, int]:
        """Get the shape of the weight, and of the bias."""
        return self.channels, 1, self.num_layers, 1

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Start from the mean of the source layers."""
        nn.init.constant_(self.weight, 1 / self.weight.shape[2])
        nn.init.zeros_(self.bias)

    @torch.jit.ignore
    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Get weight and bias, ``[C, 1, l, 1]`` each, of the cross-layer depthwise convolution that does the same."""
        return self.weight, self.bias

    def forward(self, layers: list[torch.Tensor]) -> torch.Tensor:
        """Combine the layers.

        Args:
            layers: l tensors ``[N, C, H, W]``.

        Returns:
            One tensor ``[N, C, H, W]``.
        """
        return cross_layer_depthwise_conv(layers, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f'num_layers={self.num_layers}, channels={self.channels}'


class WeightedLayerSum(CrossLayerDepthwiseConv2d):
    """Sum with one weight per source layer, for all channels.

    DenseFormer's depth-weighted average (https://arxiv.org/abs/2402.02622, Eq. 1) in a Deluge block.
    """

    @torch.jit.ignore
    def parameter_shape(self) -> tuple[int, int, int, int]:
        return 1, 1, self.num_layers, 1

    @torch.jit.ignore
    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self.channels, 1, self.num_layers, 1
        return self.weight.expand(shape), self.bias.expand(shape)


class LastLayerScale(CrossLayerDepthwiseConv2d):
    """The last of the layers alone, each channel with its weight: a network without connections across layers."""

    @torch.jit.ignore
    def parameter_shape(self) -> tuple[int, int, int, int]:
        return self.channels, 1, 1, 1

    @torch.jit.ignore
    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        of_others = 0, 0, self.num_layers - 1, 0
        return F.pad(self.weight, of_others), F.pad(self.bias, of_others)

    def forward(self, layers: list[torch.Tensor]) -> torch.Tensor:
        return cross_layer_depthwise_conv(layers[-1:], self.weight, self.bias)


AGGREGATIONS = {
    'cross_layer': CrossLayerDepthwiseConv2d,
    'scalar': WeightedLayerSum,
    'last': LastLayerScale,
}
