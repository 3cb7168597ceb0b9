"""The cross-layer depthwise convolution, as plain functions of tensors."""
from .reference import cross_layer_depthwise_conv

__all__ = ['cross_layer_depthwise_conv']
