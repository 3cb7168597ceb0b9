"""Entrypoints for torch.hub: `torch.hub.load(repo, 'delugenet122', pretrained=False, **arguments_of_DelugeNet)`.

There is one for every model that the package registers with timm.
"""
import functools

import timm

try:
    import timm_deluge  # noqa: F401 registers the models
except ImportError as error:  # torch.hub checks only whether the packages are installed
    raise ImportError(f'timm_deluge cannot be imported: {error} (it needs timm>=1.0.31, and this is timm '
                      f'{timm.__version__}; `pip install .` in its checkout installs all that it needs)') from error

dependencies = ['torch', 'timm']
for name in timm.list_models(module='delugenet'):
    create = functools.partial(timm.create_model, name)  # create_model records its arguments, the entrypoint does not
    globals()[name] = functools.update_wrapper(create, timm.models.model_entrypoint(name))
del name, create
