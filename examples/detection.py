"""A DelugeNet under torchvision's Faster R-CNN, with a feature pyramid and frozen batch normalisation.

    python examples/detection.py
"""
from collections import OrderedDict

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import timm_deluge  # noqa: F401 registers the models


class PyramidBackbone(nn.Module):
    """Feature maps of a timm model, from stride 4 on, as a pyramid of maps with `out_channels` each."""

    def __init__(self, name: str, pretrained: bool = True, out_channels: int = 256):
        super().__init__()
        body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(1, 2, 3, 4))
        self.body = freeze_batch_norm_2d(body)
        self.pyramid = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return self.pyramid(OrderedDict((str(i), features) for i, features in enumerate(self.body(x))))


def create_detector(name: str = 'delugenet122', num_classes: int = 2, pretrained: bool = True) -> FasterRCNN:
    """Create a detector; class 0 is the background."""
    return FasterRCNN(PyramidBackbone(name, pretrained), num_classes, min_size=128, max_size=256)


if __name__ == '__main__':
    torch.manual_seed(0)
    detector = create_detector()
    optimizer = torch.optim.SGD((p for p in detector.parameters() if p.requires_grad), lr=0.005, momentum=0.9)
    image = torch.rand(3, 128, 128) / 2
    image[:, 30:90, 40:110] += 0.5
    target = {'boxes': torch.tensor([[40., 30., 110., 90.]]), 'labels': torch.tensor([1])}
    for step in range(10):
        losses = detector([image], [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        print(f'step {step}: ' + ', '.join(f'{name} {loss.item():.3f}' for name, loss in losses.items()))
