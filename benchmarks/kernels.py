"""Measure the memory throughput of the C++ kernels of `timm_deluge.ops` beside that of `copy_`: a table, and a JSON
file for each processor.

    pip install -e '.[benchmark]' && python benchmarks/kernels.py

Each kernel alternates, in random order, with a `copy_` that reads and writes as many bytes, in memory of its own; a
ratio is one of medians. With stochastic depth, every image of a layer has a factor.
"""
import json
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from run import FOLDER, cpu_name, slug
from tabulate import tabulate

from timm_deluge.ops import cpp

LAYOUTS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
MAX_TIME = 1.5  # as a multiple of copy_'s


def kernel_calls(shape: list[int], dtype: torch.dtype, layout: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Get a call of each kernel, and how many tensors of the shape it reads and writes."""
    channels = shape[1]
    layers = [torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(20)]
    outs = [torch.empty_like(layers[0]) for _ in range(4)]
    per_channel = torch.rand(channels) + 0.5
    bias = torch.randn(channels)

    def weight(num_layers: int) -> torch.Tensor:
        return torch.randn(num_layers, channels)

    def drop_path(num_sums: int, num_terms: int) -> list[torch.Tensor]:
        return [torch.bernoulli(torch.full((num_terms, shape[0]), 0.5)) * 2 for _ in range(num_sums)]

    def combine(
            num_layers: int, num_sums: int, begun: bool = False, relu: bool = False, scaled: bool = False,
    ) -> tuple[Callable[[], Any], int]:
        weights = [weight(num_layers) for _ in range(num_sums)]
        biases = [bias.expand(shape[0], -1).contiguous() if scaled else bias] * num_sums
        scales = drop_path(num_sums, num_layers) if scaled else None
        return lambda: cpp.combine(
            layers[:num_layers], weights, biases, outs[:num_sums], relu, scales, begun
        ), num_layers + num_sums * (2 if begun else 1)

    def combine_backward(num_grads: int, num_layers: int, scaled: bool = False) -> tuple[Callable[[], Any], int]:
        weights, means = [weight(num_grads) for _ in range(num_layers)], [per_channel] * num_layers
        scales = drop_path(num_layers, num_grads) if scaled else None
        return lambda: cpp.combine_backward(
            layers[:num_grads], weights, layers[-num_layers:], means, outs[:num_layers], scales
        ), num_grads + 3 * num_layers

    return {
        'combine, 1 layer and ReLU': combine(1, 1, relu=True),
        'combine, 3 layers': combine(3, 1),
        'combine, 1 layer to a sum that was begun': combine(1, 1, begun=True),
        'combine, 8 layers, 4 sums': combine(8, 4),
        'combine, 16 layers, 4 sums': combine(16, 4),
        'combine, 8 layers, 4 sums, stochastic depth': combine(8, 4, scaled=True),
        'combine_backward, 2 gradients, 1 layer': combine_backward(2, 1),
        'combine_backward, 8 gradients, 4 layers': combine_backward(8, 4),
        'combine_backward, 16 gradients, 4 layers': combine_backward(16, 4),
        'combine_backward, 8 gradients, 4 layers, stochastic depth': combine_backward(8, 4, scaled=True),
        'moments': (lambda: cpp.moments(layers[0]), 1),
        'norm_act_backward': (lambda: cpp.norm_act_backward(
            outs[0], layers[0], outs[0], *[per_channel] * 4, True), 5),
    }


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measure(run: Callable[[], Any], num_tensors: int, like: torch.Tensor, rounds: int) -> dict[str, float]:
    """Alternate between a kernel and a copy of as many bytes; the first two rounds do not count."""
    num_bytes = num_tensors * like.nbytes
    source = torch.ones(num_bytes // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    sides = {'kernel': run, 'copy_': lambda: target.copy_(source)}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds + 2):
        for side in random.sample(list(sides), len(sides)):
            taken[side].append(seconds(sides[side]))
    kernel, copy = (statistics.median(taken[side][2:]) for side in sides)
    return {'GB/s': num_bytes / kernel / 1e9, 'copy_ GB/s': num_bytes / copy / 1e9, 'time, of copy_': kernel / copy}


def main(
        output: Annotated[Path | None, typer.Option(help='JSON file; one named after the processor if none.')] = None,
        shape: Annotated[str, typer.Option(help='A layer: N C H W.')] = '128 128 16 16',
        rounds: Annotated[int, typer.Option(help='Timed rounds of each kernel.')] = 15,
        threads: Annotated[int, typer.Option(help='Threads.')] = 2,
) -> None:
    """Measure every kernel on this machine's CPU, in both types and both layouts."""
    output = output or FOLDER / 'kernels' / f'{slug(cpu_name())}.json'
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)
    size = [int(n) for n in shape.split()]
    before = json.loads(output.read_text()) if output.exists() else {}
    for option, value in (('shape', size), ('threads', threads)):
        if before.get(option, value) != value:
            raise typer.BadParameter(f'{output} is of {before[option]}: name another --output', param_hint=option)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            for name, (run, num_tensors) in kernel_calls(size, dtype, layout).items():
                result = measure(run, num_tensors, torch.empty(size, dtype=dtype), rounds)
                rows.append({'kernel': name, 'dtype': str(dtype).removeprefix('torch.'), 'layout': layout, **result})
    print(tabulate(rows, headers='keys', floatfmt='.2f'))
    output.write_text(json.dumps({
        'date': str(date.today()), 'machine': cpu_name(), 'threads': threads,
        'torch': torch.__version__, 'shape': size, 'rounds': rounds, 'at_most': MAX_TIME, 'rows': rows,
    }, indent=2) + '\n')


if __name__ == '__main__':
    typer.run(main)
