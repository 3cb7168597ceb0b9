"""Parameters, multiply-adds and FLOPs of any timm model, by fvcore and by the paper's convention.

fvcore counts a multiply-add as one FLOP, a batch normalisation as two per element (one without affine parameters).
The paper counts a multiply-add of convolutions and classifier as two, and adds three FLOPs per input element of a
cross-layer convolution (which cover its normalisation) and two per element of every other batch normalisation.
"""
import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import timm
import torch
from tabulate import tabulate
from timm.layers import to_2tuple
from torch import nn

from .aggregation import CrossLayerDepthwiseConv2d

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)  # raised where fvcore scripts its functions
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import elementwise_flop_counter, get_shape

__all__ = ['BlockReport', 'ModelReport', 'create_report', 'format_reports']

MULTIPLY_ADDS = ('conv', 'linear', 'matmul', 'addmm', 'mm', 'bmm', 'einsum', 'attention', 'addcmul')
SILENTLY_IGNORED = ('relu', 'relu_', 'clamp', 'clamp_', 'max')  # arithmetic that fvcore takes for data movement


@dataclass(frozen=True)
class BlockReport:
    """Counts of one part of a model, for one image.

    Attributes:
        name: Name of the submodule.
        params: Number of parameters.
        macs: Multiply-adds of convolutions, matrix products and cross-layer convolutions.
        flops: FLOPs as fvcore counts them.
        paper_flops: FLOPs as the paper counts them.
        cross_layer_params: The cross-layer convolutions' part of `params`.
        cross_layer_macs: The cross-layer convolutions' part of `macs`.
        cross_layer_flops: The cross-layer convolutions' part of `flops`, with the normalisation of their inputs.
        cross_layer_paper_flops: The cross-layer convolutions' part of `paper_flops`.
    """
    name: str
    params: int
    macs: int
    flops: int
    paper_flops: int
    cross_layer_params: int
    cross_layer_macs: int
    cross_layer_flops: int
    cross_layer_paper_flops: int


@dataclass(frozen=True)
class ModelReport(BlockReport):
    """Counts of a whole model.

    Attributes:
        input_size: Channels, height and width of the image.
        blocks: The same counts for each part. They add up to the model's, except for parameters outside all parts.
        uncounted: Operators whose arithmetic neither convention counts, with how often each of them ran.
    """
    input_size: tuple[int, ...] = ()
    blocks: list[BlockReport] = field(default_factory=list)
    uncounted: dict[str, int] = field(default_factory=dict)


