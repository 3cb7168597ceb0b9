"""Entrypoints for torch.hub: `torch.hub.load(repo, 'delugenet122', pretrained=False, **arguments_of_DelugeNet)`.

Every model that the package registers with timm is one.
"""
import functools

import timm

try:
    import timm_deluge  # noqa: F401 registers the models
except ImportError as error:  # torch.hub asks only whether the packages are there
    raise ImportError(f'timm-deluge needs timm>=1.0.31 (pip install --upgrade timm), and this is timm '
                      f'{timm.__version__}: {error}') from error

dependencies = ['torch', 'timm']
for name in timm.list_models(module='delugenet'):
    create = functools.partial(timm.create_model, name)  # not the function alone: it remembers the arguments for timm
    globals()[name] = functools.update_wrapper(create, timm.models.model_entrypoint(name))
del name, create
