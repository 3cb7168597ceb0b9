"""Measure what cross-layer connections cost: one JSON file and one figure for each processor.

    pip install -e '.[benchmark]' && python benchmarks/run.py

Every comparison runs in a process of its own and alternates between its sides in random order, so that all sides meet
the same conditions, including the caches as another side has left them; a ratio is one of medians. R is the same
network with residual sums (`aggregation='residual'`). In training, R runs as plain modules, like other networks of
timm; fused R runs its composite layers and transitions as DelugeNets do, without keeping the convolutions' normalised
inputs for the backward pass.

A reference kernel is timed before, during and after a comparison's rounds: where it takes longer than at its fastest in
any comparison of the same call, another load was present or the clock rate lower, and this is reported. A comparison
whose rounds disagree is repeated, and the calmer run counts.
"""
import fnmatch
import json
import multiprocessing
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import matplotlib.pyplot as plt
import timm
import torch
import typer
from rich.progress import track
from tabulate import tabulate
from timm.utils import reparameterize_model
from torch import nn

from timm_deluge import set_implementation
from timm_deluge.delugenet import DelugeBlock, ResidualBlock
from timm_deluge.report import create_report

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent / 'tests'))

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SIZE = {'delugenet122': 224, 'delugenet146': 32}
BATCH = {
    'cpu': {
        'inference': {'delugenet122': 4, 'delugenet146': 64},
        'training': {'delugenet122': 4, 'delugenet146': 32},
        'autocast': {'delugenet122': 128, 'delugenet146': 128},
    },
    'cuda': {
        kind: {'delugenet122': 256, 'delugenet146': 1024} for kind in ('inference', 'training', 'autocast')
    },
}[DEVICE]
AUTOCAST_SIZE = {'cpu': {'delugenet122': 64, 'delugenet146': 32}, 'cuda': SIZE}[DEVICE]
PEERS = [
    'delugenet122 resnet200', 'delugenet122 densenet161', 'delugenet92 wide_resnet50_2', 'delugenet92 resnet152']
BASELINES = ('resnetlike146_3x3', 'resnetlike146_1x1')
LENGTHS = (8, 16, 32, 64)
MAX_DISAGREEMENT = 0.15  # of the rounds of a side: interquartile range / median
MAX_LOAD = 1.15  # of the reference kernel: longest time / shortest time
MAX_RUNS = 2
rounds = 0
spreads: list[float] = []
probes: list[float] = []


def median_seconds(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Run all sides in each round, in random order; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    reference_seconds()  # the first one in a process takes longer
    probes.append(reference_seconds())
    for round_ in range(rounds + 1):
        for name, run in random.sample(list(sides.items()), len(sides)):
            begin = time.perf_counter()
            run()
            synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - begin)
        if round_ == rounds // 2:
            probes.append(reference_seconds())
    probes.append(reference_seconds())
    if rounds > 1:
        for values in seconds.values():
            low, median, high = statistics.quantiles(values, method='inclusive')
            spreads.append((high - low) / median)
    return {name: statistics.median(values) for name, values in seconds.items()}


def reference_seconds() -> float:
    """Time a matrix product and a copy: the shortest of several times, which only a lasting other load lengthens."""
    matrix = torch.ones(768, 768, device=DEVICE)
    memory = torch.ones(2 ** 22, device=DEVICE)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        matrix @ matrix
        memory.clone()
        synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def synchronize() -> None:
    if DEVICE == 'cuda':
        torch.cuda.synchronize()


