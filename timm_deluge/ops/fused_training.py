"""Cross-layer depthwise convolutions for training: no normalised layer is kept, and each gradient is summed once.

What is kept of a layer for the backward pass is its output h_i before normalisation. Two facts save memory and time.
First, a layer's normalisation ``(h - mean) * invstd`` is affine, so it is folded into the weights and biases of the
convolutions that take the layer, and the normalised layer is never written to memory. Second, the gradient of a layer's
output,

    dh_i = d norm(h_i)^T  sum_{l > i} weight_l[i] * dx_l

is itself a sum over convolutions. In the backward pass, each convolution only stores the gradient dx_l of its result,
and layer i sums these when its turn comes, instead of every convolution adding its term to the gradients of all layers
that it takes. The same pass over the dx_l gives the gradients of layer i's weights, ``sum dx_l * norm(h_i)``. With the
biases' gradients, these give the two terms that batch normalisation subtracts from a gradient: its mean (which takes a
pass of its own with stochastic depth) and its projection onto the normalised layer. Once four dx_l are stored, every
fourth layer's pass also begins the sums of the three layers below it, which later add only the dx_l stored since. Layer
0, whose turn comes last, returns the gradients of all weights and biases.

The results x_l need not be kept either: where the backward pass needs one, it is recomputed from the h_i, together with
up to three results before it, in one pass over the h_i.

A backward pass that is to be differentiated itself (``create_graph=True``) visits the layers in the same order, but
computes by the definition, with operators that autograd records.
"""
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .implementation import choose_backend
from .layout import fast_memory_format, same_layout
from .norm_act_conv import Recompute, begin_norm, normalize, refuse_batched, stand_in, statistics
from .running_sums import SUMS_PER_PASS, running_sums

__all__ = ['FusedCrossLayers']

LAYERS_PER_PASS = 4


class FusedCrossLayers:
    """A block's layer outputs h_0 … h_L, not normalised, and the cross-layer convolutions over them.

    Like the reference, they can be differentiated any number of times.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        """
        Args:
            weights: The weight of each cross-layer convolution, in order, ``[C, 1, l, 1]``.
            biases: The bias of each, ``[C, 1, l, 1]``.
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
            norm: Its batch normalisation, without affine parameters; in training, its running statistics are updated.
            sample_scale: Stochastic depth's factor of each normalised image, ``[N, 1, 1, 1]``.

        Returns:
            The output as part of the block's autograd graph. Use it only for h_0, as the first layer's input; all other
            outputs are used through `cross_layer_depthwise_conv` alone.
        """
        index = len(self._outputs)
        num_above = self._block.num_convs - index
        parameters = [] if index else self._block.parameters
        below = self._layers[::-1]
        if num_above:  # the topmost layer keeps all layers below it, from which the backward pass recomputes results
            begins = (index + 1) % LAYERS_PER_PASS == 0 and num_above + 1 >= LAYERS_PER_PASS
            below = below[:LAYERS_PER_PASS - 1] if begins else []
        _, _, training, _, eps = args = begin_norm(norm)
        self._layers.append(_Layer(output, sample_scale, training, eps))
        self._outputs.append(
            _LayerOutput.apply(self._block, index, below, output, sample_scale, *args, *parameters))
        return self._outputs[index]

    def cross_layer_depthwise_conv(self, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the block's next cross-layer convolution to all layers so far, normalised (paper, Eq. 1).

        Args:
            scale: Factors of each image's connections, ``[N, l]``; for all of a block's convolutions or for none.

        Returns:
            The next layer's input ``[N, C, H, W]``.
        """
        index = len(self._block.scales)
        if scale is not None:
            scale = scale.to(self._block.weights.dtype).t().contiguous()
        self._block.scales.append(scale)
        return _CrossLayer.apply(self._block, self._sums, index, *self._outputs)

    def recompute(self) -> Recompute | None:
        """Get a `Recompute` of the last result for the layer that takes it, which then need not keep it.

        None if there is no result yet, or with stochastic depth, where all layers would have to be scaled again.
        """
        if not self._block.scales or any(layer.sample_scale is not None for layer in self._layers):
            return None
        return _Recompute(self._block, len(self._block.scales) - 1)


class _Layer(NamedTuple):
    output: torch.Tensor
    sample_scale: torch.Tensor | None
    training: bool
    eps: float


