"""Entrypoints for torch.hub: `torch.hub.load(repo, 'delugenet122', pretrained=False, **arguments_of_DelugeNet)`.

Every model that the package registers with timm is one.
"""
import timm

import timm_deluge  # noqa: F401 registers the models

dependencies = ['torch', 'timm']
globals().update({name: timm.models.model_entrypoint(name) for name in timm.list_models(module='delugenet')})
