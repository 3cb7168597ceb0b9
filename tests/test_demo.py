"""The page's answers are the networks' own, bad pictures are refused, and it works in a browser without internet."""
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from shutil import which

import pytest
import timm
import torch
from PIL import Image
from test_cli import invoke

gr = pytest.importorskip('gradio')
gradio_client = pytest.importorskip('gradio_client')

from timm_deluge import prune_connections  # noqa: E402
from timm_deluge.demo import MAX_PIXELS, answer, create_page, grad_cam, launch_page, lay_over  # noqa: E402
from timm_deluge.predict import EXAMPLE_IMAGE, predict  # noqa: E402
from timm_deluge.weights import find_checkpoint  # noqa: E402

NAME = 'delugenet146.muon8_cifar100'


def test_the_answer_is_the_networks():
    whole, overlay, left, facts = answer(str(EXAMPLE_IMAGE), NAME, 10)
    (expected,) = predict([EXAMPLE_IMAGE], NAME)
    best = sorted(whole, key=whole.get, reverse=True)[:5]
    assert best == [name.replace('_', ' ') for name, _ in expected.classes]
    assert [whole[name] for name in best] == pytest.approx([value for _, value in expected.classes], abs=1e-4)
    assert overlay.size == (320, 320)

    model = timm.create_model(NAME, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    x = transform(Image.open(EXAMPLE_IMAGE))[None]
    probabilities = prune_connections(model, 0.1)(x)[0].softmax(-1)
    assert list(left.values()) == pytest.approx(probabilities.tolist(), abs=1e-4)
    assert facts.startswith('460 of 511 connections and ') and ' of 47 layers are left' in facts


def test_only_networks_on_this_machine_are_offered(monkeypatch):
    here = find_checkpoint(NAME)
    elsewhere = replace(here, tag='elsewhere_cifar100', file='elsewhere.safetensors')
    monkeypatch.setattr('timm_deluge.demo.list_checkpoints', lambda: [here, elsewhere])
    (dropdown,) = (block for block in create_page(NAME).blocks.values() if isinstance(block, gr.Dropdown))
    assert [name for name, _ in dropdown.choices] == [NAME]


def test_without_a_picture_there_is_no_answer():
    assert answer(None, NAME, 10) == (None, None, None, '')


def test_grad_cam_by_hand():
    """Of a linear classifier of averages, the gradients are its weights."""
    torch.manual_seed(0)
    model = timm.create_model('delugenet146', num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    features = model.forward_features(x)
    weight = model.head.fc.weight[model(x)[0].argmax()]
    expected = torch.einsum('c,chw->hw', weight, features[0]).relu()
    torch.testing.assert_close(grad_cam(model, x), (expected / expected.max()).detach(), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_heat_is_laid_over_the_picture():
    heat = torch.zeros(8, 8)
    heat[:4] = 1
    overlay = lay_over(heat, Image.new('RGB', (320, 320), 'white'), 1.)
    for y, colour in (10, (253, 231, 37)), (310, (68, 1, 84)):  # viridis' brightest and darkest
        assert overlay.getpixel((160, y)) == pytest.approx([(255 + value) / 2 for value in colour], abs=3)


@pytest.mark.parametrize('content, message', [(b'', 'the file is empty'), (b'GIF89a', 'not an image|corrupt')])
def test_a_bad_picture_is_refused(tmp_path, content, message):
    (tmp_path / 'bad.png').write_bytes(content)
    with pytest.raises(gr.Error, match=f'This picture cannot be used: .*({message})'):
        answer(str(tmp_path / 'bad.png'), NAME, 10)


def test_a_huge_picture_is_refused(tmp_path, monkeypatch):
    class Page:
        def launch(self, **options):
            self.options = options

    page = Page()
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
    launch_page(page, 'localhost', 7000, True)
    options = {'server_name': 'localhost', 'server_port': 7000, 'inbrowser': True, 'share': False}
    assert options.items() <= page.options.items()
    side = int(MAX_PIXELS ** 0.5) + 1
    Image.new('1', (side, side)).save(tmp_path / 'huge.png')
    with pytest.raises(gr.Error, match='50,000,000 pixels'):
        answer(str(tmp_path / 'huge.png'), NAME, 10)


def test_options_reach_the_page(monkeypatch):
    given = []
    monkeypatch.setattr('timm_deluge.demo.create_page', lambda name: name)
    monkeypatch.setattr('timm_deluge.demo.launch_page', lambda *args: given.append(args))
    assert invoke('demo', '--model', NAME, '--host', '0.0.0.0', '--port', '7000', '--open').exit_code == 0
    assert given == [(NAME, '0.0.0.0', 7000, True)]


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, 'timm_deluge.demo')
    monkeypatch.setitem(sys.modules, 'gradio', None)
    result = invoke('demo')
    assert result.exit_code == 2 and "pip install '.[demo]'" in result.stderr


def test_a_port_that_is_taken(monkeypatch):
    with gr.Blocks() as page:
        gr.Markdown('empty')
    monkeypatch.setattr('timm_deluge.demo.create_page', lambda default: page)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = invoke('demo', '--port', port)
    assert result.exit_code == 2 and f'cannot listen at 127.0.0.1:{port}: choose another --port' in result.stderr


def test_an_unknown_network():
    result = invoke('demo', '--model', 'delugenet146.nonsense')
    assert result.exit_code == 2 and "no checkpoint with the tag 'nonsense'" in result.stderr


@pytest.fixture(scope='module')
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp('demo') / 'log'
    with log.open('w') as output:
        process = subprocess.Popen(
            [sys.executable, '-m', 'timm_deluge.cli', 'demo', '--port', str(port)], stdout=output, stderr=output,
            env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    try:
        while 'Running on' not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f'http://127.0.0.1:{port}'
    finally:
        process.terminate()  # an interrupt is ignored by what a shell started in the background
        process.wait()


@pytest.mark.slow
def test_uploads_are_limited(url):
    boundary = b'boundary'
    body = b'--' + boundary + (b'\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
                               + bytes(21_000_000) + b'\r\n--' + boundary + b'--\r\n')
    request = urllib.request.Request(
        f'{url}/gradio_api/upload', body, {'Content-Type': 'multipart/form-data; boundary=boundary'})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 413


@pytest.mark.slow
@pytest.mark.parametrize('content', [b'', b'text'])
def test_the_page_says_why_it_refuses_a_picture(url, content, tmp_path):
    (tmp_path / 'a.png').write_bytes(content)
    client = gradio_client.Client(url, verbose=False)
    with pytest.raises(gradio_client.exceptions.AppError, match='cannot identify image file'):
        client.predict(gradio_client.handle_file(tmp_path / 'a.png'), NAME, 10, api_name='/answer')


@pytest.mark.slow
def test_in_a_browser_without_internet(url, tmp_path):
    playwright = pytest.importorskip('playwright.sync_api')
    chromium = which('chromium')
    if not chromium:
        pytest.skip('no chromium is installed')
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1280, 'height': 1240})
        hosts: set[str] = set()
        page.on('request', lambda request: hosts.add(request.url.split('/')[2]))
        page.goto(url)
        page.set_input_files('input[type=file]', EXAMPLE_IMAGE)
        page.get_by_text('460 of 511 connections').wait_for()
        assert page.locator('h2', has_text='rocket').count()
        page.goto(url)
        (tmp_path / 'text.png').write_text('no picture')
        page.set_input_files('input[type=file]', tmp_path / 'text.png')
        page.get_by_text('cannot identify image file').first.wait_for()
        browser.close()
    assert {host for host in hosts if host} == {url.split('/')[2]}  # blobs have none
