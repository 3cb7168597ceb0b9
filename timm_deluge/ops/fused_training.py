"""Cross-layer depthwise convolutions, made for training: nothing normalised is kept, and every gradient is summed once.

Two facts save memory and time. A layer's normalisation ``(h - mean) * invstd`` is affine, so that its statistics go
into each consumer's weights, and the normalised layer is never written down. And the gradient of a layer's output,

    dh_i = d norm(h_i)^T  sum_{l > i} weight_l[i] * dx_l

is itself a sum over layers: the consumers leave their dx_l behind, and layer i adds them up when its turn comes,
instead of L times adding to a sum. The same pass over them gives the gradients of layer i's weights,
``sum dx_l * norm(h_i)``, and with these what batch normalisation takes from a gradient: its mean and its projection
on the normalised layer. Once four dx_l are there, every fourth pass also begins the sums of the next three layers, to
which they later add only the dx_l that were not there yet. Layer 0, whose turn comes last, hands all weights their
gradients.

The results x_l need not be kept either: where the backward pass wants one, it convolves again, for four of them from
one pass.

Where a backward pass is to be differentiated itself (``create_graph=True``), it follows the same order by the
definition, in operators that autograd records.
"""
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple
from weakref import WeakSet, proxy

import torch
from torch import nn

from .implementation import choose_backend
from .layout import fast_memory_format, same_layout
from .norm_act_conv import Recompute, begin_norm, normalize, refuse_batched, stand_in, statistics
from .running_sums import SUMS_PER_PASS, running_sums

__all__ = ['FusedCrossLayers']

LAYERS_PER_PASS = 4


