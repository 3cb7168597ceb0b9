"""Measure what cross-layer connections cost: one JSON file, one figure.

    pip install -e '.[benchmark]' && python benchmarks/run.py

Every comparison runs in a process of its own and alternates between its sides, so that both meet the same machine;
a ratio is one of medians. R is the same network with residual sums (`aggregation='residual'`): in training in plain
modules, as other networks of timm are; lean R trains as DelugeNets do, keeping only what convolutions take and give.
"""
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import timm
import torch
import typer
from rich.progress import track
from timm.utils import reparameterize_model
from torch import nn

from timm_deluge import set_implementation
from timm_deluge.delugenet import DelugeBlock, ResidualBlock
from timm_deluge.report import create_report

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent / 'tests'))

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DTYPE = torch.bfloat16 if DEVICE == 'cuda' else torch.float32
BATCH = {  # inference, training
    'cpu': {'delugenet122': (4, 4), 'delugenet146': (64, 32)},
    'cuda': {'delugenet122': (256, 256), 'delugenet146': (1024, 1024)},
}[DEVICE]
SIZE = {'delugenet122': 224, 'delugenet146': 32}
BARS = {
    'cpu': {
        'inference delugenet122': 1.05, 'inference delugenet146': 1.20,
        'training delugenet122': 1.25, 'training delugenet146': 1.30,
    },
    'cuda': {
        'inference delugenet122': 1.10, 'inference delugenet146': 1.10,
        'training delugenet122': 1.20, 'training delugenet146': 1.20,
    },
}[DEVICE]
PEERS = [
    'delugenet122 resnet200', 'delugenet122 densenet161', 'delugenet92 wide_resnet50_2', 'delugenet92 resnet152']
LENGTHS = (8, 16, 24, 32, 48, 64)
rounds = 0


def median_seconds(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Alternate between the sides; the first two rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 2):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if DEVICE == 'cuda':
                torch.cuda.synchronize()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def to_device(model: nn.Module) -> nn.Module:
    return model.to(DEVICE, DTYPE, memory_format=torch.channels_last)


def images(batch: int, size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, device=DEVICE, dtype=DTYPE).contiguous(
        memory_format=torch.channels_last)


def create(name: str, reparameterized: bool = False, **kwargs) -> nn.Module:
    model = timm.create_model(name, **kwargs).eval()
    return to_device(reparameterize_model(model, inplace=True) if reparameterized else model)


