"""Find images and read them, whatever mode they were saved in."""
import glob
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ['ImageError', 'find_images', 'read_image']

NO_PICTURES = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}  # Pillow alone cannot read these
MAX_ASPECT_RATIO = 1000  # beyond it, resizing the short side to a network's input would make the long one huge


class ImageError(ValueError):
    """A path is no image that can be read."""


def find_images(paths: Iterable[str]) -> Iterator[Path]:
    """Expand what a user names into files.

    Args:
        paths: Files, folders (searched for files with an image's extension), glob patterns, or '-' for paths on
            standard input, one per line.

    Yields:
        Paths of files; those in a folder are sorted by name. Paths that do not exist, folders without images, and
        subfolders that may not be read are yielded unchanged, for `read_image` to refuse; those that a pattern matches
        only if it matches no file.
    """
    for path in paths:
        if path == '-':
            if isinstance(sys.stdin, TextIOWrapper):
                sys.stdin.reconfigure(errors='surrogateescape')  # names need not be decodable
            yield from find_images(line for line in sys.stdin.read().split('\n') if line and line != '-')
        elif os.path.exists(path):
            yield from _expand_folder(Path(path))
        else:
            pattern = path if '\0' in path else os.path.expanduser(path)  # the shell leaves ~ alone in quotes
            matches = map(Path, sorted(glob.glob(pattern, recursive=True)))  # with **, folders and their files
            files = [file for match in matches for file in _expand_folder(match)]
            yield from dict.fromkeys([file for file in files if not os.path.isdir(file)] or files or [Path(path)])


def _expand_folder(path: Path) -> Iterator[Path]:
    if not os.path.isdir(path):
        yield path
        return
    extensions = {
        suffix for suffix, fmt in Image.registered_extensions().items() if fmt in Image.OPEN and fmt not in NO_PICTURES}
    unreadable: list[Path] = []
    walk = os.walk(path, onerror=lambda error: unreadable.append(Path(error.filename)))
    files = (Path(folder, name) for folder, _, names in walk for name in names)
    images = [file for file in files if file.suffix.lower() in extensions and os.path.isfile(file)]
    yield from sorted(images + unreadable) or [path]


def read_image(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB, upright.

    Args:
        path: File in any format and mode that Pillow reads; of several frames or pages, the first is taken. Transparent
            images are laid over white, 16-bit images and floats from 0 to 1 are scaled to 8 bits, floats up to 255 are
            rounded, and the EXIF orientation is applied.

    Returns:
        An image of mode 'RGB'.

    Raises:
        ImageError: If the file is missing, empty, corrupt, no image, so large that decoding it could exhaust memory, or
            its values are out of these ranges.
    """
    try:
        if path.is_dir():
            os.listdir(path)  # says why, if it may not be read
            raise ImageError('a folder without images')
        if path.exists() and not path.is_file():
            raise ImageError('not a regular file')
        if path.stat().st_size == 0:
            raise ImageError('the file is empty')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about a large image; one that is too large is an error
            with Image.open(path) as image:
                if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                    raise ImageError(f'{image.width}×{image.height} pixels are no sensible picture')
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError('no such file') from None
    except UnidentifiedImageError:
        raise ImageError('not an image that Pillow can read') from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f'more than {limit:,} pixels, which could exhaust memory; scale it down first') from None
    except Exception as error:  # Pillow's decoders can raise anything on damaged data
        raise ImageError(f'corrupt or unreadable ({error})') from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(('I', 'F')):
        values = np.array(image, dtype=np.float32)
        largest = 255 if image.mode == 'F' else 65535
        if not (values.min() >= 0 and values.max() <= largest):  # also true for NaN
            raise ImageError(f'values from {values.min():g} to {values.max():g}, where 0 to {largest} is expected')
        if image.mode != 'F':
            values /= 65535 / 255
        elif values.max() <= 1:
            values *= 255
        image = Image.fromarray(np.rint(values, out=values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')
