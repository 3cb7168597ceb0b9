"""DelugeNet: deep networks with cross-layer information inflows, as a timm model.

A DelugeNet is a pre-activation bottleneck ResNet whose shortcuts learn. A ResNet hands every layer the plain sum of
all earlier outputs of its block; a DelugeNet hands it a *cross-layer depthwise convolution* over them, with one
weight per source layer and channel. Layers far apart stay connected, each channel picks its sources, and the price is
0.5 to 2.6 % of the network's multiply-adds.

A block here is what timm calls a stage, and a composite layer is what timm calls a block. With h_0 a block's input and
h_1 … h_L the outputs of its composite layers::

    x_1 = h_0
    x_l = sum_i  weight_l[i] * norm(h_i) + bias_l[i],    i = 0 … l - 1        the cross-layer convolution, of l sources
    h_l = Conv1x1(ReLU(BN(Conv3x3(ReLU(BN(Conv1x1(ReLU(BN(x_l)))))))))        the composite layer

``norm`` is batch normalisation without affine parameters, which the released code applies to every input of every
cross-layer convolution. It depends on the source layer alone, so it is computed once, where the layer is produced.
The paper's Eq. 1 has one bias per channel; the released code has one per source layer and channel, and only the latter
gives the paper's parameter counts. x_{L+1} is the block's output. It goes to the next block's transition (BN, strided
3x3 convolution) or, after the last block, to BN, ReLU, pooling and the classifier. What the paper calls a block
transition is the cross-layer convolution that gives x_{L+1} together with that strided convolution.

A network is named after its depth: three convolutions per composite layer, plus the stem and the classifier, but no
transitions, as in 122 = 3 * (7 + 9 + 11 + 13) + 2. In the CIFAR networks the first composite layer gives the first
block's h_0. So delugenet146 (3 * (8 + 16 + 24) + 2) has 47 layers in its blocks, and as many cross-layer convolutions.

Paper: `DelugeNets: Deep Networks with Efficient and Flexible Cross-layer Information Inflows`
    - https://arxiv.org/abs/1611.05552 (Kuen, Kong, Wang and Tan, ICCV workshops 2017)
"""
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BatchNormAct2d, ClassifierHead, DropPath, calculate_drop_path_rates, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint

from .aggregation import AGGREGATIONS, CrossLayerDepthwiseConv2d
from .fused import FusedModule
from .ops import FusedCrossLayers, Recompute, checkpoint_layer, norm_act_conv
from .pretrained import checkpoint_filter_fn, choose_checkpoint, is_default_cfg
from .reparameterize import (
    ChannelAffine,
    FoldedCompositeLayer,
    FoldedDelugeBlock,
    InferenceConv2d,
    check_relu,
    fuse_block,
    keep_hooks,
)
from .weights import Checkpoint, list_checkpoints

__all__ = ['DelugeNet']

