"""The page of `timm-deluge demo`: what a network sees in a picture and where, also without some connections."""
from functools import cache, lru_cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import gradio as gr
import numpy as np
import timm
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.utils import reparameterize_model
from torch import nn

from .connectivity import block_connectivity, draw_connectivity, read_state_dict
from .images import ImageError, read_image
from .predict import EXAMPLE_IMAGE, class_labels
from .prune import find_cross_layers, prune_connections
from .weights import find_checkpoint, list_checkpoints

__all__ = ['answer', 'create_page', 'grad_cam', 'launch_page', 'lay_over']

MAX_FILE_SIZE = '20mb'
MAX_PIXELS = 50_000_000  # of a picture: 200 MB once it is decoded, and as much for each step of its conversion
DAY = 24 * 3600  # seconds: once a day, pictures that are older are deleted
MAX_FRACTION = 0.8  # of the connections can be removed: each sum keeps at least one
OVERLAY_SIZE = 320
ROUNDS = 3
TITLE = 'timm-deluge: look into a DelugeNet'
INTRODUCTION = f"""# {TITLE}

Every layer of a [DelugeNet](https://arxiv.org/abs/1611.05552) sees all earlier layers of its block, each through one
learned weight for each channel: a connection. Drop a picture, and take connections away."""


@cache
def _network(name: str) -> Any:
    return timm.create_model(name, pretrained=True).eval().to(memory_format=torch.channels_last)


@lru_cache(maxsize=4)
def _fast(name: str, fraction: float) -> tuple[Any, int]:
    """Get a network without its weakest connections, reparameterised, and the number of remaining connections."""
    pruned = prune_connections(_network(name), fraction)
    num_connections = sum(len(conv.sources) for conv in find_cross_layers(pruned).values())
    return reparameterize_model(pruned, inplace=True), num_connections


def grad_cam(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Locate the evidence for the most probable class by Grad-CAM (https://arxiv.org/abs/1610.02391, Eq. 1 and 2).

    Args:
        model: A DelugeNet in eval mode.
        x: An image ``[1, in_chans, H, W]``.

    Returns:
        ``[h, w]``, the size of the last block's output, with values from 0 to 1.
    """
    with torch.enable_grad():
        features = model.forward_features(x)
        (gradient,) = torch.autograd.grad(model.forward_head(features).max(), features)
    heat = (gradient.mean((2, 3), keepdim=True) * features).sum(1)[0].relu().detach()
    return heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)


def lay_over(heat: torch.Tensor, picture: Image.Image, crop_pct: float) -> Image.Image:
    """Lay a heat map over the part of a picture that the network was shown.

    Args:
        heat: ``[h, w]``, with values from 0 to 1.
        picture: The whole picture.
        crop_pct: The network's, see timm.

    Returns:
        The mean of that part, as a square, and the heat in colours.
    """
    shown = ImageOps.fit(picture, (OVERLAY_SIZE, OVERLAY_SIZE), bleed=(1 - crop_pct) / 2)
    smooth = Image.fromarray(heat.numpy()).resize(shown.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(colormaps['viridis'](np.asarray(smooth), bytes=True)).convert('RGB')
    return Image.blend(shown, colours, 0.5)


@torch.inference_mode()
def _time_together(networks: list[nn.Module], x: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
    """Get the networks' probabilities, and each one's median time in milliseconds, measured in turns."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(ROUNDS):
        logits = []
        for network, taken in zip(networks, times):
            start = perf_counter()
            logits.append(network(x)[0])
            taken.append(1000 * (perf_counter() - start))
    return [values.softmax(-1) for values in logits], [median(taken) for taken in times]


def answer(
        path: str | None,
        name: str,
        percent: float,
) -> tuple[dict[str, float] | None, Image.Image | None, dict[str, float] | None, str]:
    """Classify a picture with a network, and with the same network without its weakest connections.

    Args:
        path: The picture's file; None if there is none yet.
        name: The checkpoint, `<model>.<tag>`.
        percent: Percentage of the connections to remove, the weakest by norm.

    Returns:
        Each class's probability, the picture with its Grad-CAM map, each class's probability without the connections,
        and a text that says how much of the network is left and how long it takes.

    Raises:
        gradio.Error: If the picture cannot be read.
    """
    if path is None:
        return None, None, None, ''
    try:
        picture = read_image(Path(path))
    except ImageError as error:
        raise gr.Error(f'This picture cannot be used: {error}', print_exception=False) from None
    model = _network(name)
    (whole, num_connections), (rest, num_left) = _fast(name, 0.), _fast(name, percent / 100)
    config = resolve_data_config(model=model)
    x = create_transform(**config)(picture)[None].contiguous(memory_format=torch.channels_last)
    probabilities, times = _time_together([whole, rest], x)
    labels = [label.replace('_', ' ') for label in class_labels(find_checkpoint(name))]
    before, after = (dict(zip(labels, values.tolist())) for values in probabilities)
    overlay = lay_over(grad_cam(model, x), picture, config['crop_pct'])
    layers = [sum(len(stage.layers) for stage in network.stages) for network in (whole, rest)]
    facts = (f'{num_left} of {num_connections} connections and {layers[1]} of {layers[0]} layers are left. An image '
             f'takes {times[1]:.1f} ms here, instead of {times[0]:.1f} ms.')
    return before, overlay, after, facts


@lru_cache(maxsize=8)
def _draw(name: str) -> Figure:
    return draw_connectivity(block_connectivity(read_state_dict(name)), name)


def create_page(default: str) -> gr.Blocks:
    """Make the page, and load all networks that are on this machine.

    Args:
        default: The checkpoint that is chosen at first, `<model>.<tag>`.

    Raises:
        CheckpointError: If there is no such checkpoint, or the file of any checkpoint is not what the manifest says.
    """
    answer(str(EXAMPLE_IMAGE), default, 10)  # may download it
    names = [c.name for c in list_checkpoints() if c.files and c.has_connections]
    for name in names:
        _network(name)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(DAY, DAY)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    label='Picture', type='filepath', image_mode=None, sources=['upload', 'clipboard'], height=320)
                gr.Examples([[str(EXAMPLE_IMAGE)]], [picture], label='Example')
                network = gr.Dropdown(names, value=default, label='Network')
            with gr.Column():
                classes = gr.Label(label='What it sees', num_top_classes=5)
                overlay = gr.Image(label='Where (Grad-CAM)', interactive=False, height=320)
            with gr.Column():
                percent = gr.Slider(
                    0, 100 * MAX_FRACTION, value=10, step=5, label='% of the connections removed, the weakest by norm')
                without = gr.Label(label='What it sees without them', num_top_classes=5)
                facts = gr.Markdown()
        connections = gr.Plot(_draw(default), label='How strong each connection is')
        gr.on(
            [picture.change, network.change, percent.release], answer, [picture, network, percent],
            [classes, overlay, without, facts])
        network.change(_draw, network, connections)
    return page


def launch_page(page: gr.Blocks, host: str, port: int, open_browser: bool) -> None:
    """Serve a page until interrupted, without loading anything from the internet.

    Args:
        page: See `create_page`.
        host: Address to listen at.
        port: Port to listen at.
        open_browser: Whether to show it in the browser.

    Raises:
        OSError: If the port is not free.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses more than twice this limit
    page.launch(
        server_name=host, server_port=port, inbrowser=open_browser, share=False, ssr_mode=False, footer_links=[],
        show_error=True, max_file_size=MAX_FILE_SIZE,
        theme=gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace']))
