"""Fold batch normalisation, which is affine in inference, into the weights of neighbouring layers.

A composite layer's second and third batch normalisation go into the convolutions before them. All others of a Deluge
block (those of the layer outputs, and each composite layer's first) go into the cross-layer convolutions' weights.
The BatchNorm at the start of a transition, and the one before the classifier, become a scale and a shift per channel;
so does the first one of a composite layer that no cross-layer convolution precedes. The stem's goes into its
convolution.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import nn

from .ops import METHODS, rows, running_sums, split_batch, takes_fast_path, why_called, why_not_fast, workspace

__all__ = [
    'ChannelAffine', 'FoldedCompositeLayer', 'FoldedDelugeBlock', 'InferenceConv2d', 'check_relu', 'fuse_block',
    'keep_hooks']


BATCH_NORMS = (
    nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct, FrozenBatchNorm2d, FrozenBatchNormAct2d)


def affine_of(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Get the scale and the shift, ``[C]`` in float32 or wider, that a batch normalisation applies in inference.

    Raises:
        ValueError: If it is no batch normalisation, has no running statistics, or its `drop` (in timm's norm layers) is
            no dropout.
    """
    if not _computes_as(norm, *BATCH_NORMS) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f'cannot be reparameterised: a batch normalisation with running statistics was expected, not {norm}')
    drop = getattr(norm, 'drop', None)
    if not (drop is None or isinstance(drop, (nn.Identity, nn.Dropout, nn.Dropout2d))):
        raise ValueError(f'cannot be reparameterised: dropout was expected after a batch normalisation, not {drop}')
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


def check_relu(norm: Any) -> None:
    """Raise a ValueError if the activation behind a batch normalisation is not the ReLU that folding assumes."""
    act = getattr(norm, 'act', None)
    if not isinstance(act, nn.ReLU):
        raise ValueError(f'cannot be reparameterised: a ReLU was expected after a batch normalisation, not {act}')


