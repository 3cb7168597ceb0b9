"""The definition of the cross-layer depthwise convolution (paper, Eq. 1)."""
import torch


def cross_layer_depthwise_conv(
        layers: list[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor,
        scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve across layers: one weight per source layer and channel, no mixing of channels or positions.

    ``x[n, c] = sum_i scale[n, i] * (weight[c, i] * layers[i][n, c] + bias[c, i])``: the paper's Eq. 1 with its bias
    spread over the source layers, as in the released code. Every layer in ``layers`` is taken as already normalised.

    Args:
        layers: The l preceding layers' outputs, each ``[N, C, H, W]``, the block's first one first.
        weight: Scale of each source layer's channels, ``[C, 1, l, 1]``: the kernel of a depthwise convolution. Here
            and in the bias, 1 can stand in place of C, for all channels.
        bias: Shift of each source layer's channels, ``[C, 1, l, 1]``.
        scale: Factor of each image's term for each source layer, ``[N, l]``; 1 if None.

    Returns:
        The next layer's input, ``[N, C, H, W]``, in the layers' dtype; the sum runs in that dtype, too.
    """
    weight, bias = weight.movedim(2, 0), bias.movedim(2, 0)
    if scale is not None:
        scale = scale.t()[:, :, None, None, None]
        weight, bias = scale * weight[:, None], scale * bias[:, None]
    weight = weight.contiguous().to(layers[0].dtype)
    x = bias.sum(0).to(layers[0].dtype)
    for i, layer in enumerate(layers):
        x = torch.addcmul(x, layer, weight[i])
    return x
