"""Break the package in many ways, one at a time in a scratch copy, and see that a test fails each time.

    python tests/mutations.py              # all; prints a table of what caught what
    python tests/mutations.py report prune # those of the files whose names contain one of these

A mutation is a file of the package, a piece of it that occurs once, what takes its place, and the tests that should
notice. Exits with 1 if one survives.
"""
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tabulate import tabulate

REPOSITORY = Path(__file__).resolve().parent.parent
IMPLEMENTATIONS = 'test_implementations.py'
MAX_MEMORY = 16 * 2 ** 30  # of a test, in bytes: some mutations ask for more than there is
MUTATIONS = [
    # the definition and the architecture
    ('aggregation.py', 'self.weight, 1 / len(self.sources)', 'self.weight, 1.', 'test_counts.py'),
    ('aggregation.py', '.div_(keep_rate)', '', 'test_connection_drop.py'),
    ('aggregation.py', 'spread(bias, self.sources, self.num_layers)', 'spread(weight, self.sources, self.num_layers)',
     'test_prune.py'),
    ('ops/reference.py', 'x = bias.sum(0)', 'x = bias[0]', 'test_fidelity.py'),
    ('delugenet.py', 'outputs = [self.norm(x)]', 'outputs = [x]', 'test_fidelity.py'),
    ('delugenet.py', "mode='fan_out'", "mode='fan_in'", 'test_counts.py'),
    ('delugenet.py', 'self.norm(x) if norm and feat_idx == last_idx else x', 'self.norm(x) if norm else x',
     'test_timm_contract.py'),
    ('delugenet.py', '        if feat_idx == last_idx:\n', '        if True:\n', 'test_timm_contract.py'),
    ('delugenet.py', 'outputs.append(drop_path(norm(h)))', 'outputs.append(norm(h))', IMPLEMENTATIONS),
    ('delugenet.py', 'if params > MAX_PARAMS:', 'if False:', 'faults/test_hostile_configurations.py'),
    # the fused training path
    ('ops/fused_training.py', 'scale = factor * invstd *', 'scale = 0 * factor * invstd *', IMPLEMENTATIONS),
    ('ops/fused_training.py', 'grad *= sample_scale', 'pass', IMPLEMENTATIONS),
    ('ops/fused_training.py', '% LAYERS_PER_PASS == 0', '% LAYERS_PER_PASS == 1', IMPLEMENTATIONS),
    ('ops/fused_training.py', 'torch._C._current_graph_task_id()', '0', IMPLEMENTATIONS),
    ('ops/norm_act_conv.py', 'return tensor.view_as(tensor) if', 'return tensor if', IMPLEMENTATIONS),
    ('ops/checkpoint.py', 'renew = stand_in if', 'renew = (lambda tensor: tensor) if', IMPLEMENTATIONS),
    ('ops/checkpoint.py', '_twin(ctx.layer)', 'ctx.layer', IMPLEMENTATIONS),
    ('ops/fused_training.py', '= WeakValueDictionary()', '= {}', IMPLEMENTATIONS),
    ('ops/layout.py', 'dtype = like.dtype', 'dtype = layers[0].dtype', IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'int64_t c = tile.column;\n        if constexpr', 'int64_t c = 0;\n        if constexpr',
     IMPLEMENTATIONS),
    ('weights.py', 'path.readlink().name', 'path.resolve().name', 'test_hub.py'),
    ('ops/memory.py', 'if num_tensors * like.nbytes <= WORKSPACE_BYTES:', 'if True:', 'test_reparameterize.py'),
    ('ops/memory.py', 'like.nbytes + BYTES_BETWEEN', 'like.nbytes', 'test_reparameterize.py'),
    ('ops/memory.py', '((len(x) - 1) // fitting).bit_length()', '(len(x) // (fitting + 1)).bit_length()',
     'test_reparameterize.py'),
    ('ops/running_sums.py', 'folded_weights(range(i, i + 1), new, False)',
     'folded_weights(range(i, i + 1), new, True)', IMPLEMENTATIONS),
    ('ops/norm_act_conv.py', 'var * (count / (count - 1))', 'var', IMPLEMENTATIONS),
    ('ops/norm_act_conv.py', 'norm.num_batches_tracked.add_(1)', 'pass', IMPLEMENTATIONS),
    ('ops/norm_act_conv.py', '1 / norm.num_batches_tracked.item()', '0.1', IMPLEMENTATIONS),
    ('ops/implementation.py', 'if torch._C._len_torch_dispatch_stack():', 'if False:', IMPLEMENTATIONS),
    ('ops/implementation.py', 'if type(x) is not torch.Tensor:', 'if False:', IMPLEMENTATIONS),
    ('ops/conv.py', ' and x.dtype is not torch.float64', '', 'test_conv.py'),
    ('ops/compile.py', " if line.split(':')[0].strip() in PROCESSOR_FIELDS", '', 'test_compile.py'),
    ('reparameterize.py', "            and not torch.is_autocast_enabled('cpu')\n", '', 'test_reparameterize.py'),
    ('reparameterize.py', 'self._reordered = None  # it would', 'pass  # it would', 'test_reparameterize.py'),
    ('settle.py', 'norm.running_var.clamp_(min=0)', 'pass', 'test_training_run.py'),
    ('ops/decision.py', 'if torch.nn.modules.module._has_any_global_hook():', 'if False:', IMPLEMENTATIONS),
    ('ops/implementation.py', 'if x.dtype is torch.float16 and not', 'if x.dtype.itemsize == 2 and not',
     IMPLEMENTATIONS),
    ('delugenet.py', "'cross_layers[]': tuple(AGGREGATIONS.values())", "'cross_layers[]': (CrossLayerDepthwiseConv2d,)",
     'test_aggregation.py'),
    ('fused.py', 'if part.affine == (last in self.not_affine):', 'if False:', IMPLEMENTATIONS),
    ('ops/fused_training.py', 'layer._replace(output=layer.output.detach())', 'layer', IMPLEMENTATIONS),
    ('ops/fused_training.py', 'recompute.layers = layers[:recompute.index + 2]', 'pass', IMPLEMENTATIONS),
    ('ops/fused_training.py', 'del current.layers[ctx.index:]', 'pass', IMPLEMENTATIONS),
    ('ops/norm_act_conv.py', 'else norm_weight * invstd * grad_norm_bias', 'else 0 * mean', IMPLEMENTATIONS),
    ('validate.py', 'if stray:', 'if False:', 'test_training_run.py'),
    ('hub.py', "if '/' not in repo_id:", 'if False:', 'test_hub.py'),
    ('grow.py', 'part.train(block.training)', 'part', 'test_grow.py'),
    ('grow.py', 'spread(parameter, sources, num_layers)', 'spread(parameter, range(len(sources)), num_layers)',
     'test_grow.py'),
    ('ops/conv.py', 'pad_h, pad_w = max(0, dh * (kh - 1) - ph)', 'pad_h, pad_w = max(0, kh - 1 - ph)', 'test_conv.py'),
    ('ops/decision.py', "name = 'reference' if reason else", 'name =', IMPLEMENTATIONS),
    ('ops/implementation.py', 'if x.dtype is torch.float16 and not x.is_cuda:', 'if False:', IMPLEMENTATIONS),
    # the backends
    ('ops/aten.py', 'x.addcmul_(layer, scale)', 'x.addcmul_(layer, scale, value=1.01)', IMPLEMENTATIONS),
    ('ops/backend.py', 'if tensor.device != device:', 'if False:', IMPLEMENTATIONS),
    ('ops/triton.py', '(total < 0) & (result == 0)', '(total < 0)', IMPLEMENTATIONS),
    ('ops/triton.py', "centred -= tl.load(means + which * channels + c, mask=c < channels, other=0.)", 'pass',
     IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'relu && k == 0, shape, threads', 'relu, shape, threads', IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'if (begun) results[j][m] += vectors.load(outs[j], m);', '', IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'total[m] += weight * grad[i * M + m];', 'total[m] += grad[i * M + m];', IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'vectors.load(layers[j], m) - vectors.parameter(means[j])', 'vectors.load(layers[j], m)',
     IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'if (num_results - k == 3) of_results(Int<3>{}, k);', '', IMPLEMENTATIONS),
    ('ops/kernels.cpp', ' + first_grad * weights.OF_LAYER', '', IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'if (c < tile.end_column)\n            add(', 'if (false)\n            add(', IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'tile.row / shape.channels * together', 'tile.row / shape.channels', IMPLEMENTATIONS),
    ('ops/kernels.cpp', 'std::min(first_image + together, images)', 'first_image + together', IMPLEMENTATIONS),
    ('ops/compile.py', 'status.st_mode & 0o022', 'status.st_mode & 0', 'test_compile.py'),
    ('ops/compile.py', 'if path.name == _file_name(name, content):', 'if True:', 'test_compile.py'),
    # inference
    ('reparameterize.py', '(norm.running_var.to(dtype) + norm.eps).rsqrt()', 'norm.running_var.to(dtype).rsqrt()',
     'test_reparameterize.py'),
    ('reparameterize.py', 'biases[i] * scale + shift', 'biases[i] + shift', 'test_reparameterize.py'),
    ('reparameterize.py', 'key = self.weight.data_ptr(), version, size', 'key = size', 'test_reparameterize.py'),
    ('reparameterize.py', "return {**super().__getstate__(), '_reordered': None}", 'return self.__dict__',
     'test_reparameterize.py'),
    ('reparameterize.py', 'needed.update(sources[i])', 'pass', 'test_prune.py'),
    # checkpoints
    ('weights.py', "if sha256 != file['sha256']:", 'if False:', 'test_weights.py faults/test_damaged_checkpoints.py'),
    ('weights.py', 'if sha256 != expected:', 'if False:', 'test_hub.py'),
    ('weights.py', "if not filename.endswith('.safetensors'):", 'if False:',
     'test_hub.py faults/test_hostile_configurations.py'),
    ('weights.py', 'for other in others:', 'for other in ():', 'test_weights.py test_connectivity.py'),
    ('weights.py', "tag in ('', checkpoint.tag)", "tag != '-'", 'test_weights.py'),
    ('pretrained.py', 'if differing:', 'if False:', 'test_weights.py'),
    ('delugenet.py', 'tags.appendleft(c.tag)', 'tags.append(c.tag)', 'test_weights.py'),
    ('pretrained.py', 'other_head = model.num_classes != len(', 'other_head = 0 > len(',
     'test_weights.py test_timm_contract.py'),
    ('download.py', 'if sha256 != checkpoint.sha256:', 'if False:', 'faults/test_download.py'),
    ('hub.py', '    validate_repo_id(repo_id)\n', '', 'test_hub.py test_cli.py faults/test_bad_options.py'),
    ('settle.py', 'norm.train()', 'pass', 'test_training_run.py'),
    ('settle.py', 'Random(seed).shuffle(batches.dataset.reader.samples)', 'pass', 'test_training_run.py'),
    ('validate.py', '(ranks < 5).double()', '(ranks <= 5).double()',
     'test_cli.py test_training_run.py test_weights.py'),
    # reports and tools
    ('report.py', '3 * cross_layer_macs + flops', '2 * cross_layer_macs + flops', 'test_counts.py'),
    ('report.py', 'batch_norm=2 * elements', 'batch_norm=elements', 'test_counts.py test_report.py'),
    ('report.py', "uncounted[op] += 1", 'pass', 'test_report.py'),
    ('connectivity.py', 'norm / (max(self.norms[-1])', 'norm / (sum(self.norms[-1])', 'test_connectivity.py'),
    ('training_connectivity.py', 'zip(parameters, saved[', 'zip(reversed(parameters), saved[', 'test_connectivity.py'),
    ('training_connectivity.py', "1 - saved['momentum'] if", '1 if', 'test_connectivity.py'),
    ('delugenet.py', 'stride, dilation = 1, dilation * stride', 'stride, dilation = 1, dilation',
     'test_timm_contract.py'),
    ('delugenet.py', 'calculate_drop_path_rates(drop_path_rate,', 'calculate_drop_path_rates(0.,',
     'test_timm_contract.py'),
    ('delugenet.py', 'module.grad_checkpointing = enable', 'module.grad_checkpointing = False', IMPLEMENTATIONS),
    ('validate.py', 'persistent_workers=False, **config)',
     "persistent_workers=False, **{**config, 'std': config['mean']})", 'test_training_run.py'),
    ('settle.py', '    model.eval().to(', '    model.train().to(', 'test_training_run.py'),
    ('training_run.py', 'split=split,', "split='test',", 'test_training_run.py'),
    ('download.py', 'revision=revision or None', 'revision=None', 'faults/test_download.py'),
    ('prune.py', 'argmax(1, keepdim=True), False)', 'argmin(1, keepdim=True), False)', 'test_prune.py'),
    ('prune.py', 'bias[:, :, -1] += conv.bias.sum(2) - bias.sum(2)', 'pass', 'test_prune.py'),
    ('importance.py', 'x - contribution', 'x + contribution', 'test_importance.py'),
    ('images.py', 'ImageOps.exif_transpose(image, in_place=True)', 'pass', 'test_images.py'),
    ('images.py', "image.size, 'white')", "image.size, 'black')", 'test_images.py'),
    ('predict.py', 'top = min(top, len(labels))', 'top = top', 'test_cli.py test_images.py'),
]


