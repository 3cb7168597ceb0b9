"""A CIFAR DelugeNet as the authors released it, written from the description alone, with no code of the package."""
import torch
import torch.nn.functional as F
from torch import nn


class ReleasedCrossLayer(nn.Module):
    """The released form: at every consumer, each input is batch-normalised by itself, then scaled and shifted."""

    def __init__(self, num_layers: int, channels: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels, affine=False) for _ in range(num_layers)])
        self.weight = nn.Parameter(torch.full((num_layers, channels, 1, 1), 1 / num_layers))
        self.bias = nn.Parameter(torch.zeros(num_layers, channels, 1, 1))

    def forward(self, outputs):
        return sum(
            weight * norm(h) + bias
            for h, norm, weight, bias in zip(outputs, self.norms, self.weight, self.bias, strict=True))


class ReleasedComposite(nn.Module):
    def __init__(self, chs: int, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(chs), nn.ReLU(), nn.Conv2d(chs, width, 1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 1, bias=False),
        )

    def forward(self, x):
        return self.body(x)


class ReleasedDelugeNet(nn.Module):

    def __init__(self, depths, widths, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.first = ReleasedComposite(widths[0], widths[0])
        self.blocks, self.cross_layers, self.transitions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            depth -= i == 0
            self.blocks.append(nn.ModuleList([ReleasedComposite(2 * width, width) for _ in range(depth)]))
            self.cross_layers.append(nn.ModuleList([ReleasedCrossLayer(n, 2 * width) for n in range(2, depth + 2)]))
            if i + 1 < len(depths):
                self.transitions.append(nn.Sequential(
                    nn.BatchNorm2d(2 * width), nn.Conv2d(2 * width, 2 * widths[i + 1], 3, 2, 1, bias=False)))
        self.norm = nn.BatchNorm2d(2 * widths[-1])
        self.fc = nn.Linear(2 * widths[-1], num_classes)

    def forward(self, x):
        x = self.first(self.stem(x))
        for i, (layers, cross_layers) in enumerate(zip(self.blocks, self.cross_layers, strict=True)):
            outputs = [x]
            for layer, cross_layer in zip(layers, cross_layers, strict=True):
                outputs.append(layer(x))
                x = cross_layer(outputs)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))
