"""The ways in which a Deluge block can combine its earlier outputs into a layer's input: one class each.

The paper's cross-layer depthwise convolution has one weight per source layer and channel. Each of the other two gives
up one of these, which shows what it is worth: `WeightedLayerSum` has one weight for all channels, and `LastLayerScale`
only the last source layer. Both are special cases of the first: `kernel` returns the equivalent convolution's weights,
repeated or filled with zeros, so they take the fused path, too. A pruned convolution is one with fewer sources.
"""
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .ops import cross_layer_depthwise_conv

__all__ = ['AGGREGATIONS', 'CrossLayerDepthwiseConv2d', 'LastLayerScale', 'WeightedLayerSum', 'spread']


class CrossLayerDepthwiseConv2d(nn.Module):
    """Cross-layer depthwise convolution over the normalised outputs of ``num_layers`` layers (paper, Eq. 1)."""
    mask: torch.Tensor | None

    def __init__(
            self,
            num_layers: int,
            channels: int,
            sources: Sequence[int] | None = None,
            drop_rate: float = 0.,
            masked: bool = False,
            device: Any = None,
            dtype: Any = None,
    ):
        """
        Args:
            num_layers: Number l of sources: the block's input h_0, and the outputs of its layers so far.
            channels: Number of channels C of each layer.
            sources: Indices of the source layers that take part, ascending; all if None.
            drop_rate: Share of the connections to source layers that are dropped in training, drawn for each image.
            masked: Whether single weights may be pruned: those for which the buffer `mask` is False.
        """
        super().__init__()
        self.num_layers = num_layers
        self.channels = channels
        self.drop_rate = drop_rate
        self.sources = list(range(num_layers) if sources is None else sources)
        shape = self.parameter_shape()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_buffer('mask', torch.ones(shape, device=device, dtype=torch.bool) if masked else None)
        self.reset_parameters()

    @torch.jit.ignore
    def parameter_shape(self) -> tuple[int, int, int, int]:
        """Get the shape of the weight, and of the bias."""
        return self.channels, 1, len(self.sources), 1

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Start from the mean of the source layers."""
        nn.init.constant_(self.weight, 1 / len(self.sources))
        nn.init.zeros_(self.bias)
        if self.mask is not None:
            self.mask.fill_(True)

    def masked_weight(self) -> torch.Tensor:
        """Get the weight, of `parameter_shape`, with zeros for pruned weights."""
        mask = self.mask
        return self.weight if mask is None else self.weight * mask

    @torch.jit.ignore
    def kernel(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Get weight and bias, ``[C, 1, l, 1]`` each, of the equivalent cross-layer depthwise convolution."""
        shape = self.channels, 1, len(self.sources), 1
        weight, bias = self.masked_weight().expand(shape), self.bias.expand(shape)
        if len(self.sources) == self.num_layers:
            return weight, bias
        return spread(weight, self.sources, self.num_layers), spread(bias, self.sources, self.num_layers)

    def draw_scale(self, batch_size: int) -> torch.Tensor | None:
        """Draw a factor for each image and source layer: 0 if that connection is dropped, more than 1 if it is not.

        Args:
            batch_size: Number of images N.

        Returns:
            ``[N, l]``, of mean 1; None if nothing is to be dropped.
        """
        if not self.training or self.drop_rate == 0.:
            return None
        keep_rate = 1. - self.drop_rate
        return self.weight.new_empty((batch_size, self.num_layers)).bernoulli_(keep_rate).div_(keep_rate)

    def forward(self, layers: list[torch.Tensor]) -> torch.Tensor:
        """Combine the layers.

        Args:
            layers: l tensors ``[N, C, H, W]``.

        Returns:
            One tensor ``[N, C, H, W]``.
        """
        scale = self.draw_scale(layers[0].shape[0])
        if scale is not None:
            scale = scale[:, self.sources]
        return cross_layer_depthwise_conv([layers[i] for i in self.sources], self.masked_weight(), self.bias, scale)

    def extra_repr(self) -> str:
        sources = '' if len(self.sources) == self.num_layers else f', sources={self.sources}'
        drop_rate = f', drop_rate={self.drop_rate}' if self.drop_rate else ''
        return f'num_layers={self.num_layers}, channels={self.channels}{sources}{drop_rate}'


class WeightedLayerSum(CrossLayerDepthwiseConv2d):
    """Sum with one weight per source layer, for all channels.

    DenseFormer's depth-weighted average (https://arxiv.org/abs/2402.02622, Eq. 1) in a Deluge block.
    """

    @torch.jit.ignore
    def parameter_shape(self) -> tuple[int, int, int, int]:
        return 1, 1, len(self.sources), 1


class LastLayerScale(CrossLayerDepthwiseConv2d):
    """The last layer alone, with one weight per channel: a network without connections across layers."""

    def __init__(self, num_layers: int, channels: int, sources: Any = None, *args: Any, **kwargs: Any):
        """As `CrossLayerDepthwiseConv2d`, but `sources` is ignored: the only source is the last layer."""
        super().__init__(num_layers, channels, [num_layers - 1], *args, **kwargs)


def spread(parameter: torch.Tensor, sources: Sequence[int], num_layers: int) -> torch.Tensor:
    """Put what there is for some source layers in its place among all, with zeros for the others.

    Args:
        parameter: ``[C, 1, number of sources, 1]``.
        sources: Indices of the source layers.
        num_layers: Number l of all layers.

    Returns:
        ``[C, 1, l, 1]``.
    """
    of_source = dict(zip(sources, parameter.unbind(2)))
    zeros = torch.zeros_like(parameter[:, :, 0])
    return torch.stack([of_source.get(i, zeros) for i in range(num_layers)], 2)


AGGREGATIONS: dict[str, type[CrossLayerDepthwiseConv2d]] = {
    'cross_layer': CrossLayerDepthwiseConv2d,
    'scalar': WeightedLayerSum,
    'last': LastLayerScale,
}