def check(mutations: list[tuple[str, str, str, str]]) -> None:
    """Check that what each mutation replaces occurs once."""
    for file, old, *_ in mutations:
        count = (REPOSITORY / 'timm_deluge' / file).read_text().count(old)
        assert count == 1, f'{file}: {count} times {old!r}'


def first_failure(checkout: Path, tests: str) -> str | None:
    """Run some of the scratch copy's tests until one fails, and get its name."""
    environment = {**os.environ, 'PYTHONPATH': str(checkout), 'CUDA_VISIBLE_DEVICES': ''}  # it reserves more memory
    paths = [f'tests/{name}' for name in tests.split()]
    process = subprocess.run(
        [sys.executable, '-m', 'pytest', '-qx', '-p', 'no:cacheprovider', '--timeout=0', *paths],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if process.returncode == 0:
        return None
    failure = re.search(r'^(?:FAILED|ERROR) tests/(\S+)', process.stdout, re.MULTILINE)
    return failure[1] if failure else f'{tests}: exit status {process.returncode}'


def main() -> int:
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(part in m[0] for part in sys.argv[1:])]
    check(chosen)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    rows = []
    with TemporaryDirectory() as folder:
        checkout = Path(folder, 'checkout')
        shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns('.*', '__pycache__'))
        for tests in dict.fromkeys(mutation[3] for mutation in chosen):
            failure = first_failure(checkout, tests)
            assert failure is None, f'{failure} fails without a mutation'
        for number, (file, old, new, tests) in enumerate(chosen, start=1):
            path = checkout / 'timm_deluge' / file
            source = path.read_text()
            path.write_text(source.replace(old, new))
            caught_by = first_failure(checkout, tests)
            path.write_text(source)
            rows.append({'file': file, 'instead of': old, 'stands': new, 'caught by': caught_by or 'nothing'})
            print(f'{number}/{len(chosen)} {file}: {caught_by or "SURVIVED"}', file=sys.stderr, flush=True)
    print(tabulate(rows, headers='keys', tablefmt='github'))
    return int(any(row['caught by'] == 'nothing' for row in rows))


if __name__ == '__main__':
    sys.exit(main())
