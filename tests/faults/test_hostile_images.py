"""A folder of a thousand bad and odd files: each bad one is named, the others are classified, memory stays bounded."""
import io
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='makes a fifo, and measures memory as POSIX does')

NUM_IMAGES = 1000
MAX_BYTES = 2 * 2 ** 30
PREDICT = """
import resource, sys
from timm_deluge.cli import app
try:
    app()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""


def encoded(rng, mode='RGB', fmt='PNG', size=(40, 30), **options) -> bytes:
    values = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    image = Image.fromarray(values[..., :3]).convert(mode) if mode != 'RGBA' else Image.fromarray(values)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def truncated(path, rng):
    data = encoded(rng, fmt=rng.choice(['PNG', 'JPEG', 'WEBP', 'BMP']))
    path.write_bytes(data[:rng.randrange(1, len(data) // 2)])


def of_noise(path, rng):
    path.write_bytes(rng.randbytes(rng.randrange(1, 5000)))


def empty(path, rng):
    path.touch()


def bomb(path, rng):
    Image.new('1', (20_000, 20_000)).save(path, 'PNG')


def thread(path, rng):
    Image.new('L', (5000, 2)).save(path, 'PNG')


def with_another_extension(path, rng):
    path.write_bytes(encoded(rng, fmt=rng.choice(['JPEG', 'WEBP', 'GIF', 'TIFF'])))


def of_any_mode(path, rng):
    mode, fmt = rng.choice([('CMYK', 'TIFF'), ('LA', 'PNG'), ('RGBA', 'PNG'), ('1', 'PNG'), ('P', 'GIF'), ('I', 'TIFF'),
                            ('F', 'TIFF'), ('L', 'JPEG'), ('YCbCr', 'JPEG')])
    path.write_bytes(encoded(rng, mode, fmt))


def of_16_bits(path, rng):
    values = np.frombuffer(rng.randbytes(2 * 20 * 20), np.uint16).reshape(20, 20)
    Image.fromarray(values).save(path, 'PNG')


def animated(path, rng):
    frames = [Image.new('RGB', (20, 20), (rng.randrange(256), 0, 0)) for _ in range(3)]
    frames[0].save(path, 'GIF', save_all=True, append_images=frames[1:])


def rotated(path, rng):
    exif = Image.Exif()
    exif[274] = rng.randrange(1, 9)
    path.write_bytes(encoded(rng, fmt='JPEG', exif=exif))


BAD = [truncated, of_noise, empty, thread]
ODD = [with_another_extension, of_any_mode, of_16_bits, animated, rotated]


@pytest.mark.parametrize('from_stdin', [False, True])
def test_a_name_that_is_no_text(tmp_path, from_stdin):
    unnamed = os.fsencode(tmp_path) + b'/\xff.png'
    with open(unnamed, 'wb') as file:
        file.write(encoded(random.Random(0)))
    command = [sys.executable, '-c', PREDICT, 'predict', '-' if from_stdin else str(tmp_path), '--top', '1']
    env = {**os.environ, 'PYTHONUTF8': '1'}
    result = subprocess.run(command, input=unnamed, capture_output=True, env=env)
    assert result.returncode == 0 and '\N{REPLACEMENT CHARACTER}.png' in result.stdout.decode(), result.stderr


@pytest.mark.slow
def test_a_thousand_hostile_images(tmp_path, record_property):
    rng = random.Random(0)
    folder = tmp_path / 'images'
    folder.mkdir()
    bad, odd = set(), set()
    for i in range(NUM_IMAGES):
        make = rng.choice([*BAD, *ODD])
        path = folder / f'{i:04}_{make.__name__}.{rng.choice(["png", "jpg", "JPEG", "gif"])}'
        make(path, rng)
        (bad if make in BAD else odd).add(str(path))
    bomb(folder / 'bomb.png', rng)
    bad.add(str(folder / 'bomb.png'))
    unnamed = os.fsdecode(os.fsencode(folder) + b'/\xff.png')
    with open(unnamed, 'wb') as file:
        file.write(encoded(rng))
    odd.add(unnamed)
    os.mkfifo(folder / 'fifo.png')
    (folder / 'loop').symlink_to(folder)
    command = [sys.executable, '-c', PREDICT, 'predict', str(folder), '--json', '--top', '1']
    result = subprocess.run(command, capture_output=True, timeout=500)
    assert result.returncode == 1, result.stderr
    assert b'Traceback' not in result.stderr
    predictions = {p['path']: p for p in json.loads(result.stdout.decode(errors='surrogateescape'))}
    assert {path for path, p in predictions.items() if 'error' in p} == bad
    assert {path for path, p in predictions.items() if 'classes' in p} == odd
    assert int(result.stderr.split()[-1]) < MAX_BYTES
    record_property('cases', len(predictions))
