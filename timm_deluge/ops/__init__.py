"""The cross-layer depthwise convolution: `reference` defines it, all else does the same with less memory traffic."""
from .backend import Backend
from .checkpoint import checkpoint_layer
from .decision import METHODS, Decision, explain_implementation, takes_fast_path, why_called
from .fused_training import FusedCrossLayers
from .implementation import choose_backend, get_implementation, set_implementation, why_not_fast
from .layout import rows
from .memory import split_batch, workspace
from .norm_act_conv import Recompute, norm_act_conv
from .reference import cross_layer_depthwise_conv
from .running_sums import running_sums

__all__ = [
    'METHODS', 'Backend', 'Decision', 'FusedCrossLayers', 'Recompute', 'checkpoint_layer', 'choose_backend',
    'cross_layer_depthwise_conv', 'explain_implementation', 'get_implementation', 'norm_act_conv', 'rows',
    'running_sums', 'set_implementation', 'split_batch', 'takes_fast_path', 'why_called', 'why_not_fast', 'workspace',
]
