"""Entrypoints for torch.hub: `torch.hub.load(repo, 'delugenet122', pretrained=False, **arguments_of_DelugeNet)`.

Every model that the package registers with timm is one.
"""
import functools

import timm

import timm_deluge  # noqa: F401 registers the models

dependencies = ['torch', 'timm']
for name in timm.list_models(module='delugenet'):
    create = functools.partial(timm.create_model, name)  # not the function alone: it remembers the arguments for timm
    globals()[name] = functools.update_wrapper(create, timm.models.model_entrypoint(name))
del name, create
