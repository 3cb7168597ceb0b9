"""What exporters and compilers make of a DelugeNet gives the same answers, for batches of any size.

`EXPORTED=delugenet146` takes a whole network, in the place of a small one.
"""
import os
import shutil

import pytest
import timm
import torch
from test_reparameterize import away_from_start
from timm.utils import reparameterize_model

NETWORK = os.environ.get('EXPORTED')


@pytest.fixture(scope='module')
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    size = {} if NETWORK else {'depths': (2, 2), 'widths': (4, 8)}
    return away_from_start(timm.create_model(NETWORK or 'delugenet146', **size)).eval()


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def torch_export(model, path):
    return exported(model).module()


def exported(model) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim('batch')},))


def onnx_dynamo(model, path):
    pytest.importorskip('onnxscript')
    torch.onnx.export(model, (images(2),), str(path / 'model.onnx'), input_names=['x'], dynamo=True,
                      dynamic_shapes=({0: torch.export.Dim('batch')},))
    return onnxruntime(path / 'model.onnx')


def onnx_legacy(model, path):
    pytest.importorskip('onnx')
    torch.onnx.export(model, (images(2),), str(path / 'model.onnx'), input_names=['x'], dynamo=False,
                      dynamic_axes={'x': {0: 'batch'}})
    return onnxruntime(path / 'model.onnx')


def onnxruntime(path):
    session = pytest.importorskip('onnxruntime').InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])


def torch_compile(model, path):
    needs_compiler()
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, dynamic=True)


def aot_inductor(model, path):
    needs_compiler()
    if not hasattr(torch._inductor, 'aoti_load_package'):
        pytest.skip(f'torch {torch.__version__} packages no AOTInductor models')
    package = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(path / 'model.pt2'))
    return torch._inductor.aoti_load_package(package)


def needs_compiler():
    if shutil.which('c++') is None:
        pytest.skip('needs a C++ compiler')


def jit_script(model, path):
    torch.jit.script(model).save(path / 'model.pt')
    return torch.jit.load(path / 'model.pt')


def jit_trace(model, path):
    torch.jit.trace(model, images(2)).save(path / 'model.pt')
    return torch.jit.load(path / 'model.pt')


@pytest.mark.slow
@pytest.mark.parametrize('form', ['as trained', 'reparameterised'])
@pytest.mark.parametrize(
    'export', [torch_export, onnx_dynamo, onnx_legacy, torch_compile, aot_inductor, jit_script, jit_trace],
    ids=['torch.export', 'ONNX', 'ONNX, the old exporter', 'torch.compile(fullgraph=True)', 'AOTInductor',
         'torch.jit.script', 'torch.jit.trace'])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
def test_it_computes_the_same(network, export, form, tmp_path, record_property):
    model = network if form == 'as trained' else reparameterize_model(network)
    with torch.no_grad():
        there = export(model, tmp_path)
        differences = [(there(x) - network(x)).abs().max() / network(x).abs().max() for x in map(images, (3, 2))]
    record_property('difference', f'{max(differences):.0e}')
    assert max(differences) < 1e-4
