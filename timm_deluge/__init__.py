"""DelugeNets for timm: importing this package registers every model."""
from .delugenet import DelugeNet

__all__ = ['DelugeNet']
