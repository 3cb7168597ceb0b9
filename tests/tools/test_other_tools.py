"""Tools that take a network of timm take a DelugeNet, untouched.

Each test is of one tool, and skipped where that is not installed; `python reports/tools.py` installs them one by one.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from forked import Forked
from PIL import Image
from timm_scripts import SCRIPTS, needs_scripts

import timm_deluge
from timm_deluge.cli import EXAMPLE_IMAGE
from timm_deluge.prune import save_pruned
from timm_deluge.report import create_report

REPO = 'somebody/delugenet146'


@pytest.fixture
def images(tmp_path) -> Path:
    """Sixteen pictures of two colours, in a folder for each."""
    rng = np.random.default_rng(0)
    for i in range(16):
        noise = rng.integers(0, 100, (32, 32, 3), dtype=np.uint8)
        noise[..., 2 * (i % 2)] += 150
        path = tmp_path / 'images' / ('red', 'blue')[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    return tmp_path / 'images'


def succeeds(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_transformers_loads_from_the_hub(call, publish):
    """`AutoModelForImageClassification.from_pretrained` of a published checkpoint, with its classes and features"""
    pytest.importorskip('transformers')
    succeeds(publish())
    printed = succeeds(call(f"""
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained('{REPO}', dtype='float32').eval()
x = AutoImageProcessor.from_pretrained('{REPO}')(torch.rand(3, 40, 40))['pixel_values']
expected = timm.create_model('hf-hub:{REPO}', pretrained=True).eval()
features = AutoModel.from_pretrained('{REPO}', dtype='float32').eval()(x).pooler_output
with torch.no_grad():
    torch.testing.assert_close(model(x).logits, expected(x))
    torch.testing.assert_close(features, expected.forward_head(expected.forward_features(x), pre_logits=True))
print(model.config.id2label[7], *x.shape)
"""))
    assert printed.split() == ['class_7', '1', '3', '32', '32']


def test_transformers_trains(call, publish):
    """`Trainer`, two steps from a published checkpoint, saved and loaded"""
    pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    succeeds(publish())
    printed = succeeds(call(f"""
import tempfile
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
model = AutoModelForImageClassification.from_pretrained('{REPO}', num_labels=3, ignore_mismatched_sizes=True)
assert next(model.parameters()).dtype == torch.float16  # transformers takes the file's
data = [dict(pixel_values=torch.randn(3, 32, 32), labels=i % 3) for i in range(8)]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(folder)
    again = AutoModelForImageClassification.from_pretrained(folder).eval()
x = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    torch.testing.assert_close(again(x).logits, model.eval()(x).logits)
print(again(x).logits.shape[1])
"""))
    assert printed.split()[-1] == '3'


def test_timm_loads_a_folder(tmp_path):
    """`create_model('local-dir:…', pretrained=True)` of a saved network"""
    torch.manual_seed(0)
    pruned = timm_deluge.prune_connections(timm.create_model('delugenet146').eval(), 0.5, 'random')
    save_pruned(pruned, tmp_path / 'pruned')
    loaded = timm.create_model(f'local-dir:{tmp_path / "pruned"}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x), pruned(x))


def test_timm_without_the_package_names_the_network(server, publish, tmp_path):
    """Without `import timm_deluge`, timm refuses an `hf-hub:` name: it does not know the network"""
    succeeds(publish())
    code = f"import timm; timm.create_model('hf-hub:{REPO}', pretrained=True)"
    process = Forked(code, (), {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HUB_OFFLINE': '0',
                                'HF_HOME': str(tmp_path / 'cache')}, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1 and 'Unknown model (delugenet146)' in errors
    assert 'import timm, timm_deluge' in server.repos[REPO]['README.md'].decode()


def test_fastai_learns(images):
    """`vision_learner(dls, 'delugenet146')`, one epoch with a frozen body, one with all of it"""
    vision = pytest.importorskip('fastai.vision.all')
    dls = vision.ImageDataLoaders.from_folder(images, valid_pct=0.25, seed=0, bs=4, device='cpu', num_workers=0)
    learner = vision.vision_learner(dls, 'delugenet146', pretrained=False, metrics=vision.accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(1)
    assert all(np.isfinite(learner.recorder.values).ravel())
    assert learner.predict(next(images.glob('red/*')))[0] in ('red', 'blue')


def test_lightning_trains_in_two_processes(tmp_path):
    """`Trainer(devices=2, strategy='ddp')` on CPUs in bf16-mixed: both processes end with the same weights"""
    pytest.importorskip('lightning')
    script = tmp_path / 'train.py'
    script.write_text("""
import sys, lightning, timm, timm_deluge, torch

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model('delugenet146', num_classes=3)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

lightning.seed_everything(0)
data = torch.utils.data.TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 3)
trainer = lightning.Trainer(
    accelerator='cpu', devices=2, strategy='ddp', precision='bf16-mixed', max_steps=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False)
