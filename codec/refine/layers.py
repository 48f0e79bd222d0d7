"""Layers with frozen weights and closed-form backward passes: the results of torch's own layers in less time.

Only the gradient of the input is needed, and it has a closed form: for a convolution it is a convolution with the
flipped kernel, for a transposed convolution a strided convolution. GDN is computed in blocks of pixels that fit into
the cache. On every device, a last transposed convolution to three channels becomes a convolution to twelve channels at
half the resolution, followed by a pixel shuffle.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..networks.mshyper import FrozenGDN

_BLOCK = 1024  # pixels that GDN works on at a time


def replace_layers(network: nn.Module) -> None:
    """Replace the layers of a frozen network, in place, by those of this module."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.Conv2d) and _keeps_size(layer):
            setattr(network, name, FrozenConv(layer))
        elif isinstance(layer, nn.ConvTranspose2d):
            setattr(network, name, FrozenConvTranspose(layer))
        elif isinstance(layer, FrozenGDN):
            setattr(network, name, BlockwiseGDN(layer))
        elif isinstance(layer, nn.LeakyReLU):
            layer.inplace = True  # the backward of the layer before it does not read its output
        else:
            replace_layers(layer)


def _keeps_size(layer: nn.Conv2d) -> bool:
    height, width = layer.kernel_size
    odd = height % 2 == width % 2 == 1
    same = odd and layer.padding == (height // 2, width // 2) and layer.stride == layer.dilation == (1, 1)
    return same and layer.groups == 1


class FrozenConv(nn.Module):
    """`nn.Conv2d` of stride 1 and "same" padding with frozen weights."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = layer.weight, layer.bias, layer.padding
        flipped = layer.weight.detach().flip(2, 3).transpose(0, 1)
        self.register_buffer("flipped", flipped.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return _Conv.apply(x, self.weight, self.bias, self.flipped, self.padding)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, flipped: Tensor, padding: Any) -> Tensor:
        ctx.flipped, ctx.padding = flipped, padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.conv2d(grad, ctx.flipped, padding=ctx.padding), None, None, None, None


class FrozenConvTranspose(nn.Module):
    """`nn.ConvTranspose2d` with frozen weights."""

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding, self.output_padding = layer.stride, layer.padding, layer.output_padding

    def forward(self, x: Tensor) -> Tensor:
        return _ConvTranspose.apply(x, self.weight, self.bias, self.stride, self.padding, self.output_padding)


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, output_padding: Any
    ) -> Tensor:
        ctx.weight, ctx.stride, ctx.padding = weight, stride, padding
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.conv2d(grad, ctx.weight, stride=ctx.stride, padding=ctx.padding), None, None, None, None, None


class BlockwiseGDN(nn.Module):
    """`FrozenGDN` in blocks of pixels: y = x·n^(±½) with n = β + Γx², + for the inverse (Ballé et al. 2016)."""

    def __init__(self, layer: FrozenGDN) -> None:
        super().__init__()
        self.inverse = layer.inverse
        self.register_buffer("gamma", layer.gamma.flatten(1).contiguous())  # (C, C)
        self.register_buffer("beta", layer.beta)

    def forward(self, x: Tensor) -> Tensor:
        return _GDN.apply(x, self.gamma, self.beta, self.inverse)


class _GDN(torch.autograd.Function):
    """Closed-form backward of GDN, g = ∂L/∂y and s = n^(±½): ∂L/∂x = g·s ± x·Γᵀ(g·x·s/n), where s/n is 1/s or s³."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, inverse: bool) -> Tensor:
        B, C, H, W = x.shape
        x = x.permute(0, 2, 3, 1).reshape(-1, C)
        y, s = torch.empty_like(x), torch.empty_like(x)
        for part in _blocks(x):
            torch.addmm(beta, x[part].square(), gamma.T, out=s[part])
            _ = s[part].sqrt_() if inverse else s[part].rsqrt_()
            torch.mul(x[part], s[part], out=y[part])
        ctx.save_for_backward(x, s, gamma)
        ctx.inverse = inverse
        return y.view(B, H, W, C).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, gamma = ctx.saved_tensors
        B, C, H, W = grad.shape
        grad = grad.permute(0, 2, 3, 1).reshape(-1, C)
        grad_x = torch.empty_like(x)
        for part in _blocks(x):
            through = grad[part] * x[part]
            through = through.div_(s[part]) if ctx.inverse else through.mul_(s[part].pow(3)).neg_()
            torch.mul(grad[part], s[part], out=grad_x[part]).addcmul_(x[part], through @ gamma)
        return grad_x.view(B, H, W, C).permute(0, 3, 1, 2), None, None, None


def _blocks(x: Tensor) -> list[slice]:
    return [slice(top, top + _BLOCK) for top in range(0, x.shape[0], _BLOCK)]


# -------------------------------------------------------------------------------------- sub-pixel convolution


def subpixel(g_s: nn.Module) -> nn.Module:
    """g_s with a last 5×5 transposed convolution of stride 2 replaced by a sub-pixel convolution; else g_s itself."""
    last = list(g_s.children())[-1]
    if isinstance(g_s, nn.Sequential) and isinstance(last, nn.ConvTranspose2d) and last.kernel_size == (5, 5):
        return SubpixelSynthesis(g_s[:-1], last)
    return g_s


class SubpixelSynthesis(nn.Module):
    """`layers` and a 5×5 transposed convolution of stride 2, as a 3×3 convolution and a pixel shuffle.

    Each of the four phases (output row and column, even or odd) is a group of channels of the convolution.
    """

    shuffle = 2

    def __init__(self, layers: nn.Sequential, last: nn.ConvTranspose2d) -> None:
        super().__init__()
        C, colours = last.in_channels, last.out_channels
        self.layers = layers
        self.pixels = nn.Conv2d(C, 4 * colours, 3, padding=1).to(last.weight.device).requires_grad_(False)
        assert self.pixels.bias is not None
        assert last.bias is not None
        taps = F.pad(last.weight, (0, 1, 0, 1)).view(C, colours, 3, 2, 3, 2)  # tap 2i + p is of phase p
        phases = taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4)  # (colours, 2, 2, C, 3, 3)
        self.pixels.weight.copy_(phases.reshape(4 * colours, C, 3, 3))
        self.pixels.bias.copy_(last.bias.repeat_interleave(4))

    def unshuffled(self, y_hat: Tensor) -> Tensor:
        """x̂ before the pixel shuffle, (B, 12, H/2, W/2): `F.pixel_unshuffle` of the result of `forward`."""
        x: Tensor = self.pixels(self.layers(y_hat))
        return x

    def forward(self, y_hat: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unshuffled(y_hat), self.shuffle)
