"""Whatever happens to the files of a checkpoint, what is not the published one is refused, and the file is named."""
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_deluge.weights import CheckpointError, find_checkpoint, load_checkpoint, verify_checkpoint

NUM_EACH = 25


def flip_bit(path: Path, first: int, last: int, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(first, min(last, len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], 'little')


def in_the_header(parts, index, rng):
    path = rng.choice(parts)
    flip_bit(path, 8, header_end(path), rng)
    return path


def in_the_header_length(parts, index, rng):
    path = rng.choice(parts)
    data = path.read_bytes()
    path.write_bytes(rng.choice([2 ** 63, 2 ** 40, len(data), 0]).to_bytes(8, 'little') + data[8:])
    return path


def in_the_tensors(parts, index, rng):
    path = rng.choice(parts)
    flip_bit(path, header_end(path), path.stat().st_size, rng)
    return path


def in_the_index(parts, index, rng):
    flip_bit(index, 0, index.stat().st_size, rng)
    return index


def cut_off(parts, index, rng):
    path = rng.choice([*parts, index])
    path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])
    return path


def continued(parts, index, rng):
    path = rng.choice([*parts, index])
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))
    return path


def swapped(parts, index, rng):
    first, second = sorted(rng.sample(parts, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return first


def of_another_training(parts, index, rng):
    path = rng.choice(parts)
    tensors = load_file(path).items()
    save_file({name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in tensors}, path)
    return path


def a_link_elsewhere(parts, index, rng):
    path = rng.choice([*parts, index])
    other = path.with_name('other')
    other.write_bytes(path.read_bytes()[::-1])
    path.unlink()
    path.symlink_to(other)
    return path


@pytest.mark.slow
@pytest.mark.parametrize('damage', [
    in_the_header, in_the_header_length, in_the_tensors, in_the_index, cut_off, continued, swapped, of_another_training,
    a_link_elsewhere])
def test_damage_is_found_and_the_file_named(split_weights, damage, record_property):
    rng = random.Random(damage.__name__)
    index = split_weights[0].parent / 'delugenet146.test_random.safetensors.index.json'
    sound = {path: path.read_bytes() for path in [*split_weights, index]}
    checkpoint = find_checkpoint('delugenet146')
    for _ in range(NUM_EACH):
        damaged = damage(split_weights, index, rng)
        for read in (verify_checkpoint, load_checkpoint):
            with pytest.raises(CheckpointError, match=damaged.name):
                read(checkpoint)
        for path, content in sound.items():
            path.unlink()
            path.write_bytes(content)
    with pytest.raises(CheckpointError, match=damage(split_weights, index, rng).name):
        timm.create_model('delugenet146', pretrained=True)
    record_property('cases', NUM_EACH + 1)