module = Module()
before = sum(float(p.abs().sum()) for p in module.parameters())
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
sums = trainer.strategy.all_gather(torch.stack([p.detach().double().abs().sum() for p in module.parameters()]))
assert sums.shape[0] == 2 and torch.equal(sums[0], sums[1]) and abs(float(sums[0].sum()) - before) > 1e-6
sys.stdout.write(f'trained by process {trainer.global_rank}\\n')
""")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert sorted(line for line in succeeds(result).splitlines() if line.startswith('trained')) == [
        'trained by process 0', 'trained by process 1']


def test_grad_cam_looks_at_a_block():
    """`GradCAM` at the end of the last block: a map of the image's size"""
    grad_cam = pytest.importorskip('pytorch_grad_cam')
    torch.manual_seed(0)
    model = timm.create_model('delugenet146').eval()
    with grad_cam.GradCAM(model, target_layers=[model.stages[-1]]) as cam:
        heat = cam(torch.randn(2, 3, 32, 32), targets=None)
    assert heat.shape == (2, 32, 32) and np.isfinite(heat).all() and 0 <= heat.min() < heat.max() <= 1


def test_torchinfo_counts():
    """`summary`: the parameters and multiply-adds that `timm-deluge report` counts in convolutions and classifier"""
    torchinfo = pytest.importorskip('torchinfo')
    model = timm.create_model('delugenet146').eval()
    summary = torchinfo.summary(model, (1, 3, 32, 32), verbose=0)
    report = create_report('delugenet146')
    assert summary.total_params == report.params
    assert summary.total_mult_adds == pytest.approx(report.macs, rel=0.03)


def test_torchao_quantises():
    """`quantize_(model, Int8WeightOnlyConfig())`: its classifier, the only linear layer, in int8"""
    quantization = pytest.importorskip('torchao.quantization')
    model = timm.create_model('delugenet146', pretrained=True).eval()
    x = torch.from_numpy(np.array(Image.open(EXAMPLE_IMAGE).convert('RGB').resize((32, 32)))).permute(2, 0, 1)
    with torch.no_grad():
        expected = model(x[None] / 255)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        actual = model(x[None] / 255)
    assert 'int8' in str(type(model.head.fc.weight)).lower()
    assert 0 < (actual - expected).norm() / expected.norm() < 0.02


def run_script(name: str, *arguments) -> str:
    command = [sys.executable, '-m', 'timm_deluge.run', str(Path(SCRIPTS, name)), *map(str, arguments)]
    return succeeds(subprocess.run(command, capture_output=True, text=True))


@needs_scripts
def test_timm_validate(images):
    """timm's `validate.py`"""
    for i in range(2, 100):
        (images / f'{i}').mkdir()
    found = json.loads(run_script(
        'validate.py', '--model', 'delugenet146', '--pretrained', '--data-dir', images, '--device', 'cpu',
        '--batch-size', 4, '--workers', 1).partition('--result')[2])
    assert found['param_count'] == 6.71 and 0 <= found['top1'] <= 100


@needs_scripts
def test_timm_inference(images, tmp_path):
    """timm's `inference.py`: five classes of each image"""
    pytest.importorskip('pandas')
    run_script('inference.py', '--model', 'delugenet146', '--pretrained', '--data-dir', images, '--device', 'cpu',
               '--batch-size', 4, '--workers', 1, '--results-dir', tmp_path, '--results-file', 'found.csv', '--topk', 5)
    assert len((tmp_path / 'found.csv').read_text().splitlines()) == 17


@needs_scripts
def test_timm_benchmark():
    """timm's `benchmark.py`: images a second, inference and training"""
    found = json.loads(run_script(
        'benchmark.py', '--model', 'delugenet146', '--device', 'cpu', '--batch-size', 2, '--num-bench-iter', 5,
        '--num-warm-iter', 1, '--bench', 'both').partition('--result')[2])
    assert found['infer_samples_per_sec'] > 0 and found['train_samples_per_sec'] > 0 and found['param_count'] == 6.71


@needs_scripts
def test_timm_onnx_export(tmp_path):
    """timm's `onnx_export.py`, checked by itself"""
    pytest.importorskip('onnxruntime')
    run_script('onnx_export.py', tmp_path / 'model.onnx', '--model', 'delugenet146', '--batch-size', 2,
               '--check-forward')
    assert (tmp_path / 'model.onnx').stat().st_size > 1e5


@needs_scripts
def test_timm_clean_checkpoint(tmp_path):
    """timm's `clean_checkpoint.py`: of train.py's checkpoint, the weights alone, which load"""
    model = timm.create_model('delugenet146')
    torch.save({'state_dict': model.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
    run_script('clean_checkpoint.py', '--checkpoint', tmp_path / 'last.pth.tar', '--output', tmp_path / 'clean',
               '--safetensors', '--no-hash')
    (file,) = tmp_path.glob('clean*')
    loaded = timm.create_model('delugenet146', checkpoint_path=str(file))
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)