def inference(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    return torch.inference_mode()(lambda: model.eval()(x))


def training_step(model: nn.Module, x: torch.Tensor, implementation: str = 'auto') -> Callable[[], Any]:
    def step() -> None:
        set_implementation(implementation)
        model.zero_grad()
        model(x).square().mean().backward()
    model.train()
    return step


def kept_bytes(model: nn.Module, x: torch.Tensor, implementation: str = 'auto') -> int:
    """Bytes that autograd keeps for the backward pass: storages, each once, parameters excluded."""
    set_implementation(implementation)
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    return sum(storages.values())


def peak_bytes(step: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def measure_inference(name: str) -> dict[str, Any]:
    x = images(BATCH[name][0], SIZE[name])
    seconds = median_seconds({
        'reparameterized': inference(create(name, True), x),
        'R reparameterized': inference(create(name, True, aggregation='residual'), x),
    })
    return {'seconds': seconds, 'ratio_to_R': seconds['reparameterized'] / seconds['R reparameterized']}


def measure_reparameterization(name: str) -> dict[str, Any]:
    x = images(BATCH[name][0], SIZE[name])
    seconds = median_seconds({
        'reparameterized': inference(create(name, True), x),
        'as trained': inference(create(name), x),
    })
    return {'seconds': seconds, 'speedup': seconds['as trained'] / seconds['reparameterized']}


def measure_training(name: str) -> dict[str, Any]:
    x = images(BATCH[name][1], SIZE[name])
    residual = create(name, aggregation='residual')
    sides = {'lean': (create(name), x), 'R': (residual, x, 'reference'), 'lean R': (residual, x)}
    kept = {side: kept_bytes(*arguments) for side, arguments in sides.items()}
    steps = {side: training_step(*arguments) for side, arguments in sides.items()}
    peak = {side: peak_bytes(step) for side, step in steps.items()} if DEVICE == 'cuda' else None
    seconds = median_seconds(steps)
    return {
        'seconds': seconds,
        'ratio_to_R': seconds['lean'] / seconds['R'],
        'ratio_to_lean_R': seconds['lean'] / seconds['lean R'],
        'kept_bytes': kept,
        'kept_ratio_to_R': kept['lean'] / kept['R'],
        'kept_ratio_to_lean_R': kept['lean'] / kept['lean R'],
        'peak_bytes': peak,
    }


def measure_released(name: str) -> dict[str, Any]:
    from released import ReleasedDelugeNet  # the tests' reference
    x = images(BATCH[name][1], SIZE[name])
    models = {'lean': create(name), 'released': to_device(ReleasedDelugeNet((8, 16, 24), (32, 64, 128), 100))}
    kept = {side: kept_bytes(model, x) for side, model in models.items()}
    seconds = median_seconds({side: training_step(model, x) for side, model in models.items()})
    return {
        'seconds': seconds,
        'speedup': seconds['released'] / seconds['lean'],
        'kept_bytes': kept,
        'kept_ratio': kept['released'] / kept['lean'],
    }


def measure_peer(name: str, peer: str) -> dict[str, Any]:
    batch = 4 if DEVICE == 'cpu' else 256
    x = images(batch, 224)
    seconds = median_seconds({name: inference(create(name, True), x), peer: inference(create(peer), x)})
    flops = {model: create_report(model).paper_flops for model in seconds}
    return {
        'images_per_second': {model: batch / s for model, s in seconds.items()},
        'speedup': seconds[peer] / seconds[name],
        'flops_ratio': flops[peer] / flops[name],
    }


def measure_growth(length: int) -> dict[str, Any]:
    def block(block_type: type[ResidualBlock]) -> nn.Module:
        return to_device(nn.Sequential(block_type(nn.Identity(), length, 64, [0.] * length))).eval()
    x = images(4, 28, channels=128)
    seconds = median_seconds({
        'inference': inference(reparameterize_model(block(DelugeBlock)), x),
        'inference, R': inference(reparameterize_model(block(ResidualBlock)), x),
        'training': training_step(block(DelugeBlock), x),
        'training, R': training_step(block(ResidualBlock), x, 'reference'),
    })
    return {
        'seconds_per_layer': {side: s / length for side, s in seconds.items()},
        'cross_layer_share': {
            mode: 1 - seconds[f'{mode}, R'] / seconds[mode] for mode in ('inference', 'training')},
    }


def measure(task: tuple[str, str, int, int]) -> dict[str, Any]:
    """Run one comparison; called in a fresh process."""
    global rounds
    kind, subject, rounds, threads = task
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if kind == 'growth':
        return measure_growth(int(subject))
    if kind == 'peers':
        return measure_peer(*subject.split())
    return {
        'inference': measure_inference, 'reparameterization': measure_reparameterization,
        'training': measure_training, 'released': measure_released,
    }[kind](subject)


def cpu_name() -> str:
    for line in Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []:
        if line.startswith('model name'):
            return line.partition(':')[2].strip()
    return platform.processor()


def draw(growth: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot the cost of a layer against the length of its block."""
    lengths = [int(length) for length in growth]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    for axis, mode in zip(axes, ('inference', 'training')):
        for side, label in ((mode, 'cross-layer convolutions'), (f'{mode}, R', 'residual sums (R)')):
            cost = [1000 * growth[str(length)]['seconds_per_layer'][side] for length in lengths]
            axis.plot(lengths, cost, marker='o', label=label)
        axis.set(title=mode, xlabel='composite layers in the block', ylabel='ms per layer', xticks=lengths)
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.savefig(path, dpi=150)


def main(
        output: Annotated[Path, typer.Option(help='JSON file; the figure goes beside it.')] = FOLDER / f'{DEVICE}.json',
        rounds: Annotated[int, typer.Option(help='Timed rounds of each comparison.')] = 11,
        threads: Annotated[int, typer.Option(help='Threads of a CPU.')] = 2,
        only: Annotated[str, typer.Option(help='One kind of comparison: inference, training, …; all if empty.')] = '',
) -> None:
    """Measure everything on this machine's GPU, or else on its CPU."""
    subjects = {
        'inference': list(SIZE), 'reparameterization': list(SIZE), 'training': list(SIZE),
        'released': ['delugenet146'], 'peers': PEERS, 'growth': [str(length) for length in LENGTHS],
    }
    if only and only not in subjects:
        raise typer.BadParameter(f'{only!r}: must be one of {", ".join(subjects)}', param_hint='--only')
    tasks = [(kind, s, rounds, threads) for kind in subjects if only in ('', kind) for s in subjects[kind]]
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        results = list(track(pool.imap(measure, tasks), description='Measuring', total=len(tasks)))
    report: dict[str, Any] = {
        'date': str(date.today()), 'device': DEVICE,
        'machine': torch.cuda.get_device_name() if DEVICE == 'cuda' else cpu_name(),
        'threads': threads, 'rounds': rounds,
        'dtype': str(DTYPE).removeprefix('torch.'), 'torch': torch.__version__, 'timm': timm.__version__,
        'batch': {name: dict(zip(('inference', 'training'), sizes)) for name, sizes in BATCH.items()},
        'bars': BARS,
    }
    for (kind, subject, *_), result in zip(tasks, results):
        report.setdefault(kind, {})[subject] = result
    if 'growth' in report:
        draw(report['growth'], output.with_suffix('.png'))
    output.write_text(json.dumps(report, indent=2) + '\n')
    print(json.dumps(report, indent=2))


if __name__ == '__main__':
    typer.run(main)
