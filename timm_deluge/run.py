"""Run a timm script with the DelugeNets registered: `python -m timm_deluge.run SCRIPT [ARGUMENTS…]`.

timm's train.py needs no such help: `--device-modules timm_deluge`, set in every recipe, imports this package.
"""
import runpy
import sys
from pathlib import Path

import timm_deluge  # noqa: F401 registers the models


def main() -> None:
    """Execute the script named by the first argument as if python had been called with it.

    Raises:
        SystemExit: If no script is named or there is no such file.
    """
    if len(sys.argv) < 2:
        sys.exit('usage: python -m timm_deluge.run SCRIPT [ARGUMENTS…]   (e.g. validate.py --model delugenet146 …)')
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f'{script}: no such script; name a Python file, such as validate.py from timm\'s repository')
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