def _computes_as(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Tell whether a module's methods are those of one of the types; a subclass may have other parameters."""
    return any(
        all(getattr(getattr(module, name, None), '__func__', None) is getattr(of_type, name, None) for name in METHODS)
        for of_type in types)


class InferenceConv2d(nn.Conv2d):
    """Convolution, optionally with BN and ReLU folded in, that keeps a reordered copy of its weight to compute with.

    This is for float32 and bfloat16 on a CPU in channels_last, without gradients, where it saves reordering the weight
    at each call and a separate pass for the ReLU. Elsewhere it is an ordinary convolution. The parameters stay as they
    are. The reordered copy is not saved. It is made anew when the weight or the input size changes, but not after
    changes that PyTorch's version counter misses, such as those through `.data` or a NumPy array.
    """
    __jit_ignored_attributes__ = ['_reordered']

    def __init__(self, conv: Any, norm: nn.Module | None = None):
        """
        Args:
            conv: The `nn.Conv2d` to copy.
            norm: Batch normalisation with ReLU that follows it, to be folded in.

        Raises:
            ValueError: If the convolution has groups, does not pad with a fixed number of zeros, or computes something
                other than `nn.Conv2d` does, or if the activation is not ReLU; see also `affine_of`.
        """
        if not _computes_as(conv, nn.Conv2d):
            raise ValueError(f'cannot be reparameterised: expected what nn.Conv2d computes, not {conv}')
        if conv.groups != 1 or conv.padding_mode != 'zeros' or isinstance(conv.padding, str):
            raise ValueError(
                f'cannot be reparameterised: expected groups=1 and a number of zeros as padding, not {conv}')
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            bias=False, device='meta')
        weight: torch.Tensor = conv.weight.detach().clone()
        bias: torch.Tensor | None = None if conv.bias is None else conv.bias.detach().clone()
        if norm is not None:
            check_relu(norm)
            scale, shift = affine_of(norm)
            weight, bias = weight * scale[:, None, None, None], shift if bias is None else bias * scale + shift
        self.weight = nn.Parameter(weight.to(conv.weight.dtype))
        if bias is not None:
            self.bias = nn.Parameter(bias.to(conv.weight.dtype))
        self.relu = norm is not None
        self.train(conv.training)
        self._reordered: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Convolve.

        Args:
            x: ``[N, C, H, W]``.
            out: Memory in channels_last, of the result's size, that a plain 1x1 convolution (no bias, no ReLU) may
                write its result into.

        Returns:
            ``[N, C', H', W']``.
        """
        if not torch.jit.is_scripting():
            if self.keeps_order(x):
                if out is not None and self.is_product():
                    return self.forward_into(x, out)
                return self.forward_onednn(x)
        x = self._conv_forward(x, self.weight, self.bias)
        return torch.relu(x) if self.relu else x

    @torch.jit.ignore
    def keeps_order(self, x: torch.Tensor) -> bool:
        """Whether keeping the reordered weight is possible, and saves time."""
        return bool(
            not torch.is_grad_enabled()
            and why_not_fast(x) is None
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
    def is_product(self) -> bool:
        """Whether the convolution is a matrix product and nothing else."""
        kind = self.kernel_size, self.stride, self.padding
        return kind == ((1, 1), (1, 1), (0, 0)) and self.bias is None and not self.relu

    @torch.jit.ignore
    def forward_onednn(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve with the operators that TorchInductor uses when it freezes a model."""
        args = self.padding, self.stride, self.dilation, self.groups
        weight = self.reordered(x.shape, lambda weight: torch.ops.mkldnn._reorder_convolution_weight(
            weight, *args, list(x.shape)))
        post_op = ('relu', [], '') if self.relu else ('none', [None], '')
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *args, *post_op)

    @torch.jit.ignore
    def forward_into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write a plain 1x1 convolution's result into `out`, as a matrix product: oneDNN's convolution cannot.

        The product reorders the weight at each call, though: with fewer positions than channels, oneDNN's convolution
        and a copy of its result take less time.
        """
        matrix = rows(x)
        if len(matrix) < self.out_channels:
            return out.copy_(self.forward_onednn(x))
        weight = self.reordered((), lambda weight: weight.flatten(1).t().contiguous())
        torch.mm(matrix, weight, out=rows(out))
        return out

    @torch.jit.ignore
    def reordered(self, size: tuple[int, ...], reorder: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Get the weight reordered for an input size: the kept copy if it still fits, otherwise a new one."""
        version = None if self.weight.is_inference() else self.weight._version
        key = self.weight.data_ptr(), version, size
        kept = self._reordered  # read once: another thread may replace it
        if kept is None or kept[0] != key:  # holding the weight keeps its address unique
            kept = self._reordered = key, reorder(self.weight), self.weight.detach()
        return kept[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._reordered = None  # it would hold the memory of the weight as it was
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._reordered = None  # in inference mode, tensors have no version that would change

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), '_reordered': None}  # type: ignore[no-untyped-call]


class ChannelAffine(nn.Module):
    """Scale and shift per channel, then ReLU or nothing: for a batch normalisation with no convolution before it."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        scale, shift = affine_of(norm)
        self.weight = nn.Parameter(scale[:, None, None])
        self.bias = nn.Parameter(shift[:, None, None])
        self.act = getattr(norm, 'act', nn.Identity())
        self.train(norm.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(torch.addcmul(self.bias, x, self.weight).to(x.dtype))


class FoldedCompositeLayer(nn.Module):
    """Composite layer for inference, after its first BN and ReLU: three convolutions with the other BNs folded in."""

    def __init__(self, layer: Any):
        """
        Args:
            layer: The `CompositeLayer` to copy.
        """
        super().__init__()
        self.conv1 = InferenceConv2d(layer.conv1, layer.norm2)
        self.conv2 = InferenceConv2d(layer.conv2, layer.norm3)
        self.conv3 = InferenceConv2d(layer.conv3)

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute a layer's output.

        Args:
            x: ``[N, 2n, H, W]``.
            out: Memory in channels_last that the output may be written into; it may be that of `x`.

        Returns:
            ``[N, 2n, H, W]``.
        """
        x = self.conv2(self.conv1(x))
        return self.conv3(x) if out is None else self.conv3(x, out)


