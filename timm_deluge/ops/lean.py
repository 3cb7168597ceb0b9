"""Cross-layer depthwise convolutions for training: nothing normalised is kept, and every gradient is summed once.

Two facts make them lean. A layer's normalisation ``(h - mean) * invstd`` is affine, so that its statistics go into
each consumer's weights, and the normalised layer is never written down. And the gradient of a layer's output,

    dh_i = d norm(h_i)^T  sum_{l > i} weight_l[i] * dx_l

is itself a sum over layers: the consumers leave their dx_l behind, and layer i adds them up when its turn comes,
instead of L times adding to a sum. What batch normalisation takes from a gradient, its mean and its projection on the
normalised layer, follows from the gradients of the cross-layer weights, which are there by then.
"""
import torch
from torch import nn

from .implementation import kernels
from .norm_act_conv import LeanFunction, norm_args

__all__ = ['LayerOutputs']


class LayerOutputs:
    """A block's layer outputs h_0 … h_l, not normalised, and the cross-layer convolutions over them.

    It differentiates as the reference does, once, and again through a graph that was retained.
    """

    def __init__(self) -> None:
        self._outputs: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []
        self._invstds: list[torch.Tensor] = []
        self._gradients = _Gradients()

    def append(self, output: torch.Tensor, norm: nn.BatchNorm2d) -> None:
        """Add a layer's output.

        Args:
            output: ``[N, C, H, W]``.
            norm: Its normalisation, without affine parameters; keeps its running statistics.
        """
        index = len(self._outputs)
        output, mean, invstd = _LayerOutput.apply(self._gradients, index, output, *norm_args(norm))
        self._outputs.append(output)
        self._means.append(mean)
        self._invstds.append(invstd)

    def cross_layer_depthwise_conv(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Convolve across all layers so far, normalised (paper, Eq. 1).

        Args:
            weight: ``[C, 1, l, 1]``.
            bias: ``[C, 1, l, 1]``.

        Returns:
            The next layer's input ``[N, C, H, W]``.
        """
        means, invstds = torch.stack(self._means), torch.stack(self._invstds)
        return _CrossLayer.apply(self._gradients, weight, bias, means, invstds, *self._outputs)


class _Gradients:
    """What the cross-layer convolutions of a block, the last one first, leave behind in a backward pass."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.grads: list[torch.Tensor] = []  # of each one's output, [N, C, H, W]
        self.weights: list[torch.Tensor] = []  # each one's, [l, C]
        self.sum = self.projection = torch.empty(0)  # of each layer's gradient: alone, times the layer; [L + 1, C]

    def add(self, grad: torch.Tensor, weight: torch.Tensor, weight_grad: torch.Tensor, bias_grad: torch.Tensor) -> None:
        if not self.weights or len(weight) >= len(self.weights[-1]):  # the block's last one: a new backward pass
            self.clear()
            self.sum, self.projection = weight * bias_grad, weight * weight_grad
        else:
            self.sum[:len(weight)].addcmul_(weight, bias_grad)
            self.projection[:len(weight)].addcmul_(weight, weight_grad)
        self.grads.append(grad)
        self.weights.append(weight)


class _LayerOutput(LeanFunction):

    @staticmethod
    def forward(ctx, gradients, index, output, running_mean, running_var, training, momentum, eps):
        if training:
            mean, var = torch.ops.aten.batch_norm_update_stats(output, running_mean, running_var, momentum)
        else:
            mean, var = running_mean.clone(), running_var
        invstd = (var + eps).rsqrt()
        ctx.gradients, ctx.index, ctx.training = gradients, index, training
        ctx.save_for_backward(output, mean, invstd)
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        return output.view_as(output), mean, invstd

    @staticmethod
    def backward(ctx, *_):
        LeanFunction.check_first_derivative()
        output, mean, invstd = ctx.saved_tensors
        gradients, index = ctx.gradients, ctx.index
        layers, weight = list(gradients.grads), torch.stack([weight[index] for weight in gradients.weights])
        bias = torch.zeros_like(mean)
        if ctx.training:
            count = output.numel() / output.shape[1]
            projection = gradients.projection[index] * invstd / count
            layers.append(output)
            weight = torch.cat([weight, -projection[None]])
            bias = projection * mean - gradients.sum[index] / count
        grad = kernels(output).combine(layers, (weight * invstd)[..., None, None], (bias * invstd)[:, None, None])
        if index == 0:
            gradients.clear()
        return None, None, grad, *[None] * 5


class _CrossLayer(LeanFunction):

    @staticmethod
    def forward(ctx, gradients, weight, bias, means, invstds, *outputs):
        ctx.gradients = gradients
        ctx.save_for_backward(weight, means, invstds, *outputs)
        scale = _by_layer(weight) * invstds
        shift = (_by_layer(bias) - scale * means).sum(0)
        return kernels(outputs[0]).combine(outputs, scale[..., None, None], shift[:, None, None])

    @staticmethod
    def backward(ctx, grad):
        LeanFunction.check_first_derivative()
        weight, means, invstds, *outputs = ctx.saved_tensors
        if grad.stride() != outputs[0].stride():  # sums over mixed memory formats are several times slower
            grad = torch.empty_like(outputs[0]).copy_(grad)
        weight_grad, bias_grad = kernels(grad).correlate(outputs, means, invstds, grad)
        ctx.gradients.add(grad, _by_layer(weight), weight_grad, bias_grad)
        weight_grad = weight_grad.t()[:, None, :, None].to(weight.dtype)
        bias_grad = bias_grad[:, None, None, None].to(weight.dtype).expand_as(weight)
        return None, weight_grad, bias_grad, None, None, *[None] * len(outputs)


def _by_layer(parameter: torch.Tensor) -> torch.Tensor:
    """``[C, 1, l, 1]`` as ``[l, C]``."""
    return parameter[:, 0, :, 0].t().contiguous()