class _Recompute:
    """Recomputes a convolution's result in the backward pass.

    The running pass has the layers for this, as the topmost layer hands them over (`_Pass.take_layers`). But a pass
    through the graph of a gradient may bypass the topmost layer; it uses the layers that are kept here. These are older
    than the result, so that no reference is circular.
    """

    def __init__(self, block: '_Block', index: int) -> None:
        self._block = block
        self.index = index
        self.layers: list[_Layer] = []
        block.recomputes.add(self)

    def __call__(self) -> torch.Tensor:
        result = self._block.current_pass().result(self.index, self.layers)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.layers = []  # autograd, too, now frees the tensors that it has saved
        return result

    def take_grad_sum(self, total: torch.Tensor) -> None:
        """Take the sum of the result's gradient over images and positions, ``[C]``."""
        self._block.current_pass().grad_sums[self.index] = total


class _Block:
    """What the convolutions and layers of a block share, and the state of each backward pass through them."""

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        self.parameters = [*weights, *biases]
        self.num_convs = len(weights)
        self.weights, self.biases = _by_layer(weights), _by_layer(biases)  # copied in the forward pass
        # of each layer; the centre is what is still to be subtracted from it: its mean, or 0 with stochastic depth,
        # where `_scale_samples` has subtracted the mean
        self.means, self.invstds, self.centres = self.weights.new_empty(3, len(self.weights), self.weights.shape[2])
        self.scales: list[Any] = []  # of each convolution's connections, [l, N]; all are None or none is
        self.recomputes: WeakSet[_Recompute] = WeakSet()
        self._passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()

    def folded_weights(
            self,
            convs: range,
            numbers: Any,  # a range: these sums have all layers as sources
            begins: bool,
            scales: torch.Tensor | None = None,
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Get weights and biases into which the normalisation of layers is folded: see `running_sums`, `Backend`.

        Args:
            convs: Indices of convolutions.
            numbers: Indices of layers.
            begins: Whether these layers are the first ones of a sum, which makes no difference here.
            scales: Factors of the layers' images, ``[number of layers, number of convolutions, N]``.
        """
        layers = slice(numbers.start, numbers.stop)
        which = layers, slice(convs.start, convs.stop)
        weights = self.weights[which] * self.invstds[layers, None]
        shifts = self.biases[which] - weights * self.centres[layers, None]
        if scales is not None:  # autocast would round a product of matrices
            shifts = scales[..., None] * shifts[:, :, None]
        return weights.unbind(1), shifts.sum(0).unbind()

    def normalized(self, index: int, layer: _Layer) -> torch.Tensor:
        """Get a layer's normalised output by the definition, differentiably."""
        normalized = normalize(layer.output, self.means[index], self.invstds[index], layer.training, layer.eps)
        return normalized if layer.sample_scale is None else normalized * layer.sample_scale

    def current_pass(self) -> '_Pass':
        """Get the state of the backward pass that is running; other threads may be running other passes."""
        number = torch._C._current_graph_task_id()
        current = self._passes.get(number)
        if current is None:
            current = self._passes[number] = _Pass(self)
            # only this callback keeps the state alive: autograd drops it after the pass, even if that fails
            torch.autograd.Variable._execution_engine.queue_callback(current.clear)
        return current


class _Pass:
    """The state of one backward pass through a block, which visits convolutions and layers from the last to the first.

    A pass may begin below the last convolution, if that one's result takes no part in it, and may end above layer 0.
    """

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.grads: list[torch.Tensor] = []  # dx_l of the convolutions so far, [N, C, H, W], the lowest one first
        self.lowest = 0  # index of the lowest convolution so far
        # for each layer in each convolution, [L + 1, L, C]
        self.weight_grads, self.bias_grads = (torch.zeros_like(block.weights) for _ in range(2))
        self.grad_sums: dict[int, torch.Tensor] = {}  # sums of dx_l over images and positions, [C], where known
        self.begun: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # sums for layers below: see `_combine_backward`
        self._results: dict[int, torch.Tensor] = {}
        self.layers: list[_Layer] = []  # those of the block whose turn has not come yet

    def clear(self) -> None:
        """Free the gradients after their last use."""
        self.grads.clear()

    def take_layers(self, layers: list[_Layer]) -> None:
        """Take the block's layers, from which results are recomputed."""
        if torch.is_grad_enabled():
            for recompute in self.block.recomputes:
                if recompute.index + 2 <= len(layers):
                    recompute.layers = layers[:recompute.index + 2]
        # detached, as an output's history leads back here, so that neither would ever be freed
        self.layers = [layer._replace(output=layer.output.detach()) for layer in layers]

    def result(self, index: int, kept: list[_Layer]) -> torch.Tensor:
        """Recompute a convolution's result, ``[N, C, H, W]``, and the three before it, which are needed next.

        If the pass is to be differentiated itself, only the one is recomputed, with operators that autograd records.

        Args:
            index: The convolution's index.
            kept: The layers that a `_Recompute` has kept, if any; else the pass's layers are used.
        """
        layers = (kept or self.layers)[:index + 2]
        all_scales = self.block.scales
        if torch.is_grad_enabled():
            weight, bias = (parameters[:index + 2, index] for parameters in (self.block.weights, self.block.biases))
            scale = all_scales[index]
            if scale is not None:
                weight, bias = scale[..., None] * weight[:, None], scale[..., None] * bias[:, None]
            terms = (
                weight[i, ..., None, None] * self.block.normalized(i, layer) for i, layer in enumerate(layers))
            x = sum(terms, bias.sum(0)[..., None, None])
            return x.to(layers[0].output.dtype)
        if index not in self._results:
            group = range(max(0, index + 1 - SUMS_PER_PASS), index + 1)
            scales = None if all_scales[index] is None else pad_sequence([all_scales[i] for i in group])
            weights, biases = self.block.folded_weights(group, range(index + 2), True, scales)
            outputs = [layer.output for layer in layers]
            results = choose_backend(outputs[0]).combine(
                outputs, weights, biases, scales=None if scales is None else scales.unbind(1))
            self._results = dict(zip(group, results))
        return self._results.pop(index)

    def above(self) -> slice:
        """Get the indices of the convolutions so far: when a layer's turn comes, those that take this layer."""
        return slice(self.lowest, self.lowest + len(self.grads))

    def parameter_grads(self) -> list[torch.Tensor]:
        """Get the gradients of all weights and of all biases, ``[C, 1, l, 1]``, the first convolution first."""
        lengths = [weight.shape[2] for weight in self.block.parameters[:self.block.num_convs]]
        return [
            grads[:length, i].t().contiguous()[:, None, :, None]
            for grads in (self.weight_grads, self.bias_grads) for i, length in enumerate(lengths)]


class _LayerOutput(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx, block, index, below, output, sample_scale, running_mean, running_var, training, momentum, eps,
            *parameters):
        block.means[index], block.invstds[index] = statistics(
            output, running_mean, running_var, training, momentum, eps)
        block.centres[index] = block.means[index] if sample_scale is None else 0
        layers = [_Layer(output, sample_scale, training, eps), *below]
        ctx.block, ctx.index, ctx.norms = block, index, [layer[2:] for layer in layers]
        ctx.save_for_backward(*chain(*(layer[:2] for layer in layers)))
        ctx.set_materialize_grads(False)
        return _scale_samples(output, sample_scale, block.means[index])

    @staticmethod
    def backward(ctx, direct_grad):
        current = ctx.block.current_pass()
        tensors = iter(ctx.saved_tensors)
        layers = [_Layer(*islice(tensors, 2), *norm) for norm in ctx.norms]  # this one, and those below
        if not current.grads:  # a pass through the graph of a gradient may reach h_0 from layer 1 alone
            return None, None, None, direct_grad, *[None] * (len(ctx.needs_input_grad) - 4)
        has_all_below = len(layers) == ctx.index + 1
        if has_all_below and len(current.layers) < len(layers):
            current.take_layers(layers[::-1])
        get_grads = _differentiable_grads if torch.is_grad_enabled() else _grads
        is_topmost = ctx.index == ctx.block.num_convs
        grad, weight_grad = get_grads(current, ctx.index, layers[:1] if is_topmost else layers)
        current.weight_grads[ctx.index, current.above()] = weight_grad
        del current.layers[ctx.index:]  # results that are still to be recomputed do not need these
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
        current: State of the backward pass.
        index: The layer's index.
        layers: The layer, followed by the layers below it whose sums this begins, if any.
    """
    output, sample_scale, training, _ = layers[0]
    mean, invstd = current.block.means[index], current.block.invstds[index]
    grad, weight_grad = _combine_backward(current, index, layers)
    if sample_scale is not None:
        grad *= sample_scale
    weight_grad = weight_grad * invstd
    if training:
        convs = current.above()
        weight = current.block.weights[index, convs]
        factor = invstd * (-output.shape[1] / output.numel())
        if sample_scale is None:
            shift = factor * (weight * current.bias_grads[index, convs]).sum(0)
        else:
            shift = -choose_backend(grad).moments(grad)[0]
        scale = factor * invstd * (weight * weight_grad).sum(0)
        [grad] = choose_backend(output).combine([output], [scale[None]], [shift - scale * mean], [grad], begun=True)
    return grad, weight_grad


def _combine_backward(current, index, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the gradients of the convolutions above for a layer, or only those that are new since its sum was begun.

    If layers below it are given, too, their sums are begun in the same pass.

    Returns:
        The gradient of the layer's output as if its statistics were constants, ``[N, C, H, W]``, and
        ``sum dx_l * (output - mean)`` over images and positions, ``[l, C]``.
    """
    begun, convs, grads = None, current.above(), current.grads
    if index in current.begun:
        partial_grad, known = current.begun.pop(index)
        layers, begun = layers[:1], [partial_grad]
        grads = grads[:len(grads) - len(known)]
        if not grads:
            return partial_grad, known
        convs = slice(convs.start, convs.start + len(grads))
    of_layers = slice(index + 1 - len(layers), index + 1)
    weights = (current.block.weights[of_layers, convs] * current.block.invstds[of_layers, None]).unbind()[::-1]
    means, centres = (of_all[of_layers].unbind()[::-1] for of_all in (current.block.means, current.block.centres))
    outputs = [_scale_samples(layer.output, layer.sample_scale, mean) for layer, mean in zip(layers, means)]
    outputs, _ = same_layout(outputs, current.grads[0])  # the layout of sums that were begun
    scales = None
    if current.block.scales[0] is not None:
        scales = [torch.stack([scale[index - i] for scale in current.block.scales[convs]]) for i in range(len(layers))]
    sums, dots = choose_backend(outputs[0]).combine_backward(grads, weights, outputs, centres, begun, scales)
    if begun:
        return sums[0], torch.cat([dots[0], known])
    current.begun.update((index - i, (sums[i], dots[i])) for i in range(1, len(layers)))
    return sums[0], dots[0]


def _differentiable_grads(current, index, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the same as `_grads` by the definition, so that the gradients can be differentiated again."""
    output = stand_in(layers[0].output)
    normalized = current.block.normalized(index, layers[0]._replace(output=output))
    convs = current.above()
    grads = [
        grad if scale is None else scale[index][:, None, None, None] * grad
        for scale, grad in zip(current.block.scales[convs], current.grads)]
    weight_grad = torch.stack([(grad * normalized).sum((0, 2, 3)) for grad in grads])
    combined = sum(
        weight[:, None, None] * grad for weight, grad in zip(current.block.weights[index, convs], grads))
    [grad] = torch.autograd.grad(normalized, [output], combined, create_graph=True)
    return grad, weight_grad


def _scale_samples(output, sample_scale, mean) -> torch.Tensor:
    """Subtract the mean from a layer and scale its images, so that dropped ones are 0; without scales, detach it."""
    if sample_scale is None:
        return output.detach()
    scale = sample_scale.flatten().to(mean.dtype)
    weights, biases = [torch.ones_like(mean)[None]], [-scale[:, None] * mean]
    return choose_backend(output).combine([output.detach()], weights, biases, scales=[scale[None]])[0]


class _CrossLayer(torch.autograd.Function):

    @staticmethod
    def forward(ctx, block, sums, index, *outputs):
        ctx.block, ctx.index, ctx.num_layers = block, index, len(outputs)
        ctx.memory_format = fast_memory_format(outputs[0])
        scale = block.scales[index]
        if scale is None:
            return next(sums)
        weights, biases = block.folded_weights(range(index, index + 1), range(len(outputs)), True, scale[:, None])
        return choose_backend(outputs[0]).combine(outputs, weights, biases, scales=[scale])[0]

    @staticmethod
    def backward(ctx, grad):
        refuse_batched(grad)
        current = ctx.block.current_pass()
        scale, dtype = ctx.block.scales[ctx.index], ctx.block.weights.dtype
        grad = grad.contiguous(memory_format=ctx.memory_format)  # mixed formats make sums several times slower
        if scale is not None:
            bias_grad = (scale[..., None] * grad.sum((2, 3), dtype=dtype)).sum(1)
        elif torch.is_grad_enabled():
            bias_grad = grad.sum((0, 2, 3), dtype=dtype)
        elif ctx.index in current.grad_sums:
            bias_grad = current.grad_sums.pop(ctx.index)
        else:
            mean, _ = choose_backend(grad).moments(grad)
            bias_grad = mean * (grad.numel() / grad.shape[1])
        current.bias_grads[:ctx.num_layers, ctx.index] = bias_grad
        current.grads.insert(0, grad)
        current.lowest = ctx.index
        # no gradients: the layers are inputs only for autograd to run their backward after those of all their consumers
        return (None,) * len(ctx.needs_input_grad)


def _by_layer(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy the convolutions' parameters, ``[C, 1, l, 1]`` each, into one tensor ``[L + 1, L, C]``, differentiably.

    It is in float32 or more, indexed by layer and convolution, and 0 where a convolution does not take the layer.
    """
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    return pad_sequence([parameter.flatten(1).t().to(dtype) for parameter in parameters])
