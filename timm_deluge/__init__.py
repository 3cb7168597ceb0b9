"""DelugeNets for timm: importing this package registers every model."""
from .delugenet import DelugeNet

__all__ = ['DelugeNet', '__version__']
__version__ = '0.1.0'