def to_device(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return model.to(DEVICE, dtype, memory_format=torch.channels_last)


def images(batch: int, size: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, device=DEVICE, dtype=dtype).contiguous(
        memory_format=torch.channels_last)


def create(name: str, reparameterized: bool = False, dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    model = timm.create_model(name, **kwargs).eval()
    return to_device(reparameterize_model(model, inplace=True) if reparameterized else model, dtype)


def inference(model: nn.Module, x: torch.Tensor, implementation: str = 'auto') -> Callable[[], Any]:
    @torch.inference_mode()
    def run() -> None:
        set_implementation(implementation)
        model(x)
    model.eval()
    return run


def training_step(
        model: nn.Module, x: torch.Tensor, implementation: str = 'auto', autocast: bool = False) -> Callable[[], Any]:
    def step() -> None:
        set_implementation(implementation)
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().square().mean().backward()
    model.train()
    return step


def kept_bytes(model: nn.Module, x: torch.Tensor, implementation: str = 'auto', autocast: bool = False) -> int:
    """Count the bytes that autograd keeps for the backward pass: each storage once, without parameters."""
    set_implementation(implementation)
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    context = torch.autocast(DEVICE, torch.bfloat16, enabled=autocast)
    with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    return sum(storages.values())


def measure_inference(name: str) -> dict[str, Any]:
    x = images(BATCH['inference'][name], SIZE[name])
    sides = {
        'fp32': inference(create(name, True), x),
        'R fp32': inference(create(name, True, aggregation='residual'), x),
        'as trained, fp32': inference(create(name), x),
        'layer by layer, fp32': inference(create(name), x, 'reference'),
    }
    if has_bfloat16():
        sides['bf16'] = inference(create(name, True, torch.bfloat16), x.bfloat16())
        sides['R bf16'] = inference(create(name, True, torch.bfloat16, aggregation='residual'), x.bfloat16())
    seconds = median_seconds(sides)
    what = f'inference, `{name}`, {describe(x)}'
    bar = {'delugenet122': 1.05, 'delugenet146': 1.10}[name]
    of_bfloat16 = [
        figure(f'{what}, bf16: time, of R', seconds['bf16'] / seconds['R bf16']),
        figure(f'{what}, bf16: faster than fp32', seconds['fp32'] / seconds['bf16'], at_least=2.),
    ] if has_bfloat16() else []
    return {'seconds': seconds, 'figures': [
        figure(f'{what}, fp32: time, of R', seconds['fp32'] / seconds['R fp32'], at_most=bar),
        *of_bfloat16,
        figure(f'{what}, fp32: faster by `reparameterize_model` than layer by layer',
               seconds['layer by layer, fp32'] / seconds['fp32'], at_least=1.25 if name == 'delugenet122' else None),
        figure(f'{what}, fp32: faster as trained than layer by layer',
               seconds['layer by layer, fp32'] / seconds['as trained, fp32']),
    ]}


def measure_training(name: str, autocast: bool = False) -> dict[str, Any]:
    x = images(BATCH['autocast'][name], AUTOCAST_SIZE[name]) if autocast else images(
        BATCH['training'][name], SIZE[name])
    residual = create(name, aggregation='residual')
    sides: dict[str, Any] = {
        'fused': (create(name), x, 'auto', autocast),
        'R': (residual, x, 'reference', autocast),
        'fused R': (residual, x, 'auto', autocast),
    }
    kept = {side: kept_bytes(*arguments) for side, arguments in sides.items()}
    steps = {side: training_step(*arguments) for side, arguments in sides.items()}
    seconds = median_seconds(steps)
    what = f'training, `{name}`, {describe(x)}, {"bf16 autocast" if autocast else "fp32"}'
    bars = {'delugenet122': (1.05 if autocast else 1.25, 1.15), 'delugenet146': (1.10 if autocast else 1.30, 1.25)}
    return {'seconds': seconds, 'kept_bytes': kept, 'figures': [
        figure(f'{what}: time, of R', seconds['fused'] / seconds['R'], at_most=bars[name][0]),
        figure(f'{what}: time, of fused R', seconds['fused'] / seconds['fused R'], at_most=bars[name][1]),
        figure(f'{what}: bytes kept for the backward pass, of R', kept['fused'] / kept['R'], at_most=1.),
        figure(f'{what}: bytes kept for the backward pass, of fused R', kept['fused'] / kept['fused R'], at_most=1.10),
    ]}


def measure_baselines(name: str) -> dict[str, Any]:
    x = images(BATCH['training'][name], SIZE[name])
    seconds = median_seconds({side: training_step(create(side), x, autocast=True) for side in (name, *BASELINES)})
    return {
        'seconds': seconds, 'conditions': f'training, {describe(x)}, bf16 autocast',
        'images_per_second': {side: len(x) / s for side, s in seconds.items()}, 'figures': []}


def measure_released(name: str) -> dict[str, Any]:
    from released import ReleasedDelugeNet  # the tests' reference
    x = images(BATCH['training'][name], SIZE[name])
    models = {'fused': create(name), 'released': to_device(ReleasedDelugeNet((8, 16, 24), (32, 64, 128), 100))}
    kept = {side: kept_bytes(model, x) for side, model in models.items()}
    seconds = median_seconds({side: training_step(model, x) for side, model in models.items()})
    what = f'training, `{name}`, {describe(x)}, fp32'
    return {'seconds': seconds, 'kept_bytes': kept, 'figures': [
        figure(f'{what}: faster than the released form', seconds['released'] / seconds['fused'], at_least=2.2),
        figure(f'{what}: fewer bytes kept than by the released form', kept['released'] / kept['fused'], at_least=3.),
    ]}


def measure_peer(name: str, peer: str) -> dict[str, Any]:
    x = images(4 if DEVICE == 'cpu' else 256, 224)
    seconds = median_seconds({name: inference(create(name, True), x), peer: inference(create(peer), x)})
    flops = {model: create_report(model).paper_flops for model in seconds}
    bar = max(1., flops[peer] / flops[name])
    return {'seconds': seconds, 'figures': [
        figure(f'inference, `{name}`, {describe(x)}, fp32: faster than `{peer}`', seconds[peer] / seconds[name],
               at_least=bar),
    ]}


def export(name: str, reparameterized: bool, path: Path) -> None:
    x = images(BATCH['inference'][name], SIZE[name])
    torch.onnx.export(create(name, reparameterized), (x,), path, dynamo=True, input_names=['x'])


def measure_onnxruntime(name: str) -> dict[str, Any]:
    import onnxruntime
    x = images(BATCH['inference'][name], SIZE[name])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry('session.force_spinning_stop', '1')  # after a run: the other sides need the cores
    sides: dict[str, Callable[[], Any]] = {'ours': inference(create(name, True), x)}
    exported = {'as trained': False, 'reparameterised': True}
    with TemporaryDirectory() as folder:
        paths = [Path(folder, f'{side}.onnx') for side in exported]
        with ProcessPoolExecutor(len(paths), multiprocessing.get_context('forkserver')) as executor:
            list(executor.map(export, [name] * len(paths), exported.values(), paths))
        for side, path in zip(exported, paths):
            session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
            sides[side] = partial(session.run, None, {'x': x.contiguous().numpy()})
        seconds = median_seconds(sides)
    what = f'inference, `{name}`, {describe(x)}, fp32'
    return {'seconds': seconds, 'figures': [
        figure(f'{what}: faster than onnxruntime', seconds['reparameterised'] / seconds['ours']),
        figure(f'{what}: faster in onnxruntime by `reparameterize_model`',
               seconds['as trained'] / seconds['reparameterised']),
    ]}


def describe(x: torch.Tensor) -> str:
    return f'{x.shape[-1]}², batch {len(x)}'


def figure(what: str, value: float, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    return {'what': what, 'value': value, 'at_most': at_most, 'at_least': at_least}


def measure_growth(length: str) -> dict[str, Any]:
    depth = int(length)

    def block(block_type: type[ResidualBlock]) -> nn.Module:
        return to_device(nn.Sequential(block_type(nn.Identity(), depth, 64, [0.] * depth))).eval()
    x = images(4, 28, channels=128)
    seconds = median_seconds({
        'inference': inference(reparameterize_model(block(DelugeBlock)), x),
        'inference, R': inference(reparameterize_model(block(ResidualBlock)), x),
        'training': training_step(block(DelugeBlock), x),
        'training, R': training_step(block(ResidualBlock), x, 'reference'),
    })
    return {'seconds_per_layer': {side: s / depth for side, s in seconds.items()}, 'figures': [
        figure(f'{mode}, a block of {depth} layers of 128 channels, {describe(x)}, fp32: time, of R',
               seconds[mode] / seconds[f'{mode}, R'])
        for mode in ('inference', 'training')
    ]}


def measure(name: str, number_of_rounds: int, threads: int) -> dict[str, Any]:
    """Run one comparison; called in a fresh process."""
    global rounds
    rounds = number_of_rounds
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)
    kind, *subject = name.split()
    result = {
        'inference': measure_inference, 'training': measure_training, 'peer': measure_peer, 'growth': measure_growth,
        'autocast': lambda model: measure_training(model, autocast=True), 'released': measure_released,
        'baselines': measure_baselines, 'onnxruntime': measure_onnxruntime,
    }[kind](*subject)
    return {
        'date': str(date.today()), 'torch': torch.__version__, 'timm': timm.__version__, 'rounds': rounds,
        'disagreement': max(spreads, default=0.), 'reference_seconds': probes, **result,
    }


def measure_calmly(name: str, number_of_rounds: int, threads: int) -> dict[str, Any]:
    """Repeat a comparison whose rounds disagree; the calmer run counts."""
    runs: list[dict[str, Any]] = []
    begin = time.perf_counter()
    while len(runs) < MAX_RUNS and (not runs or runs[-1]['disagreement'] > MAX_DISAGREEMENT):
        with ProcessPoolExecutor(1, multiprocessing.get_context('forkserver')) as executor:
            runs.append(executor.submit(measure, name, number_of_rounds, threads).result())
    calmest = min(runs, key=lambda run: run['disagreement'])
    return {**calmest, 'runs': len(runs), 'wall_seconds': time.perf_counter() - begin}


def cpu_info() -> tuple[str, list[str]]:
    """Get the processor's name and what it can do."""
    path = Path('/proc/cpuinfo')
    info = dict(re.findall(r'^(model name|flags)\s*: (.+)$', path.read_text(), re.MULTILINE)) if path.exists() else {}
    return info.get('model name', platform.processor()), info.get('flags', '').split()


def has_bfloat16() -> bool:
    """Tell whether this machine computes in bfloat16 without emulation."""
    return DEVICE == 'cuda' or not {'avx512_bf16', 'amx_bf16'}.isdisjoint(cpu_info()[1])


def cpu_name() -> str:
    """Name the processor, and say if it has AMX or only AVX2: virtual machines give several processors one name."""
    name, flags = cpu_info()
    if 'amx_bf16' in flags:
        return f'{name} with AMX'
    return f'{name} with AVX2 alone' if 'avx2' in flags and 'avx512f' not in flags else name


def slug(machine: str) -> str:
    """Make a file name of a processor's name."""
    return re.sub('[^a-z0-9.]+', '-', machine.lower().replace('(r)', '')).strip('-')


def draw(rows: dict[str, Any], path: Path) -> None:
    """Plot the cost of a layer against the length of its block."""
    plot, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    for axis, mode in zip(axes, ('inference', 'training')):
        for side, label in ((mode, 'cross-layer convolutions'), (f'{mode}, R', 'residual sums (R)')):
            cost = [1000 * rows[f'growth {length}']['seconds_per_layer'][side] for length in LENGTHS]
            axis.plot(LENGTHS, cost, marker='o', label=label)
        axis.set(title=mode, xlabel='composite layers in the block', ylabel='ms per layer', xticks=LENGTHS)
        axis.set_ylim(bottom=0)
        axis.legend()
    plot.savefig(path, dpi=150)


def main(
        only: Annotated[str, typer.Option(help='Comparisons to run, such as "training *": the others stay.')] = '*',
        output: Annotated[Path | None, typer.Option(help='JSON file; the figure goes beside it.')] = None,
        rounds: Annotated[int, typer.Option(min=1, help='Timed rounds of each comparison.')] = 5,
        threads: Annotated[int, typer.Option(min=1, help='Threads of a CPU.')] = 2,
) -> None:
    """Measure everything on this machine's GPU, or else on its CPU."""
    machine = torch.cuda.get_device_name() if DEVICE == 'cuda' else cpu_name()
    output = output or FOLDER / 'results' / f'{slug(machine)}.json'
    names = [f'{kind} {name}' for kind in ('inference', 'training', 'autocast') for name in SIZE]
    names += ['released delugenet146', 'baselines delugenet146', *(f'peer {pair}' for pair in PEERS)]
    names += [*(f'onnxruntime {name}' for name in SIZE if DEVICE == 'cpu'), *(f'growth {n}' for n in LENGTHS)]
    if not has_bfloat16():
        names = [name for name in names if not name.startswith(('autocast', 'baselines'))]
    chosen = fnmatch.filter(names, only)
    if not chosen:
        without = '' if has_bfloat16() else '; autocast and baselines need a processor with bfloat16'
        raise typer.BadParameter(f'{only!r} fits none of: {", ".join(names)}{without}', param_hint='--only')
    before = json.loads(output.read_text()) if output.exists() else {'threads': threads, 'rows': {}}
    if before.get('machine', machine) != machine:
        raise typer.BadParameter(f'{output} is of the {before["machine"]}: name another', param_hint='--output')
    if before['threads'] != threads:
        raise typer.BadParameter(
            f'{output} is of {before["threads"]} threads: name another --output', param_hint='--threads')
    multiprocessing.set_forkserver_preload(['torch', 'timm', 'timm_deluge.report'])  # imports them once for all
    measured: dict[str, dict[str, Any]] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in track(chosen, description='Measuring'):
        measured[name] = measure_calmly(name, rounds, threads)
        rows = {**before['rows'], **measured}
        fastest = min(min(row['reference_seconds']) for row in measured.values())
        for row in measured.values():
            row['load'] = max(row['reference_seconds']) / fastest
        unfinished = output.with_suffix('.partial')
        unfinished.write_text(json.dumps({
            'machine': machine, 'device': DEVICE, 'threads': threads,
            'max_load': MAX_LOAD, 'max_disagreement': MAX_DISAGREEMENT,
            'rows': {name: rows[name] for name in names if name in rows},
        }, indent=2) + '\n')
        unfinished.replace(output)
    if all(f'growth {length}' in rows for length in LENGTHS):
        draw(rows, output.with_suffix('.png'))
    print(tabulate([
        {**f, 'disagreement': row['disagreement'], 'load': row['load'], 'runs': row['runs']}
        for row in measured.values() for f in row['figures']
    ], headers='keys', floatfmt='.2f'))
    for name, row in measured.items():
        if row['load'] > MAX_LOAD:
            print(f'{name}: another load was present, or the clock rate lower: the reference kernel took '
                  f'{row["load"]:.2f} times its least time')
        if row['disagreement'] > MAX_DISAGREEMENT:
            print(f'{name}: rounds disagree by {row["disagreement"]:.0%} in the calmer of {row["runs"]} runs')


if __name__ == '__main__':
    typer.run(main)
