"""Option files for timm's own train.py: `train.py --config $(timm-deluge recipe NAME) --data-dir DIR`."""
import re
from pathlib import Path

__all__ = ['list_recipes', 'recipe_path', 'recipe_summary']

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


def recipe_summary(name: str) -> str:
    """Get the first sentence of what a recipe says of itself.

    Args:
        name: One of `list_recipes`.

    Raises:
        LookupError: If there is no such recipe.
    """
    lines = recipe_path(name).read_text(encoding='utf-8').splitlines()
    head = ' '.join(line.removeprefix('# ') for line in lines if line.startswith('#'))
    return re.split(r'(?<=\.) ', head)[0]