class FusedCrossLayers:
    """A block's layer outputs h_0 … h_L, not normalised, and the cross-layer convolutions over them.

    It differentiates as the reference does, as often as wanted.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        """
        Args:
            weights: Of the cross-layer convolutions in their order, each ``[C, 1, l, 1]``.
            biases: Of the same, ``[C, 1, l, 1]``.
        """
        self._outputs: list[torch.Tensor] = []
        self._layers: list[_Layer] = []
        self._block = _Block(weights, biases)
        self._sums = running_sums(self._outputs, len(weights), self._block.folded_weights)

    def append(
            self,
            output: torch.Tensor,
            norm: nn.BatchNorm2d,
            sample_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add a layer's output.

        Args:
            output: ``[N, C, H, W]``.
            norm: Its normalisation, without affine parameters; keeps its running statistics.
            sample_scale: What stochastic depth multiplies each normalised image by, ``[N, 1, 1, 1]``.

        Returns:
            The output in the block's graph: h_0 goes to the first layer as this, all others only through
            `cross_layer_depthwise_conv`.
        """
        index = len(self._outputs)
        num_above = len(self._block.weights) - index
        parameters = [] if index else self._block.parameters
        below = self._layers[::-1]
        if num_above:  # the topmost layer has all of them, for what is to be computed again
            begins = (index + 1) % LAYERS_PER_PASS == 0 and num_above + 1 >= LAYERS_PER_PASS
            below = below[:LAYERS_PER_PASS - 1] if begins else []
        _, _, training, _, eps = args = begin_norm(norm)
        scaled, mean, invstd = _LayerOutput.apply(
            self._block, index, below, output, sample_scale, *args, *parameters)
        self._outputs.append(scaled)
        self._block.statistics.append((mean, invstd))
        self._layers.append(_Layer(output, sample_scale, mean, invstd, training, eps))
        return scaled

    def cross_layer_depthwise_conv(self, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve across all layers so far, normalised (paper, Eq. 1), with the next of the weights.

        Args:
            scale: What each image's connections are multiplied by, ``[N, l]``; for all of a block's convolutions or
                for none.

        Returns:
            The next layer's input ``[N, C, H, W]``.
        """
        index = len(self._block.scales)
        if scale is not None:
            scale = scale.to(self._block.weights[index].dtype).t().contiguous()
        self._block.scales.append(scale)
        return _CrossLayer.apply(self._block, self._sums, index, *self._outputs)

    def recompute(self) -> Recompute | None:
        """Get what gives the last result again in the backward pass, for the one that takes it, and would keep it.

        None if there is no result yet, or with stochastic depth, where all layers would have to be scaled again.
        """
        if not self._block.scales or any(layer.sample_scale is not None for layer in self._layers):
            return None
        return _Recompute(self._block, len(self._block.scales) - 1)


class _Layer(NamedTuple):
    output: torch.Tensor
    sample_scale: torch.Tensor | None
    mean: torch.Tensor
    invstd: torch.Tensor
    training: bool
    eps: float

    def normalized(self) -> torch.Tensor:
        """By the definition, differentiably."""
        normalized = normalize(self.output, self.mean, self.invstd, self.training, self.eps)
        return normalized if self.sample_scale is None else normalized * self.sample_scale


class _Recompute:
    """Gives a convolution's result again.

    Its layers come from the backward pass, where the topmost layer hands them over (`take_layers`). A pass through the
    graph of a gradient may not come by that layer, and takes those kept here. They are older than the result, so that
    no reference is circular.
    """

    def __init__(self, block: '_Block', index: int) -> None:
        self._block = block
        self.index = index
        self.layers: list[_Layer] = []
        block.recomputes.add(self)

    def __call__(self) -> torch.Tensor:
        result = self._block.current_pass().result(self.index, self.layers)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.layers = []  # as autograd frees what it has saved
        return result

    def take_grad_sum(self, total: torch.Tensor) -> None:
        """Say what the gradient of the result sums to over images and positions, ``[C]``."""
        self._block.current_pass().grad_sums[self.index] = total


class _Block:
    """What the convolutions and layers of a block share, and what each backward pass through them has left behind."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        self.parameters = [*weights, *biases]
        self.weights = [_by_layer(weight) for weight in weights]  # as they are in the forward pass, [l, C]
        self.biases = [_by_layer(bias) for bias in biases]
        self.statistics: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: see `statistics`
        self.scales: list[torch.Tensor | None] = []  # of each convolution's connections, [l, N]
        self.recomputes: WeakSet[_Recompute] = WeakSet()
        self._passes: dict[int, _Pass] = {}

    def folded_weights(
            self,
            index: int,
            numbers: Any,  # a range: these sums have all layers as sources
            begins: bool,
            scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Get the weights and the bias of normalised layers for layers that are not: see `running_sums`, `Backend`."""
        of_layers = slice(numbers.start, numbers.stop)
        means, invstds = map(torch.stack, zip(*self.statistics[of_layers]))
        weights = self.weights[index].detach()[of_layers] * invstds
        shifts = self.biases[index].detach()[of_layers] - weights * means
        # autocast would round a product of matrices
        shift = shifts.sum(0) if scale is None else (scale[..., None] * shifts[:, None]).sum(0)
        return weights[..., None, None], shift[..., None, None]

    def current_pass(self) -> '_Pass':
        """Get what the backward pass that is running has left behind; other threads may run others."""
        number = torch._C._current_graph_task_id()
        if number not in self._passes:
            self._passes[number] = _Pass(self)
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end, number))
        return self._passes[number]

    def _end(self, number: int) -> None:
        self._passes.pop(number, None)


class _Pass:
    """What convolutions and layers have left behind in a backward pass through a block, the last one first.

    A pass may begin below the last convolution, where its result takes no part, and may end above layer 0.
    """

    def __init__(self, block: _Block) -> None:
        self.block = proxy(block)  # which has this one, also after an error, and is to be freed at once
        self.clear()

    def clear(self) -> None:
        self.grads: list[torch.Tensor] = []  # of each convolution's result, [N, C, H, W]
        self.weights: list[torch.Tensor] = []  # each convolution's, [l, C]
        self.grad_scales: list[torch.Tensor | None] = []  # of each convolution's connections, [l, N]
        self.grad_sums: dict[int, torch.Tensor] = {}  # over images and positions, where they are known, [C]
        self.bias_grads: list[torch.Tensor] = []  # each convolution's, [l, C]
        self.weight_grads: list[tuple[torch.Tensor, ...]] = []  # each layer's in the convolutions above, [C]
        self.begun: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of layers below: see `_combine_backward`
        self._results: dict[int, torch.Tensor] = {}
        self.layers: list[_Layer] = []  # the block's

    def take_layers(self, layers: list[_Layer]) -> None:
        """Take the block's layers, for what is to be computed again."""
        if torch.is_grad_enabled():
            for recompute in self.block.recomputes:
                if recompute.index + 2 <= len(layers):
                    recompute.layers = layers[:recompute.index + 2]
        # an output's history leads here: neither would ever be freed
        self.layers = [layer._replace(output=layer.output.detach()) for layer in layers]

    def result(self, index: int, kept: list[_Layer]) -> torch.Tensor:
        """Convolve again, ``[N, C, H, W]``, and at once for the three before; of the layers that were kept, if any."""
        layers = (kept or self.layers)[:index + 2]
        if torch.is_grad_enabled():
            weight, bias, scale = self.block.weights[index], self.block.biases[index], self.block.scales[index]
            if scale is not None:
                weight, bias = scale[..., None] * weight[:, None], scale[..., None] * bias[:, None]
            pairs = zip(weight[..., None, None], layers)
            x = sum((factor * layer.normalized() for factor, layer in pairs), bias.sum(0)[..., None, None])
            return x.to(layers[0].output.dtype)
        if index not in self._results:
            group = range(index, max(index - SUMS_PER_PASS, -1), -1)
            all_scales = self.block.scales
            scales = None if all_scales[index] is None else [self._padded(all_scales[i], index) for i in group]
            weights, biases = zip(*(self.block.folded_weights(i, range(i + 2), True, all_scales[i]) for i in group))
            padded = [self._padded(weight, index) for weight in weights]
            outputs = [layer.output for layer in layers]
            results = choose_backend(outputs[0]).combine(outputs, padded, biases, scales=scales)
            self._results = dict(zip(group, results))
        return self._results.pop(index)

    @staticmethod
    def _padded(of_layers: Any, index: int) -> torch.Tensor:
        """Add zeros for the layers that a convolution before `index` does not have yet."""
        missing = index + 2 - len(of_layers)
        return torch.cat([of_layers, of_layers.new_zeros(missing, *of_layers.shape[1:])])

    def parameter_grads(self) -> list[torch.Tensor | None]:
        """Get the gradients of all weights and of all biases, ``[C, 1, l, 1]``, the first convolution first."""
        weight_grads: list[torch.Tensor | None] = []
        bias_grads: list[torch.Tensor | None] = []
        for i, bias_grad in reversed(list(enumerate(self.bias_grads))):
            weight_grad = torch.stack([grads[i] for grads in reversed(self.weight_grads) if i < len(grads)], 1)
            weight_grads.append(weight_grad[:, None, :, None])
            bias_grads.append(bias_grad.t().contiguous()[:, None, :, None])
        others: list[torch.Tensor | None] = [None] * (len(self.block.weights) - len(weight_grads))
        return [*weight_grads, *others, *bias_grads, *others]


class _LayerOutput(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx, block, index, below, output, sample_scale, running_mean, running_var, training, momentum, eps,
            *parameters):
        mean, invstd = statistics(output, running_mean, running_var, training, momentum, eps)
        layers = [_Layer(output, sample_scale, mean, invstd, training, eps), *below]
        ctx.block, ctx.index, ctx.norms = block, index, [layer[4:] for layer in layers]
        ctx.save_for_backward(*chain(*(layer[:4] for layer in layers)))
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        return _scale_samples(output, sample_scale, mean), mean, invstd

    @staticmethod
    def backward(ctx, direct_grad, *_):
        current = ctx.block.current_pass()
        tensors = iter(ctx.saved_tensors)
        layers = [_Layer(*islice(tensors, 4), *norm) for norm in ctx.norms]  # this one, and those below
        if not current.grads:  # a pass through the graph of a gradient may come from layer 1 alone
            return None, None, None, direct_grad, *[None] * (len(ctx.needs_input_grad) - 4)
        has_all_below = len(layers) == ctx.index + 1
        if has_all_below and len(current.layers) < len(layers):
            current.take_layers(layers[::-1])
        get_grads = _differentiable_grads if torch.is_grad_enabled() else _grads
        is_topmost = ctx.index == len(ctx.block.weights)
        grad, weight_grad = get_grads(current, ctx.index, layers[:1 if is_topmost else LAYERS_PER_PASS])
        current.weight_grads.append(weight_grad.unbind())
        if direct_grad is not None:
            grad = grad + direct_grad if torch.is_grad_enabled() else grad.add_(direct_grad)
        parameter_grads = []
        if ctx.index == 0:
            parameter_grads = current.parameter_grads()
            current.clear()
        return None, None, None, grad, *[None] * 6, *parameter_grads


def _grads(current, index, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the gradients of a layer's output and of its weights ``[l, C]`` in the convolutions above.

    Args:
        current: Of the pass.
        index: The layer's.
        layers: The layer, and perhaps those below.
    """
    output, sample_scale, mean, invstd, training, _ = layers[0]
    grad, weight_grad = _combine_backward(current, index, layers)
    if sample_scale is not None:
        grad *= sample_scale
    weight_grad = weight_grad * invstd
    if training:
        count = output.numel() / output.shape[1]
        weight = torch.stack([weight[index] for weight in current.weights])
        if sample_scale is None:
            total = invstd / count * (weight * torch.stack([grad[index] for grad in current.bias_grads])).sum(0)
        else:
            total, _ = choose_backend(grad).moments(grad)
        projection = invstd ** 2 / count * (weight * weight_grad).sum(0)
        scale = torch.stack([torch.ones_like(projection), -projection])
        shift = projection * mean - total
        [grad] = choose_backend(output).combine(
            [grad, output], [scale[..., None, None]], [shift[:, None, None]], [grad])
    return grad, weight_grad


def _combine_backward(current, index, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum what the convolutions above have left behind for a layer, or what is new since its sum was begun.

    Returns:
        The gradient of the layer's output as if its statistics were constants, ``[N, C, H, W]``, and
        ``sum dx_l * (output - mean)`` over images and positions, ``[l, C]``.
    """
    begun, num_known = None, 0
    if index in current.begun:
        partial_grad, known = current.begun.pop(index)
        layers, begun, num_known = layers[:1], [partial_grad], len(known)
        if num_known == len(current.grads):
            return partial_grad, known
    weights = [
        (torch.stack([weight[index - i] for weight in current.weights[num_known:]]) * layer.invstd)[..., None, None]
        for i, layer in enumerate(layers)]
    means = [layer.mean for layer in layers]
    outputs = [_scale_samples(layer.output, layer.sample_scale, layer.mean) for layer in layers]
    outputs = same_layout([current.grads[0], *outputs])[0][1:]  # in that of what was begun
    scales = None
    if current.grad_scales[0] is not None:
        new_scales = current.grad_scales[num_known:]
        scales = [torch.stack([scale[index - i] for scale in new_scales]) for i in range(len(layers))]
    grads, dots = choose_backend(outputs[0]).combine_backward(
        current.grads[num_known:], weights, outputs, means, begun, scales)
    if begun:
        return grads[0], torch.cat([known, dots[0]])
    current.begun.update((index - i, (grads[i], dots[i])) for i in range(1, len(layers)))
    return grads[0], dots[0]


def _differentiable_grads(current, index, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the same by the definition: they can be differentiated again."""
    output = stand_in(layers[0].output)
    normalized = layers[0]._replace(output=output).normalized()
    grads = [
        grad if scale is None else scale[index][:, None, None, None] * grad
        for scale, grad in zip(current.grad_scales, current.grads)]
    weight_grad = torch.stack([(grad * normalized).sum((0, 2, 3)) for grad in grads])
    combined = sum(weight[index][:, None, None] * grad for weight, grad in zip(current.weights, grads))
    [grad] = torch.autograd.grad(normalized, [output], combined, create_graph=True)
    return grad, weight_grad


def _scale_samples(output, sample_scale, mean) -> torch.Tensor:
    """Get the output whose normalisation, by the same statistics, is the scaled one of this output."""
    if sample_scale is None:
        return output.detach()
    mean = mean.to(output.dtype)[:, None, None]
    return (output - mean).mul_(sample_scale).add_(mean)


class _CrossLayer(torch.autograd.Function):

    @staticmethod
    def forward(ctx, block, sums, index, *outputs):
        ctx.block, ctx.index, ctx.memory_format = block, index, fast_memory_format(outputs[0])
        scale = block.scales[index]
        if scale is None:
            return next(sums)
        weights, bias = block.folded_weights(index, range(len(outputs)), True, scale)
        return choose_backend(outputs[0]).combine(outputs, [weights], [bias], scales=[scale])[0]

    @staticmethod
    def backward(ctx, grad):
        refuse_batched(grad)
        current = ctx.block.current_pass()
        weight, scale = ctx.block.weights[ctx.index], ctx.block.scales[ctx.index]
        if not torch.is_grad_enabled():
            weight = weight.detach()
        grad = grad.contiguous(memory_format=ctx.memory_format)  # sums over mixed ones are several times slower
        if scale is not None:
            bias_grad = (scale[..., None] * grad.sum((2, 3), dtype=weight.dtype)).sum(1)
        elif torch.is_grad_enabled():
            bias_grad = grad.sum((0, 2, 3), dtype=weight.dtype).expand_as(weight)
        else:
            total = current.grad_sums.pop(ctx.index, None)
            if total is None:
                mean, _ = choose_backend(grad).moments(grad)
                total = mean * (grad.numel() / grad.shape[1])
            bias_grad = total.expand_as(weight)
        current.grads.append(grad)
        current.weights.append(weight)
        current.grad_scales.append(scale)
        current.bias_grads.append(bias_grad)
        # no gradients: autograd runs each layer's backward after those of all its consumers, which is all this is for
        return (None,) * len(ctx.needs_input_grad)


def _by_layer(parameter: torch.Tensor) -> torch.Tensor:
    """Copy ``[C, 1, l, 1]`` as ``[l, C]``, in float32 or more, differentiably."""
    by_layer = parameter[:, 0, :, 0].t().to(torch.promote_types(parameter.dtype, torch.float32))
    return by_layer.clone(memory_format=torch.contiguous_format)
