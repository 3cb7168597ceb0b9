"""The cross-layer depthwise convolution: `reference` is its definition, everything else gives the same, leaner."""
from .backend import Backend
from .decision import Decision, explain_implementation, has_hooks, takes_fast_path
from .implementation import choose_backend, get_implementation, is_lean, set_implementation, why_not_lean
from .layout import rows
from .lean import LayerOutputs
from .memory import kept_memory, split_batch
from .norm_act_conv import norm_act_conv
from .reference import cross_layer_depthwise_conv
from .running_sums import running_sums

__all__ = [
    'Backend', 'Decision', 'LayerOutputs', 'choose_backend', 'cross_layer_depthwise_conv', 'explain_implementation',
    'get_implementation', 'has_hooks', 'is_lean', 'kept_memory', 'norm_act_conv', 'rows', 'running_sums',
    'set_implementation', 'split_batch', 'takes_fast_path', 'why_not_lean',
]
