"""What the paper printed: parameters, GFLOPs and test errors, to compare ours with."""
from dataclasses import dataclass, field

__all__ = ['PUBLISHED', 'Published', 'published']


@dataclass(frozen=True)
class Published:
    """Printed figures of one network; None or empty where the paper has none.

    Attributes:
        params: Millions of parameters. The CIFAR networks have 100 classes here, except delugenet146, which has 10.
        gflops: FLOPs in billions, in the paper's convention (see `timm_deluge.report`).
        top1_error: Top-1 test error in percent by data set, single crop.
    """
    params: float | None = None
    gflops: float | None = None
    top1_error: dict[str, float] = field(default_factory=dict)


PUBLISHED = {
    'delugenet92': Published(43.4, 11.8, {'imagenet': 22.05}),
    'delugenet104': Published(51.4, 13.2, {'imagenet': 21.86}),
    'delugenet122': Published(63.6, 15.2, {'imagenet': 21.53}),
    'delugenet146': Published(6.69, 1.43, {'cifar10': 3.98, 'cifar100': 19.72}),
    'delugenet218': Published(10.00, 2.13, {'cifar10': 3.88, 'cifar100': 19.31}),
    'wide_delugenet146': Published(20.19, 4.31, {'cifar10': 3.76, 'cifar100': 19.02}),
    'resnetlike146_3x3': Published(6.50, 1.39, {'cifar100': 20.84}),
    'resnetlike218_3x3': Published(9.55, 2.05, {'cifar100': 20.31}),
    'wide_resnetlike146_3x3': Published(19.82, 4.25, {'cifar100': 19.98}),
    'resnetlike146_1x1': Published(6.15, None, {'cifar100': 21.14}),
    'resnetlike218_1x1': Published(9.26, None, {'cifar100': 20.78}),  # 9.21 by every count of ours: a misprint
    'wide_resnetlike146_1x1': Published(18.76, None, {'cifar100': 19.79}),
}


def published(model: str) -> Published:
    """Get the paper's figures for a network.

    Args:
        model: Name in timm's registry.
    """
    return PUBLISHED.get(model, Published())