class FoldedCrossLayer(nn.Module):
    """Cross-layer depthwise convolution (paper, Eq. 1) for inference, with BNs folded in, and optionally a ReLU."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, sources: list[int], relu: bool):
        """
        Args:
            weight: Scale of each source layer's channels, ``[number of sources, C]``.
            bias: Shift of each channel, ``[C]``.
            sources: Number of each source among the block's layers.
            relu: Whether a ReLU follows.
        """
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.bias = nn.Parameter(bias.contiguous())
        self.sources = sources
        self.relu = relu

    def forward(self, layers: list[torch.Tensor]) -> torch.Tensor:
        x: torch.Tensor = self.bias[:, None, None]
        for i, source in enumerate(self.sources):
            x = torch.addcmul(x, layers[source], self.weight[i, :, None, None])
        x = x.to(layers[0].dtype)
        return torch.relu(x) if self.relu else x

    @torch.jit.ignore
    def folded_weights(self, numbers: Sequence[int], begins: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Get the weights of some layers, zero for those that are no sources: see `running_sums`."""
        bias = self.bias if begins else torch.zeros_like(self.bias)
        if isinstance(numbers, range):  # nothing is pruned: weights are numbered like the layers
            return self.weight[numbers.start:numbers.stop], bias
        of_source, zeros = dict(zip(self.sources, self.weight.split(1))), torch.zeros_like(self.weight[:1])
        return torch.cat([self.weight[:0], *(of_source.get(number, zeros) for number in numbers)]), bias