def _batch_norm(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    elements = prod(get_shape(inputs[0]))
    affine = get_shape(inputs[1]) is not None
    return Counter(batch_norm=2 * elements) if affine else Counter(layer_output_norm=elements)


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    query, key, value = (get_shape(i) for i in inputs[:3])
    return Counter(attention=prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _count(name: str, module: nn.Module, prefix: str, flops: dict[str, Counter[str]]) -> BlockReport:
    cross_layers = {f'{prefix}.{n}'.lstrip('.'): m for n, m in module.named_modules()
                    if isinstance(m, CrossLayerDepthwiseConv2d)}
    cross_layer_macs = sum(flops[n]['addcmul'] for n in cross_layers)
    macs = sum(flops[prefix][op] for op in MULTIPLY_ADDS)
    return BlockReport(
        name=name,
        params=sum(p.numel() for p in module.parameters()),
        macs=macs,
        flops=sum(flops[prefix].values()),
        paper_flops=2 * (macs - cross_layer_macs) + 3 * cross_layer_macs + flops[prefix]['batch_norm'],
        cross_layer_params=sum(p.numel() for m in cross_layers.values() for p in m.parameters()),
        cross_layer_macs=cross_layer_macs,
        cross_layer_flops=cross_layer_macs + flops[prefix]['layer_output_norm'],
        cross_layer_paper_flops=3 * cross_layer_macs,
    )


def create_report(model_name: str, **model_kwargs: Any) -> ModelReport:
    """Count a model's parameters and the arithmetic of one image's inference, at the model's own input size.

    Args:
        model_name: Any name that `timm.create_model` takes.
        **model_kwargs: Further arguments of `timm.create_model`, such as DelugeNet's `aggregation`.

    Returns:
        The counts of the model and of each of its blocks.

    Raises:
        RuntimeError: If timm has no such model.
    """
    model = timm.create_model(model_name, **model_kwargs).eval()
    channels, *size = timm.data.resolve_model_data_config(model)['input_size']
    input_size = (model_kwargs.get('in_chans', channels), *to_2tuple(model_kwargs.get('img_size', size)))
    uncounted: Counter[str] = Counter()

    def tally(op: str) -> Callable[[list[Any], list[Any]], Counter[str]]:
        def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
            uncounted[op] += 1
            return Counter()
        return handle

    with torch.no_grad():
        analysis = FlopCountAnalysis(model, torch.zeros(1, *input_size)).set_op_handle(**{
            'aten::batch_norm': _batch_norm,
            'aten::addcmul': elementwise_flop_counter(0, 1),
            'aten::scaled_dot_product_attention': _attention,
            'aten::movedim': None,
            **{f'aten::{op}': tally(op) for op in SILENTLY_IGNORED},
        }).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        flops = analysis.by_module_and_operator()
    blocks = {}
    for name, child in model.named_children():
        if name in ('stages', 'blocks', 'features'):
            blocks.update({f'{name}.{sub_name}': sub for sub_name, sub in child.named_children()})
        else:
            blocks[name] = child
    return ModelReport(
        **asdict(_count(' '.join([model_name, *(f'{k}={v}' for k, v in model_kwargs.items())]), model, '', flops)),
        input_size=input_size,
        blocks=[_count(name, block, name, flops) for name, block in blocks.items()],
        uncounted=dict(uncounted + Counter({
            op.removeprefix('aten::'): n for op, n in analysis.unsupported_ops().items()})),
    )


def _row(report: BlockReport) -> dict[str, str]:
    shares = [100 * part / max(whole, 1) for part, whole in (
        (report.cross_layer_params, report.params),
        (report.cross_layer_macs, report.macs),
        (report.cross_layer_flops, report.flops),
        (report.cross_layer_paper_flops, report.paper_flops),
    )]
    return {
        'model': report.name,
        'parameters': f'{report.params:,}',
        'GMACs': f'{report.macs / 1e9:.3f}',
        'GFLOPs (fvcore)': f'{report.flops / 1e9:.3f}',
        'GFLOPs (paper)': f'{report.paper_flops / 1e9:.2f}',
        'cross-layer share of these four, %': ' / '.join(f'{s:.2f}' for s in shares) if any(shares) else '',
    }


def format_reports(reports: Sequence[ModelReport], fmt: str = 'table') -> str:
    """Write reports down.

    Args:
        reports: One or more models' reports.
        fmt: 'json' (every count), 'csv' (every count, a line for each model and block), 'markdown' or 'table' (the
            models' counts, rounded, followed by a breakdown into blocks and the operators that are not counted).

    Returns:
        The text.

    Raises:
        ValueError: If the format is none of these.
    """
    if fmt == 'json':
        return json.dumps([asdict(r) for r in reports], indent=2)
    if fmt == 'csv':
        out = io.StringIO()
        writer = csv.DictWriter(out, ['model', *BlockReport.__dataclass_fields__], lineterminator='\n')
        writer.writeheader()
        for report in reports:
            for part in (report, *report.blocks):
                counts = {key: getattr(part, key) for key in BlockReport.__dataclass_fields__}
                writer.writerow({**counts, 'model': report.name, 'name': '' if part is report else part.name})
        return out.getvalue().rstrip()
    if fmt not in ('markdown', 'table'):
        raise ValueError(f"format {fmt!r}: must be 'table', 'json', 'markdown' or 'csv'")
    style = 'github' if fmt == 'markdown' else 'simple'
    sections = [tabulate([_row(r) for r in reports], headers='keys', tablefmt=style, disable_numparse=True)]
    for report in reports:
        rows = [{'block': part.pop('model'), **part} for part in map(_row, report.blocks)]
        size = '×'.join(map(str, report.input_size))
        uncounted = ', '.join(f'{op} {n}×' for op, n in report.uncounted.items()) or 'nothing'
        sections += [
            f'{"### " if fmt == "markdown" else ""}{report.name}, {size}',
            tabulate(rows, headers='keys', tablefmt=style, disable_numparse=True),
            f'Not counted: {uncounted}.',
        ]
    return '\n\n'.join(sections)
