"""Entrypoints for torch.hub: `torch.hub.load(repo, 'delugenet122', pretrained=False, **arguments_of_DelugeNet)`."""
from timm_deluge.delugenet import (  # noqa: F401
    delugenet92,
    delugenet104,
    delugenet122,
    delugenet146,
    delugenet218,
    resnetlike146_1x1,
    resnetlike146_3x3,
    resnetlike218_1x1,
    resnetlike218_3x3,
    wide_delugenet146,
    wide_resnetlike146_1x1,
    wide_resnetlike146_3x3,
)

dependencies = ['torch', 'timm']
