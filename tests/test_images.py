"""Every image that Pillow reads becomes upright 8-bit RGB; what cannot be read is refused by name."""
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from timm_deluge.images import ImageError, find_images, read_image

GRADIENT = np.linspace(0, 255, 64 * 48).reshape(48, 64).round().astype(np.uint8)
RGB = np.stack([GRADIENT, GRADIENT[::-1], np.full_like(GRADIENT, 90)], -1)


def reread(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    result = read_image(tmp_path / name)
    assert result.mode == 'RGB'
    return np.asarray(result).astype(int)


def assert_similar(image, expected, tolerance):
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= tolerance


@pytest.mark.parametrize('name', ['a.png', 'a.bmp', 'a.tiff', 'a.webp', 'a.gif', 'a.ppm'])
def test_grey(tmp_path, name):
    image = reread(tmp_path, Image.fromarray(GRADIENT), name, **({'lossless': True} if name.endswith('webp') else {}))
    assert_similar(image, np.stack([GRADIENT] * 3, -1), 0)


def test_sixteen_bits(tmp_path):
    for name in ('a.png', 'a.tiff'):
        image = reread(tmp_path, Image.fromarray(GRADIENT.astype(np.uint16) * 257), name)
        assert_similar(image, np.stack([GRADIENT] * 3, -1), 0)


def test_float(tmp_path):
    for values in (GRADIENT.astype(np.float32), GRADIENT.astype(np.float32) / 255):
        assert_similar(reread(tmp_path, Image.fromarray(values), 'a.tiff'), np.stack([GRADIENT] * 3, -1), 0)


def test_bilevel_palette_cmyk(tmp_path):
    bilevel = Image.fromarray(np.where(GRADIENT > 99, 255, 0).astype(np.uint8)).convert('1')
    assert set(np.unique(reread(tmp_path, bilevel, 'a.png'))) == {0, 255}
    palette = Image.fromarray(RGB).quantize(256)
    assert_similar(reread(tmp_path, palette, 'b.png'), np.asarray(palette.convert('RGB')).astype(int), 0)
    assert_similar(reread(tmp_path, Image.fromarray(RGB).convert('CMYK'), 'c.tiff'), RGB.astype(int), 2)


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.dstack([RGB, np.where(np.arange(64) < 32, 255, 0)[None].repeat(48, 0).astype(np.uint8)])
    image = reread(tmp_path, Image.fromarray(rgba), 'a.png')
    assert_similar(image[:, :32], RGB[:, :32].astype(int), 0)
    assert (image[:, 32:] == 255).all()
    palette = Image.new('P', (8, 8), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert (reread(tmp_path, palette, 'b.png', transparency=0) == 255).all()


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reread(tmp_path, Image.fromarray(RGB), 'a.png', exif=exif)
    upright = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1), 6: np.rot90(RGB, -1),
               7: RGB[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(RGB)}
    assert_similar(image, upright[orientation].astype(int), 0)


def test_unreadable_files_say_why(tmp_path, monkeypatch):
    good = io.BytesIO()
    Image.fromarray(RGB).save(good, 'jpeg')
    contents = {
        'empty.jpg': (b'', 'the file is empty'),
        'text.jpg': (b'this is no image', 'not an image that Pillow can read'),
        'cut.jpg': (good.getvalue()[:len(good.getvalue()) // 2], 'corrupt or unreadable'),
    }
    for name, (data, message) in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=message):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match='no such file'):
        read_image(tmp_path / 'absent.jpg')
    for path in find_images(['long' * 2000 + '.jpg', 'zero\0byte.jpg', '~zero\0byte.jpg']):
        with pytest.raises(ImageError, match='unreadable'):
            read_image(path)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ImageError, match='not a regular file'):
        read_image(tmp_path / 'pipe')
    for values in (np.full((8, 8), 4000.), np.full((8, 8), -1.), np.full((8, 8), 10 ** 6)):
        Image.fromarray(values.astype(np.float32 if values[0, 0] < 10 ** 6 else np.int32)).save(tmp_path / 'a.tiff')
        with pytest.raises(ImageError, match='values from .* where 0 to (255|65535) is expected'):
            read_image(tmp_path / 'a.tiff')
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / 'a.tiff')
    with pytest.raises(ImageError, match='values from nan to nan'):
        read_image(tmp_path / 'a.tiff')
    Image.new('RGB', (2000, 1)).save(tmp_path / 'line.png')
    with pytest.raises(ImageError, match='2000×1 pixels are no sensible picture'):
        read_image(tmp_path / 'line.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    (tmp_path / 'bomb.jpg').write_bytes(good.getvalue())
    with pytest.raises(ImageError, match='more than 2,000 pixels'):
        read_image(tmp_path / 'bomb.jpg')


@pytest.mark.parametrize('exif', [b'II+\0', b'Exif\0\0MM', b'\0' * 9])
@pytest.mark.parametrize('name', ['a.png', 'a.webp', 'a.jpg'])
def test_damaged_exif_is_read_or_refused(tmp_path, exif, name):
    Image.fromarray(RGB).save(tmp_path / name)
    whole = np.asarray(read_image(tmp_path / name))
    Image.fromarray(RGB).save(tmp_path / name, exif=exif)
    try:
        read = read_image(tmp_path / name)
    except ImageError as error:
        assert 'corrupt or unreadable' in str(error)
    else:
        assert np.array_equal(np.asarray(read), whole)


@pytest.mark.parametrize('fmt', ['png', 'jpeg', 'gif', 'webp', 'tiff', 'bmp', 'jpeg2000', 'ico', 'tga'])
def test_damaged_files_are_read_or_refused(tmp_path, fmt):
    out = io.BytesIO()
    Image.fromarray(RGB).save(out, fmt)
    rng = np.random.default_rng(0)
    path = tmp_path / 'a'
    path.write_bytes(out.getvalue())
    assert read_image(path).mode == 'RGB'
    refused = 0
    for _ in range(40):
        data = np.frombuffer(out.getvalue(), np.uint8).copy()
        data[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(data.tobytes()[:rng.integers(1, len(data) + 1)])
        try:
            read = read_image(path)
        except ImageError as error:
            refused += 1
            assert re.match('corrupt or unreadable|not an image|.*pixels', str(error)), error
        else:
            assert read.mode == 'RGB' and read.size[0] > 0
    assert refused > 20  # cut off, nearly all of them
    path.write_bytes(out.getvalue()[:len(out.getvalue()) // 8])
    with pytest.raises(ImageError):
        read_image(path)


def test_find_images(tmp_path, monkeypatch):
    for name in ('b.png', 'a.JPG', 'notes.txt', 'notes.pdf', 'sub/c.webp'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in find_images([str(tmp_path)])] == ['a.JPG', 'b.png', 'c.webp']
    assert [p.name for p in find_images([str(tmp_path / '*.png')])] == ['b.png']
    assert [p.name for p in find_images([str(tmp_path / '**' / '*.webp')])] == ['c.webp']
    assert [p.name for p in find_images([str(tmp_path / 's*')])] == ['c.webp']
    monkeypatch.setenv('HOME', str(tmp_path))
    assert [p.name for p in find_images(['~/**/*.webp'])] == ['c.webp']
    found = list(find_images([str(tmp_path / '**')]))
    assert len(found) == len(set(found)) == 5
    (tmp_path / 'z.png').symlink_to('x' * 300)  # asking for what it leads to is an error
    assert [p.name for p in find_images([str(tmp_path)])] == ['a.JPG', 'b.png', 'c.webp']
    (tmp_path / 'empty').mkdir()
    assert [p.name for p in find_images([str(tmp_path / 'empty')])] == ['empty']
    assert [p.name for p in find_images([str(tmp_path / 'e*')])] == ['empty']
    assert [p for p in find_images([str(tmp_path / '**')]) if p.name != 'z.png'] == found
    with pytest.raises(ImageError, match='a folder without images'):
        read_image(tmp_path / 'empty')
    assert [p.name for p in find_images([str(tmp_path / 'notes.txt'), 'absent.png'])] == ['notes.txt', 'absent.png']
    monkeypatch.setattr('sys.stdin', io.StringIO(f'{tmp_path / "b.png"}\n\n{tmp_path / "sub"}\n'))
    assert [p.name for p in find_images(['-'])] == ['b.png', 'c.webp']
    monkeypatch.setattr('sys.stdin', io.StringIO('line\u2028separator.png\n'))
    assert [p.name for p in find_images(['-'])] == ['line\u2028separator.png']


def test_folders_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    secret = tmp_path / 'secret'
    secret.mkdir()
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    for name in ('scandir', 'listdir'):
        read = getattr(os, name)

        def refuse(path, read=read):
            if os.fspath(path) == str(secret):
                raise PermissionError(13, 'Permission denied', str(secret))
            return read(path)

        monkeypatch.setattr(os, name, refuse)
    assert list(find_images([str(tmp_path)])) == [tmp_path / 'a.png', secret]
    assert list(find_images([str(secret)])) == [secret]
    with pytest.raises(ImageError, match='Permission denied'):
        read_image(secret)
