"""Option files for timm's own train.py: `train.py --config $(timm-deluge recipe NAME) --data-dir DIR`."""
from pathlib import Path

__all__ = ['list_recipes', 'recipe_path']

_FOLDER = Path(__file__).resolve().parent


def list_recipes() -> list[str]:
    """Names of all recipes."""
    return sorted(p.stem for p in _FOLDER.glob('*.yaml'))


def recipe_path(name: str) -> Path:
    """Find a recipe.

    Args:
        name: One of `list_recipes`.

    Returns:
        Its YAML file.

    Raises:
        LookupError: If there is no such recipe.
    """
    if name not in list_recipes():
        raise LookupError(f'no recipe {name!r}; there are: {", ".join(list_recipes())}')
    return _FOLDER / f'{name}.yaml'