CIFAR100_MEAN = (0.5071, 0.4866, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
MAX_PARAMS = 10 ** 9  # so that a configuration from elsewhere cannot exhaust the memory


class NormAct(BatchNormAct2d):
    """BN and ReLU after the stem's convolution, and before the classifier."""

    def fuse(self) -> ChannelAffine:
        """Get the equivalent module for inference, for `timm.utils.reparameterize_model`."""
        return keep_hooks(self, ChannelAffine(self))


class Stem(nn.Sequential):
    """Convolution, and for large images BN, ReLU and pooling."""

    def reparameterize(self) -> None:
        """Fold the BN into the convolution, for `timm.utils.reparameterize_model`."""
        layers: Any = self
        if 'norm' in self._modules and not isinstance(layers.norm, nn.Identity):
            norm = keep_hooks(layers.norm, nn.Identity().train(self.training))
            layers.conv, layers.norm = InferenceConv2d(layers.conv, layers.norm), norm


class CompositeLayer(FusedModule):
    """Composite layer: a pre-activation bottleneck without a shortcut of its own."""
    part_types = {
        **FusedModule.part_types,
        **dict.fromkeys(('norm1', 'norm2', 'norm3'), (nn.BatchNorm2d, BatchNormAct2d)),
        **dict.fromkeys(('conv1', 'conv2', 'conv3'), (nn.Conv2d,)),
    }

    def __init__(
            self,
            in_chs: int,
            width: int,
            stride: int = 1,
            dilation: int = 1,
            device: Any = None,
            dtype: Any = None,
    ):
        """
        Args:
            in_chs: Number of input channels.
            width: Bottleneck width n; the output has 2n channels.
            stride: Stride of the 3x3 convolution.
            dilation: Dilation of the 3x3 convolution.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1: nn.Module = BatchNormAct2d(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, width, 1, bias=False, **dd)
        self.norm2: nn.Module = BatchNormAct2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False, **dd)
        self.norm3: nn.Module = BatchNormAct2d(width, **dd)
        self.conv3 = nn.Conv2d(width, 2 * width, 1, bias=False, **dd)

    def bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """Everything after the first BN and ReLU."""
        x = self.conv1(x)
        x = self.conv2(self.norm2(x))
        return self.conv3(self.norm3(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.runs_fused(x):
                return self.forward_fused(x)
        return self.bottleneck(self.norm1(x))

    @torch.jit.ignore
    def forward_fused(self, x: torch.Tensor, recompute: Recompute | None = None) -> torch.Tensor:
        """Like `forward`, but save only two convolutions' outputs for backward, and x unless it is recomputed."""
        return self.finish_fused(norm_act_conv(x, self.norm1, self.conv1, recompute))

    @torch.jit.ignore
    def finish_fused(self, x: torch.Tensor) -> torch.Tensor:
        """Everything after the first convolution, fused."""
        return norm_act_conv(norm_act_conv(x, self.norm2, self.conv2), self.norm3, self.conv3)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold the inner BNs into the convolutions before them, and put a scale and a shift in the first one's place.

        For `timm.utils.reparameterize_model`.
        """
        if not isinstance(self.conv1, InferenceConv2d):
            check_relu(self.norm1)
            norm1, folded = ChannelAffine(self.norm1), FoldedCompositeLayer(self)
            self.norm1, self.norm2, self.norm3 = norm1, nn.Identity(), nn.Identity()
            self.conv1, self.conv2, self.conv3 = folded.conv1, folded.conv2, folded.conv3
            self.train(self.training)  # the new parts


class ProjectionLayer(CompositeLayer):
    """Composite layer plus a 1x1 projection shortcut: how a standard pre-activation ResNet starts a stage."""
    part_types = {**CompositeLayer.part_types, 'shortcut': (nn.Conv2d,)}

    def __init__(
            self,
            in_chs: int,
            width: int,
            stride: int = 1,
            dilation: int = 1,
            device: Any = None,
            dtype: Any = None,
    ):
        super().__init__(in_chs, width, stride, dilation, device, dtype)
        self.shortcut = nn.Conv2d(in_chs, 2 * width, 1, stride, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x)
        if not torch.jit.is_scripting():
            if self.runs_fused(x):
                return self.shortcut(x) + self.finish_fused(self.conv1(x))
        return self.shortcut(x) + self.bottleneck(x)


class BlockTransition(FusedModule):
    """Block transition: BN and a strided 3x3 convolution, without ReLU.

    The cross-layer convolution that the paper counts as part of it is the last one of the previous block.
    """
    part_types = {
        **FusedModule.part_types,
        'norm': (nn.BatchNorm2d, BatchNormAct2d),
        'conv': (nn.Conv2d,),
    }

    def __init__(
            self,
            in_chs: int,
            width: int,
            stride: int = 2,
            dilation: int = 1,
            device: Any = None,
            dtype: Any = None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(in_chs, **dd)
        self.conv = nn.Conv2d(in_chs, 2 * width, 3, stride, padding=dilation, dilation=dilation, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.runs_fused(x):
                return norm_act_conv(x, self.norm, self.conv)
        return self.conv(self.norm(x))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Put a scale and a shift in the BN's place, for `timm.utils.reparameterize_model`.

        The convolution pads the BN's output with zeros, so the shift cannot be folded into it.
        """
        if not isinstance(self.norm, ChannelAffine):
            self.norm, self.conv = ChannelAffine(self.norm), InferenceConv2d(self.conv)


class ResidualBlock(nn.Module):
    """Block whose layers see the running sum of all earlier outputs: the paper's ResNet-like baseline (Table 2)."""

    def __init__(
            self,
            transition: nn.Module,
            depth: int,
            width: int,
            drop_path_rates: Sequence[float],
            dilation: int = 1,
            device: Any = None,
            dtype: Any = None,
    ):
        """
        Args:
            transition: Maps the stem's or the previous block's output to this block's h_0.
            depth: Number L of composite layers.
            width: Bottleneck width n; the layers exchange 2n channels.
            drop_path_rates: Stochastic depth rate of each composite layer.
            dilation: Dilation of the 3x3 convolutions.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.transition = transition
        self.layers = nn.ModuleList([CompositeLayer(2 * width, width, dilation=dilation, **dd) for _ in range(depth)])
        self.drop_paths = nn.ModuleList([DropPath(rate) if rate > 0. else nn.Identity() for rate in drop_path_rates])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.transition(x)
        for layer, drop_path in zip(self.layers, self.drop_paths):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                h = checkpoint(layer, x)
            else:
                h = layer(x)
            x = x + drop_path(h)
        return x


class DelugeBlock(FusedModule, ResidualBlock):
    """Block whose layers see a cross-layer depthwise convolution of all earlier outputs (paper, Eq. 1).

    With i counted from 0, `layers[i]` computes h_{i+1} from x_{i+1}, `norms[i]` normalises h_{i+1}, and
    `cross_layers[i]` gives x_{i+2}, the last of which is the block's output. `norm` normalises h_0.
    """
    part_types = {
        **CompositeLayer.part_types,
        **dict.fromkeys(('layers', 'norms', 'drop_paths', 'cross_layers'), (nn.ModuleList,)),
        **dict.fromkeys(('norm', 'norms[]'), (nn.BatchNorm2d,)),
        'layers[]': (CompositeLayer,),
        'drop_paths[]': (DropPath, nn.Identity),
        'cross_layers[]': tuple(AGGREGATIONS.values()),
    }
    not_affine = ('norm', 'norms[]')

    def __init__(
            self,
            transition: nn.Module,
            depth: int,
            width: int,
            drop_path_rates: Sequence[float],
            dilation: int = 1,
            cross_layer: Callable[..., CrossLayerDepthwiseConv2d] = CrossLayerDepthwiseConv2d,
            pruned_connections: Sequence[Sequence[int]] | None = None,
            channel_masks: bool = False,
            connection_drop_rate: float = 0.,
            device: Any = None,
            dtype: Any = None,
    ):
        """
        Args:
            transition, depth, width, drop_path_rates, dilation: See `ResidualBlock`.
            cross_layer: Class that combines the layers, one of `AGGREGATIONS`.
            pruned_connections: For each cross-layer convolution, the sources that take no part; None prunes nothing.
            channel_masks: Whether the weights of the cross-layer convolutions have masks, as after pruning by channel.
            connection_drop_rate: Rate at which each cross-layer convolution drops its sources in training.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(transition, depth, width, drop_path_rates, dilation, **dd)
        self.norm = nn.BatchNorm2d(2 * width, affine=False, **dd)  # of h_0
        self.norms = nn.ModuleList([nn.BatchNorm2d(2 * width, affine=False, **dd) for _ in range(depth)])
        self.cross_layers = nn.ModuleList()
        for i in range(depth):
            pruned = pruned_connections[i] if pruned_connections else ()
            sources = [source for source in range(i + 2) if source not in pruned]
            self.cross_layers.append(cross_layer(i + 2, 2 * width, sources, connection_drop_rate, channel_masks, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.transition(x)
        if not torch.jit.is_scripting():
            if self.runs_fused(x):
                return self.forward_fused(x)
        outputs = [self.norm(x)]
        for layer, norm, drop_path, cross_layer in zip(self.layers, self.norms, self.drop_paths, self.cross_layers):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                h = checkpoint(layer, x)
            else:
                h = layer(x)
            outputs.append(drop_path(norm(h)))
            x = cross_layer(outputs)
        return x

    @torch.jit.ignore
    def why_not_fused(self, x: torch.Tensor) -> str | None:
        if reason := super().why_not_fused(x):
            return reason
        if not len(self.layers):
            return 'there are no layers'
        if len({bool(c.training and c.drop_rate) for c in self.cross_layers}) == 2:
            return 'only some of the cross-layer convolutions drop connections'
        if self.grad_checkpointing and not all(
                'weight' in part._parameters and 'weight' not in vars(part) for part in self.layers.modules()
                if isinstance(part, (nn.Conv2d, nn.BatchNorm2d))):
            return "gradient checkpointing needs the layers' parameters, which are kept elsewhere (FSDP, DataParallel)"
        return None

    @torch.jit.ignore
    def forward_fused(self, x: torch.Tensor) -> torch.Tensor:
        """The part of `forward` from h_0 on, with less memory traffic, and keeping less for the backward pass."""
        cross_layers: Any = self.cross_layers
        outputs = FusedCrossLayers(*zip(*(cross_layer.kernel() for cross_layer in cross_layers)))
        x = outputs.append(x, self.norm)
        parts: Any = zip(self.layers, self.norms, self.drop_paths, cross_layers)
        for layer, norm, drop_path, cross_layer in parts:
            if self.grad_checkpointing:
                h = checkpoint_layer(layer, x, outputs.recompute())
            else:
                h = layer.forward_fused(x, outputs.recompute())
            drops = drop_path.training and isinstance(drop_path, DropPath)
            outputs.append(h, norm, drop_path(h.new_ones(h.shape[0], 1, 1, 1)) if drops else None)
            x = outputs.cross_layer_depthwise_conv(cross_layer.draw_scale(h.shape[0]))
        return x

    @torch.jit.ignore
    def fuse(self) -> FoldedDelugeBlock:
        """Get the block for inference, for `timm.utils.reparameterize_model`."""
        return keep_hooks(self, fuse_block(self))


class DelugeNet(nn.Module):
    """DelugeNet, and with ``aggregation='residual'`` the ResNet-like networks the paper compares it with."""

    def __init__(
            self,
            depths: Sequence[int],
            widths: Sequence[int],
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            output_stride: int = 32,
            stem_type: str = 'imagenet',
            aggregation: str = 'cross_layer',
            transition_type: str = '3x3',
            pruned_connections: Sequence[Sequence[Sequence[int]]] | None = None,
            channel_masks: bool = False,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            connection_drop_rate: float = 0.,
            device: Any = None,
            dtype: Any = None,
    ):
        """
        Args:
            depths: Number of composite layers of each block.
            widths: Bottleneck width n of each block; its layers exchange 2n channels.
            num_classes: Number of classification classes, 0 for none.
            in_chans: Number of input channels.
            global_pool: Global pooling type, see `timm.layers.SelectAdaptivePool2d`.
            output_stride: Maximum stride of the features relative to the input, 8, 16 or 32; dilation replaces further
                strides. With the CIFAR stem and three blocks the stride is always 4.
            stem_type: 'imagenet' (7x7 convolution and max pooling, stride 4) or 'cifar' (3x3 convolution; the first
                composite layer of `depths` gives h_0).
            aggregation: How a layer's input is computed: 'cross_layer', by depthwise convolutions with one weight per
                source layer and channel; 'scalar', with one weight per source layer; 'last', from the last output
                alone, scaled; or 'residual', as the plain sum of the layer outputs, not normalised.
            transition_type: '3x3' block transitions, or '1x1' for the projection shortcuts of a standard ResNet, where
                the first composite layer of every block gives h_0 (paper, Table 2).
            pruned_connections: For each block, and each of its cross-layer convolutions, the source layers that take
                no part; None prunes nothing. See `timm_deluge.prune_connections`.
            channel_masks: Whether the weights of the cross-layer convolutions have masks, as buffers, for loading a
                network that was pruned by channel.
            drop_rate: Dropout rate before the classifier.
            drop_path_rate: Stochastic depth rate of the last composite layer; grows linearly from 0. Layers that
                give h_0 have none.
            connection_drop_rate: Share of the connections between layers that are dropped in training, drawn for each
                image; the others are scaled up to keep the mean.

        Raises:
            ValueError: If `depths` and `widths` differ in length or are empty, the layer that gives h_0 is missing, an
                option has none of the values above, or is not for that aggregation, a number is out of bounds, a rate
                is not from 0 to 1 (`connection_drop_rate`: less than 1), `pruned_connections` do not fit, or the
                network would have more than about a billion parameters.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        _check_size(depths, widths, num_classes, in_chans)
        _check_option('output_stride', output_stride, (8, 16, 32))
        _check_option('stem_type', stem_type, ('imagenet', 'cifar'))
        _check_option('aggregation', aggregation, (*AGGREGATIONS, 'residual'))
        _check_option('transition_type', transition_type, ('3x3', '1x1'))
        # `depths` includes the composite layers that give h_0
        block_depths = [
            d - int(transition_type == '1x1' or (i == 0 and stem_type == 'cifar')) for i, d in enumerate(depths)]
        if min(block_depths) < 0:
            raise ValueError(f'depths {tuple(depths)}: expected at least one layer where it gives h_0')
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f'drop_path_rate={drop_path_rate}: must be from 0 to 1')
        _check_connections(block_depths, aggregation, pruned_connections, channel_masks, connection_drop_rate)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        prev_chs = widths[0]
        if stem_type == 'imagenet':
            self.stem: nn.Sequential = Stem(OrderedDict(
                conv=nn.Conv2d(in_chans, prev_chs, 7, stride=2, padding=3, bias=False, **dd),
                norm=NormAct(prev_chs, **dd),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            ))
            feature_info: list[dict[str, Any]] = [dict(num_chs=prev_chs, reduction=2, module='stem.norm')]
            curr_stride = 4
        else:
            self.stem = Stem(OrderedDict(
                conv=nn.Conv2d(in_chans, prev_chs, 3, padding=1, bias=False, **dd),
            ))
            feature_info = [dict(num_chs=prev_chs, reduction=1, module='stem.conv')]
            curr_stride = 1
        self.stem_feat_idx = min(1, len(self.stem) - 1)  # the last stem layer before pooling

        block_dprs: Any = calculate_drop_path_rates(drop_path_rate, block_depths, stagewise=True)
        block_fn: type[ResidualBlock] = ResidualBlock
        block_args: dict[str, Any] = {}
        if aggregation in AGGREGATIONS:
            block_fn = DelugeBlock
            block_args.update(
                cross_layer=AGGREGATIONS[aggregation], channel_masks=channel_masks,
                connection_drop_rate=connection_drop_rate)
        dilation = 1
        self.stages = nn.Sequential()
        for i, (depth, width, dpr) in enumerate(zip(block_depths, widths, block_dprs)):
            stride, first_dilation = 1 if i == 0 else 2, dilation
            if stride > 1 and curr_stride >= output_stride:
                stride, dilation = 1, dilation * stride
            transition: nn.Module
            if transition_type == '1x1':
                transition = ProjectionLayer(prev_chs, width, stride, first_dilation, **dd)
            elif i > 0:
                transition = BlockTransition(prev_chs, width, stride, first_dilation, **dd)
            elif stem_type == 'cifar':
                transition = CompositeLayer(prev_chs, width, **dd)
            else:
                transition = nn.Conv2d(prev_chs, 2 * width, 1, bias=False, **dd)
            if pruned_connections is not None:
                block_args['pruned_connections'] = pruned_connections[i]
            self.stages.append(block_fn(transition, depth, width, dpr, dilation, **block_args, **dd))
            prev_chs = 2 * width
            curr_stride *= stride
            feature_info.append(dict(num_chs=prev_chs, reduction=curr_stride, module=f'stages.{i}'))

        self.feature_info = feature_info
        self.num_features = prev_chs
        self.norm: nn.Module = NormAct(prev_chs, **dd)
        self.head = ClassifierHead(prev_chs, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the released code does: He's normal distribution over each convolution's fan-out.

        Args:
            needs_reset: Also reset what modules initialise on creation, as is needed after `to_empty`. Weights that
                were pruned by channel come back.
        """
        for module in self.modules():
            reset: Any = getattr(module, 'reset_parameters', None)
            if needs_reset and reset:
                reset()
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for layer-wise learning rate decay: by block (coarse) or by composite layer."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.(?:transition|norm)\b', None),
                (r'^stages\.(\d+)\.(?:layers|norms|cross_layers)\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute composite layers after h_0 in the backward pass instead of keeping their activations.

        Their batch normalisations then update the running statistics twice in a step, as in other models of timm.
        """
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the classifier.

        Args:
            num_classes: Number of classes of the new classifier, 0 for none.
            global_pool: Global pooling type, unchanged if None.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward features that returns intermediates.

        Args:
            x: Images ``[N, in_chans, H, W]``.
            indices: Take the last n features if int, all if None, those listed if a sequence; 0 is the stem's.
            norm: Apply the final BN and ReLU to the last block's intermediate.
            stop_early: Stop after the last block that is wanted.
            output_fmt: Shape of intermediate feature outputs, 'NCHW'.
            intermediates_only: Return the intermediates alone.

        Returns:
            The final features, or with `stop_early` those of the last block computed, and the list of intermediates; or
            just that list.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(1 + len(self.stages), indices)

        x_stem = x
        for i, layer in enumerate(self.stem):
            x = layer(x)
            if i == self.stem_feat_idx:
                x_stem = x
        if 0 in take_indices:
            intermediates.append(x_stem)

        feat_idx = 0
        last_idx = len(self.stages)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index]
        for feat_idx, stage in enumerate(stages, start=1):
            x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(self.norm(x) if norm and feat_idx == last_idx else x)

        if intermediates_only:
            return intermediates

        if feat_idx == last_idx:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove layers that are not needed for the wanted intermediates.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Remove the final BN and ReLU.
            prune_head: Remove pooling and classifier.

        Returns:
            The indices taken.
        """
        take_indices, max_index = feature_take_indices(1 + len(self.stages), indices)
        prune_end = max_index < len(self.stages)
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        self.stages = self.stages[:max_index]
        if max_index == 0:
            self.stem = self.stem[:self.stem_feat_idx + 1]
        if prune_end:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[N, in_chans, H, W]`` to features ``[N, num_features, H / stride, W / stride]``."""
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits ``[N, num_classes]``, or to the classifier's input with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[N, in_chans, H, W]`` to logits ``[N, num_classes]``."""
        x = self.forward_features(x)
        return self.forward_head(x)


def _check_option(name: str, value: int | str, choices: tuple[int | str, ...]) -> None:
    if value not in choices:
        raise ValueError(f'{name}={value!r}: must be one of {", ".join(map(repr, choices))}')


def _check_size(depths: Sequence[int], widths: Sequence[int], num_classes: int, in_chans: int) -> None:
    if len(depths) != len(widths):
        raise ValueError(f'depths {tuple(depths)} and widths {tuple(widths)} must name the same number of blocks')
    if not depths:
        raise ValueError('depths and widths: expected at least one block')
    numbers: dict[str, tuple[int, Sequence[int]]] = {
        'num_classes': (0, [num_classes]), 'in_chans': (1, [in_chans]), 'widths': (1, widths), 'depths': (0, depths)}
    for name, (least, values) in numbers.items():
        for value in values:
            if not least <= value <= MAX_PARAMS:  # also true for NaN
                raise ValueError(f'{name}={value}: must be from {least} to {MAX_PARAMS:,}')
    # the classifier, the stem, transitions, three convolutions a layer, cross-layer weights and biases
    params = 2 * num_classes * widths[-1] + 49 * in_chans * widths[0] + sum(
        36 * width * next_width for width, next_width in zip(widths, widths[1:])) + sum(
        13 * (depth + 1) * width ** 2 + 2 * width * depth * (depth + 3) for depth, width in zip(depths, widths))
    if params > MAX_PARAMS:
        raise ValueError(
            f'depths={tuple(depths)}, widths={tuple(widths)}, num_classes={num_classes}, in_chans={in_chans}: this '
            f'network has about {params:.1e} parameters; at most {MAX_PARAMS:,} are built')


def _check_connections(
        block_depths: Sequence[int],
        aggregation: str,
        pruned_connections: Any,
        channel_masks: bool,
        connection_drop_rate: float,
) -> None:
    if not 0 <= connection_drop_rate < 1:
        raise ValueError(f'connection_drop_rate={connection_drop_rate}: must be at least 0 and less than 1')
    if channel_masks and aggregation != 'cross_layer':
        raise ValueError(f"channel_masks: only aggregation='cross_layer' takes them, got {aggregation!r}")
    has_pruned = pruned_connections is not None
    for option, is_given in ('connection_drop_rate', connection_drop_rate), ('pruned_connections', has_pruned):
        if is_given and aggregation in ('last', 'residual'):
            raise ValueError(f'{option}: aggregation={aggregation!r} has no connections across layers')
    if has_pruned:
        _check_pruned_connections(pruned_connections, block_depths)


def _check_pruned_connections(pruned_connections: Any, depths: Sequence[int]) -> None:
    if [len(block) for block in pruned_connections] != list(depths):
        raise ValueError(
            f'pruned_connections: expected lists for {" + ".join(map(str, depths))} cross-layer convolutions, got '
            f'{" + ".join(str(len(block)) for block in pruned_connections)}')
    for i, block in enumerate(pruned_connections):
        for k, pruned in enumerate(block):
            name, num_layers = f'stages.{i}.cross_layers.{k}', k + 2
            if not set(pruned) <= set(range(num_layers)):
                raise ValueError(
                    f'pruned_connections: {name} has the sources 0 to {num_layers - 1}, got {list(pruned)}')
            if len(set(pruned)) == num_layers:
                raise ValueError(f'pruned_connections: {name} would lose its last source')


def _cfg(reduction: int = 32, **kwargs: Any) -> dict[str, Any]:
    input_size = kwargs.get('input_size', (3, 224, 224))
    return {
        'num_classes': 1000, 'input_size': input_size,
        'pool_size': tuple(math.ceil(size / reduction) for size in input_size[1:]), 'crop_pct': 0.875,
        'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'head.fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1611.05552', 'paper_name': 'DelugeNets: Deep Networks with Efficient and Flexible '
                                                       'Cross-layer Information Inflows',
        **kwargs,
    }


def _cfg_cifar(**kwargs: Any) -> dict[str, Any]:
    return _cfg(reduction=4, **{
        'num_classes': 100, 'input_size': (3, 32, 32), 'crop_pct': 1.0,
        'mean': CIFAR100_MEAN, 'std': CIFAR100_STD, **kwargs,
    })


_CFG_FNS = {
    **dict.fromkeys(('delugenet92', 'delugenet104', 'delugenet122'), _cfg),
    **dict.fromkeys((
        'delugenet146', 'delugenet218', 'wide_delugenet146',
        'resnetlike146_3x3', 'resnetlike218_3x3', 'wide_resnetlike146_3x3',
        'resnetlike146_1x1', 'resnetlike218_1x1', 'wide_resnetlike146_1x1',
    ), _cfg_cifar),
}


def checkpoint_cfg(checkpoint: Checkpoint) -> dict[str, Any]:
    """Get timm's pretrained configuration of a checkpoint: the network's, updated with the checkpoint's values."""
    return _CFG_FNS[checkpoint.model](**checkpoint.pretrained_cfg())


def _default_cfgs(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    cfgs: dict[str, Any] = generate_default_cfgs({
        **{c.name: checkpoint_cfg(c) for c in checkpoints},
        **{name: cfg() for name, cfg in _CFG_FNS.items() if name not in {c.model for c in checkpoints}},
    })
    for c in reversed(checkpoints):  # timm puts a tag with weights first, but the default is the manifest's first one
        cfgs[c.model].tags.remove(c.tag)
        cfgs[c.model].tags.appendleft(c.tag)
    return cfgs


default_cfgs = _default_cfgs(list_checkpoints())


def _create_delugenet(variant: str, pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    if pretrained:
        given = {k: kwargs.get(k) for k in ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir')}
        kwargs['pretrained_cfg_overlay'] = choose_checkpoint(variant, **given)
    elif is_default_cfg(variant, kwargs.get('pretrained_cfg')):
        kwargs['pretrained_cfg'] = _CFG_FNS[variant]()  # the paper's classes and input, not a checkpoint's
    return build_model_with_cfg(
        DelugeNet,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, strict=kwargs.get('pretrained_strict', True)),
        feature_cfg=dict(out_indices=tuple(range(len(kwargs['depths']) + 1)), flatten_sequential=True),
        **kwargs,
    )


_IMAGENET = dict(widths=(64, 128, 256, 512))
_CIFAR146 = dict(depths=(8, 16, 24), widths=(32, 64, 128), stem_type='cifar')
_CIFAR218 = dict(depths=(12, 24, 36), widths=(32, 64, 128), stem_type='cifar')
_WIDE_CIFAR146 = dict(depths=(8, 16, 24), widths=(56, 112, 224), stem_type='cifar')
_RESIDUAL_1X1 = dict(aggregation='residual', transition_type='1x1')


@register_model
def delugenet92(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """DelugeNet-92 for 224x224 images."""
    model_args = dict(depths=(7, 7, 8, 8), **_IMAGENET)
    return _create_delugenet('delugenet92', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def delugenet104(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """DelugeNet-104 for 224x224 images."""
    model_args = dict(depths=(7, 8, 9, 10), **_IMAGENET)
    return _create_delugenet('delugenet104', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def delugenet122(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """DelugeNet-122 for 224x224 images."""
    model_args = dict(depths=(7, 9, 11, 13), **_IMAGENET)
    return _create_delugenet('delugenet122', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def delugenet146(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """DelugeNet-146 for 32x32 images."""
    model_args = dict(**_CIFAR146)
    return _create_delugenet('delugenet146', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def delugenet218(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """DelugeNet-218 for 32x32 images."""
    model_args = dict(**_CIFAR218)
    return _create_delugenet('delugenet218', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def wide_delugenet146(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """Wide-DelugeNet-146 for 32x32 images."""
    model_args = dict(**_WIDE_CIFAR146)
    return _create_delugenet('wide_delugenet146', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def resnetlike146_3x3(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """ResNet-like 146 baseline with 3x3 block transitions."""
    model_args = dict(aggregation='residual', **_CIFAR146)
    return _create_delugenet('resnetlike146_3x3', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def resnetlike146_1x1(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """ResNet-like 146 baseline with 1x1 projection shortcuts."""
    model_args = dict(**_RESIDUAL_1X1, **_CIFAR146)
    return _create_delugenet('resnetlike146_1x1', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def resnetlike218_3x3(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """ResNet-like 218 baseline with 3x3 block transitions."""
    model_args = dict(aggregation='residual', **_CIFAR218)
    return _create_delugenet('resnetlike218_3x3', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def resnetlike218_1x1(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """ResNet-like 218 baseline with 1x1 projection shortcuts."""
    model_args = dict(**_RESIDUAL_1X1, **_CIFAR218)
    return _create_delugenet('resnetlike218_1x1', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def wide_resnetlike146_3x3(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """Wide ResNet-like 146 baseline with 3x3 block transitions."""
    model_args = dict(aggregation='residual', **_WIDE_CIFAR146)
    return _create_delugenet('wide_resnetlike146_3x3', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def wide_resnetlike146_1x1(pretrained: bool = False, **kwargs: Any) -> DelugeNet:
    """Wide ResNet-like 146 baseline with 1x1 projection shortcuts."""
    model_args = dict(**_RESIDUAL_1X1, **_WIDE_CIFAR146)
    return _create_delugenet('wide_resnetlike146_1x1', pretrained=pretrained, **dict(model_args, **kwargs))
