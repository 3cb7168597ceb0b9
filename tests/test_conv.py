"""Convolutions by matrix products are the convolutions of PyTorch."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from timm_deluge.ops import conv

GEOMETRIES = [
    (kernel, stride, padding, dilation, size)
    for kernel, stride, padding, dilation, size in itertools.product(
        [(3, 3), (1, 3), (2, 5)], [(1, 1), (2, 2), (3, 1)], [(1, 1), (0, 4)], [(1, 1), (2, 1)], [(2, 2), (5, 7)])
    if all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in (0, 1))
]


def example(kernel, size, dtype=torch.float64, n=3, c=4, out=5):
    torch.manual_seed(0)
    x, weight = torch.randn(n, c, *size), torch.randn(out, c, *kernel)
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight)]


def convolution_backward(grad, x, weight, conv_args):
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *conv_args, False, [0, 0], 1, [True, True, False])[:2]


def no_aten(*args):
    raise AssertionError('ATen convolves')


@pytest.mark.parametrize('kernel, stride, padding, dilation, size', GEOMETRIES)
def test_values_and_gradients(monkeypatch, kernel, stride, padding, dilation, size):
    conv_args = stride, padding, dilation
    x, weight = example(kernel, size)
    expected = F.conv2d(x, weight, None, *conv_args)
    grad = torch.randn_like(expected).contiguous(memory_format=torch.channels_last)
    expected_grads = convolution_backward(grad, x, weight, conv_args)

    monkeypatch.setattr(conv, 'MAX_POSITIONS', 1000)
    monkeypatch.setattr(conv.F, 'conv2d', no_aten)
    monkeypatch.setattr(torch.ops.aten, 'convolution_backward', no_aten)
    torch.testing.assert_close(conv.conv2d(x, weight, conv_args), expected)
    for actual, gradient in zip(conv.conv2d_backward(grad, x, weight, conv_args, True), expected_grads):
        torch.testing.assert_close(actual, gradient)
    grad_x, grad_weight = conv.conv2d_backward(grad, x, weight, conv_args, False)
    torch.testing.assert_close(grad_x, expected_grads[0])
    assert grad_weight is None


@pytest.mark.parametrize('stride, padding', [((1, 1), (0, 0)), ((2, 1), (0, 0)), ((1, 1), (1, 1))])
def test_values_and_gradients_of_1x1(stride, padding):
    conv_args = stride, padding, (1, 1)
    x, weight = example((1, 1), (5, 7))
    expected = F.conv2d(x, weight, None, *conv_args)
    grad = torch.randn_like(expected).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv.conv2d(x, weight, conv_args), expected)
    torch.testing.assert_close(
        tuple(conv.conv2d_backward(grad, x, weight, conv_args, True)), convolution_backward(grad, x, weight, conv_args))


@pytest.mark.parametrize('stride', [1, 2])
def test_bfloat16_is_as_exact_as_atens(monkeypatch, stride):
    conv_args = (stride, stride), (1, 1), (1, 1)
    x, weight = example((3, 3), (4, 4), torch.bfloat16, n=16, c=64, out=64)
    grad = torch.randn_like(F.conv2d(x, weight, None, *conv_args))
    exact = F.conv2d(x.double(), weight.double(), None, *conv_args)
    exact = exact, *convolution_backward(grad.double(), x.double(), weight.double(), conv_args)

    def errors():
        found = conv.conv2d(x, weight, conv_args), *conv.conv2d_backward(grad, x, weight, conv_args, True)
        return [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact)]

    monkeypatch.setattr(conv, 'MAX_POSITIONS', 0)
    monkeypatch.setattr(conv, 'MAX_POSITIONS_OF_WEIGHT_GRAD', 0)
    of_aten = errors()
    monkeypatch.setattr(conv, 'MAX_POSITIONS', 1000)
    for error, limit in zip(errors(), of_aten):
        assert error <= 1.1 * limit


@pytest.mark.parametrize('few', [True, False])
def test_patches_are_for_few_positions_in_channels_last(monkeypatch, few):
    size = (2, 2) if few else (5, 5)
    conv_args = (1, 1), (1, 1), (1, 1)
    x, weight = example((3, 3), size, torch.float32)
    calls = []
    patches = conv._patches
    monkeypatch.setattr(conv, '_patches', lambda *args: calls.append(args) or patches(*args))
    conv.conv2d(x, weight, conv_args)
    assert len(calls) == few
    conv.conv2d(x.contiguous(), weight.contiguous(), conv_args)
    assert len(calls) == few


@pytest.mark.parametrize('dtype, has_amx, by_patches, tolerance', [
    (torch.bfloat16, True, True, 1e-2), (torch.bfloat16, False, False, 1e-2), (torch.float32, True, False, 1e-6)])
def test_gradients_of_weights_take_patches_for_longer_with_amx(monkeypatch, dtype, has_amx, by_patches, tolerance):
    conv_args = (1, 1), (1, 1), (1, 1)
    x, weight = example((3, 3), (5, 5), dtype)
    grad = torch.randn_like(F.conv2d(x, weight, None, *conv_args))
    exact = convolution_backward(grad.double(), x.double(), weight.double(), conv_args)
    calls = []
    patches = conv._patches
    monkeypatch.setattr(conv, '_patches', lambda *args: calls.append(args) or patches(*args))
    monkeypatch.setattr(conv, '_has_amx', lambda: has_amx)
    for actual, gradient in zip(conv.conv2d_backward(grad, x, weight, conv_args, True), exact):
        # of the largest: without bfloat16 in hardware, convolutions round their sums, so that small ones differ
        assert (actual.double() - gradient).abs().max() <= tolerance * gradient.abs().max()
    assert bool(calls) == by_patches
    calls.clear()
    assert conv.conv2d_backward(grad, x, weight, conv_args, False)[1] is None
    assert not calls


@pytest.mark.parametrize('dtype, expected', [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)])
def test_autocast_decides_the_dtype(dtype, expected):
    x, weight = example((3, 3), (2, 2), dtype)
    with torch.autocast('cpu', torch.bfloat16):
        y = conv.conv2d(x, weight, ((1, 1), (1, 1), (1, 1)))
        assert y.dtype == F.conv2d(x, weight, padding=1).dtype == expected
