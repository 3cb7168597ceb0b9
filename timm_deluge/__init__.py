"""DelugeNets for timm: importing this package registers every model."""
from .delugenet import DelugeNet
from .grow import insert_layers, widen_layers
from .ops import explain_implementation, get_implementation, set_implementation
from .prune import connection_scores, prune_connections, pruned_connections, remove_layers, save_pruned

__all__ = [
    'DelugeNet', '__version__', 'connection_scores', 'explain_implementation', 'get_implementation', 'insert_layers',
    'prune_connections', 'pruned_connections', 'remove_layers', 'save_pruned', 'set_implementation', 'widen_layers',
]
__version__ = '0.1.0'
