"""A DelugeNet as the encoder of segmentation_models_pytorch: a U-Net or a DeepLabV3+ learns to find discs.

    pip install '.[examples]'
    python examples/segmentation.py

Any DelugeNet for large images will do: `tu-delugenet92`, `tu-delugenet104`, `tu-delugenet122`. The CIFAR networks
will not: their feature maps have strides 1, 1, 2 and 4, and these decoders want every map half the size of the one
before.
"""
import segmentation_models_pytorch as smp
import torch

import timm_deluge  # noqa: F401 registers the encoders


def draw_discs(num_images: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a bright disc on noise in each image.

    Returns:
        Images ``[N, 3, size, size]`` and masks ``[N, 1, size, size]``.
    """
    x, y, radius = (torch.rand(num_images, 1, 1, generator=generator) * size for _ in range(3))
    grid = torch.arange(size)
    masks = ((grid - x) ** 2 + (grid[:, None] - y) ** 2 < (radius / 2 + 4) ** 2).float()[:, None]
    return torch.randn(num_images, 3, size, size, generator=generator) + 2 * masks, masks


def train(architecture: str = 'unet', encoder: str = 'tu-delugenet122', steps: int = 20, size: int = 96) -> list[float]:
    """Train a segmentation network from the pretrained encoder.

    Returns:
        The loss of each step.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = smp.create_model(architecture, encoder_name=encoder, encoder_weights=True, classes=1)
    loss_fn = smp.losses.DiceLoss('binary')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        images, masks = draw_discs(4, size, generator)
        loss = loss_fn(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == '__main__':
    for architecture in ('unet', 'deeplabv3plus'):
        losses = train(architecture)
        print(f'{architecture}: Dice loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {len(losses)} steps')