class FoldedDelugeBlock(nn.Module):
    """Deluge block for inference: per layer a cross-layer convolution, ReLU and three convolutions, without any BN.

    The BNs of the layer outputs and each composite layer's first BN are folded into the cross-layer convolutions.
    """

    def __init__(
            self,
            transition: nn.Module,
            layers: Sequence[FoldedCompositeLayer],
            cross_layers: Sequence[FoldedCrossLayer],
    ):
        """
        Args:
            transition: Maps the stem's or the previous block's output to this block's h_0.
            layers: Composite layers.
            cross_layers: Each layer's cross-layer convolution, and the block's last one.

        Unlike in a `DelugeBlock`, `cross_layers[i]` gives the input of `layers[i]`. The first one only applies the
        first layer's BN and ReLU to h_0. The last one, which no layer follows, becomes `last_cross_layer`.
        """
        super().__init__()
        self.transition = transition
        self.layers = nn.ModuleList(layers)
        self.cross_layers = nn.ModuleList(cross_layers[:-1])
        self.last_cross_layer = cross_layers[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.transition(x)
        if not torch.jit.is_scripting():
            if self.infers_fast(x):
                return self.forward_fast(x)
        outputs = [x]
        for layer, cross_layer in zip(self.layers, self.cross_layers):
            outputs.append(layer(cross_layer(outputs)))
        return self.last_cross_layer(outputs)

    @torch.jit.ignore
    def infers_fast(self, x: torch.Tensor) -> bool:
        """Whether `forward` takes `forward_fast`."""
        reason = why_not_fast(x) or ('gradients are enabled' if torch.is_grad_enabled() else None)
        if reason is None:
            reason = next(filter(None, map(self._why_called, (*self.cross_layers, self.last_cross_layer))), None)
        return takes_fast_path(self, x, reason)

    @staticmethod
    def _why_called(cross_layer: nn.Module) -> str | None:
        ours = type(cross_layer) is FoldedCrossLayer
        why = why_called(cross_layer) if ours else f'was replaced by a {type(cross_layer).__name__}'
        return why and f'a cross-layer convolution {why}'

    @torch.jit.ignore
    def forward_fast(self, x: torch.Tensor) -> torch.Tensor:
        """The part of `forward` from h_0 on, with several sums from one pass over the layers."""
        in_place = x.device.type == 'cpu' and x.is_contiguous(memory_format=torch.channels_last)
        ours = nn.ModuleList, FoldedCompositeLayer, InferenceConv2d
        if not in_place or any(type(part) not in ours or why_called(part) for part in self.layers.modules()):
            return self.combine_layers(x)  # others, or hooks, may keep what they see
        results = []
        for h in split_batch(x, len(self.layers)):
            with workspace(len(self.layers), h) as outs:
                results.append(self.combine_layers(h, outs))
        return results[0] if len(results) == 1 else torch.cat(results)

    @torch.jit.ignore
    def combine_layers(self, h: torch.Tensor, outs: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Compute from h_0 on. With `outs`, a layer's input lies in that memory until its output overwrites it."""
        cross_layers: Any = [*self.cross_layers, self.last_cross_layer]
        layers = [h]
        sources = [cross_layer.sources for cross_layer in cross_layers]
        pruned = any(len(numbers) <= i for i, numbers in enumerate(sources))

        def folded_weights(sums: range, numbers: Sequence[int], begins: bool) -> Any:
            return zip(*(cross_layers[i].folded_weights(numbers, begins) for i in sums))

        sums = running_sums(
            layers, len(cross_layers), folded_weights, None if outs is None else [*outs, torch.empty_like(h)],
            [cross_layer.relu for cross_layer in cross_layers], sources if pruned else None)
        for layer, x in zip(self.layers, sums):
            layers.append(layer(x) if outs is None else layer(x, x))
        return next(sums)


def keep_hooks(module: nn.Module, replacement: Any) -> Any:
    """Give a module's forward hooks to the module that replaces it.

    Args:
        module: The module. From now on both share their hooks: a handle removes its hook from both.
        replacement: The module that takes its place.

    Returns:
        The replacement.
    """
    for name in ('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
                 '_forward_pre_hooks_with_kwargs'):
        setattr(replacement, name, getattr(module, name))
    return replacement


@torch.no_grad()
def fuse_block(block: Any) -> FoldedDelugeBlock:
    """Make a `DelugeBlock` ready for inference.

    Args:
        block: The block; left as it is. Hooks on its layers, normalisations and cross-layer convolutions are not kept:
            these parts are not called any more.

    Returns:
        An equivalent block for inference, without layers whose output no later convolution uses.

    Raises:
        ValueError: If a part was replaced by one that cannot be folded.
    """
    layers, cross_layers = block.layers, block.cross_layers
    for name in 'layers', 'drop_paths', 'cross_layers':
        for i, part in enumerate(getattr(block, name)):
            if not _computes_as(part, *block.part_types[f'{name}[]']):
                raise ValueError(f'cannot be reparameterised: {name}.{i} was replaced by {part}')
    norms = (block.norm, *block.norms)
    if not all(isinstance(getattr(norm, 'act', nn.Identity()), nn.Identity) for norm in norms):
        raise ValueError(
            "cannot be reparameterised: the normalisation of a layer's output was replaced by one with an activation")
    scales, shifts = map(torch.stack, zip(*map(affine_of, norms)))  # [L + 1, C]
    sources, weights, biases = [[0]], [torch.ones_like(scales[:1])], [torch.zeros_like(scales[0])]  # x_1 = h_0
    for cross_layer in cross_layers:
        weight, bias = (parameter[:, 0, :, 0].t() for parameter in cross_layer.kernel())
        sources.append(cross_layer.sources)
        weights.append((weight * scales[:len(weight)])[cross_layer.sources])
        biases.append((bias + weight * shifts[:len(weight)]).sum(0))
    for i, layer in enumerate(layers):
        check_relu(layer.norm1)
        scale, shift = affine_of(layer.norm1)
        weights[i], biases[i] = weights[i] * scale, biases[i] * scale + shift

    needed = set(sources[-1])  # numbers i of the h_i in use; layers of all others are left out
    for i in reversed(range(len(layers))):
        if i + 1 in needed:
            needed.update(sources[i])
    kept = [i for i in range(len(layers)) if i + 1 in needed]
    number = {0: 0, **{i + 1: n for n, i in enumerate(kept, start=1)}}
    sums = [
        FoldedCrossLayer(weights[i], biases[i], [number[source] for source in sources[i]], relu=i < len(layers))
        for i in (*kept, len(layers))]
    fused_layers = [FoldedCompositeLayer(layers[i]) for i in kept]
    fused = FoldedDelugeBlock(block.transition, fused_layers, sums)
    for name, module in fused.named_modules():
        if name.split('.')[0] != 'transition':  # which is the block's own
            module.training = block.training
    return fused
