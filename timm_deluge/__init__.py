"""DelugeNets for timm: importing this package registers every model."""
from .delugenet import DelugeNet
from .ops import explain_implementation, get_implementation, set_implementation

__all__ = ['DelugeNet', '__version__', 'explain_implementation', 'get_implementation', 'set_implementation']
__version__ = '0.1.0'
