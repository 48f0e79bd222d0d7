"""Layers with frozen weights as refinement runs them: the same numbers in less time.

Nobody asks for gradients of the weights, so the gradient of the input is written down: that of a convolution is a
convolution with the mirrored kernel, that of a transposed one is a strided convolution, and GDN works through the
picture in blocks that stay in the cache. A last transposed convolution to three channels becomes an ordinary one to
four times as many at half the resolution, on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..networks.mshyper import FrozenGDN

_ROWS = 1024  # pixels that GDN takes at once


def replace_layers(network: nn.Module) -> None:
    """Put the layers below, in place, wherever there is one for a layer of a frozen network."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.Conv2d) and _keeps_size(layer):
            setattr(network, name, FrozenConv(layer))
        elif isinstance(layer, nn.ConvTranspose2d):
            setattr(network, name, FrozenConvTranspose(layer))
        elif isinstance(layer, FrozenGDN):
            setattr(network, name, BlockwiseGDN(layer))
        elif isinstance(layer, nn.LeakyReLU):
            layer.inplace = True  # what is before it does not need its output
        else:
            replace_layers(layer)


def _keeps_size(layer: nn.Conv2d) -> bool:
    height, width = layer.kernel_size
    odd = height % 2 == width % 2 == 1
    return odd and layer.padding == (height // 2, width // 2) and layer.stride == layer.dilation == (1, 1)


class FrozenConv(nn.Module):
    """`nn.Conv2d` of stride 1 that keeps the size."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = layer.weight, layer.bias, layer.padding
        mirrored = layer.weight.detach().flip(2, 3).transpose(0, 1)
        self.register_buffer("mirrored", mirrored.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return _Conv.apply(x, self.weight, self.bias, self.mirrored, self.padding)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mirrored: Tensor, padding: Any) -> Tensor:
        ctx.mirrored, ctx.padding = mirrored, padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.conv2d(grad, ctx.mirrored, padding=ctx.padding), None, None, None, None


class FrozenConvTranspose(nn.Module):
    """`nn.ConvTranspose2d`."""

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
    """`networks.FrozenGDN`: y = x·n^(±½) with n = β + Γx²."""

    def __init__(self, layer: FrozenGDN) -> None:
        super().__init__()
        self.inverse = layer.inverse
        self.register_buffer("gamma", layer.gamma.flatten(1).contiguous())  # (C, C)
        self.register_buffer("beta", layer.beta)

    def forward(self, x: Tensor) -> Tensor:
        return _GDN.apply(x, self.gamma, self.beta, self.inverse)


class _GDN(torch.autograd.Function):
    """With s = n^(±½) and ∂n = 2Γ·x·∂x: ∂L/∂x = g·s ± x·Γᵀ(g·x·s/n), where s/n is 1/s or s³."""

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
    return [slice(top, top + _ROWS) for top in range(0, x.shape[0], _ROWS)]


# ----------------------------------------------------------------------------------------------------- sub-pixel


def subpixel(g_s: nn.Module) -> nn.Module:
    """The same synthesis without a transposed convolution 5×5 of stride 2 at its end, where it has one."""
    last = list(g_s.children())[-1]
    if isinstance(g_s, nn.Sequential) and isinstance(last, nn.ConvTranspose2d) and last.kernel_size == (5, 5):
        return SubpixelSynthesis(g_s[:-1], last)
    return g_s


class SubpixelSynthesis(nn.Module):
    """Layers and a transposed convolution 5×5 of stride 2, whose four phases are channels of a convolution 3×3."""

    shuffle = 2

    def __init__(self, layers: nn.Sequential, last: nn.ConvTranspose2d) -> None:
        super().__init__()
        C, colours = last.in_channels, last.out_channels
        self.layers = layers
        self.pixels = nn.Conv2d(C, 4 * colours, 3, padding=1).to(last.weight.device).requires_grad_(False)
        assert self.pixels.bias is not None
        assert last.bias is not None
        taps = F.pad(last.weight, (0, 1, 0, 1)).view(C, colours, 3, 2, 3, 2)  # tap 2i + p meets the pixel of phase p
        phases = taps.flip(2, 4).permute(1, 3, 5, 0, 2, 4)  # (colours, 2, 2, C, 3, 3)
        self.pixels.weight.copy_(phases.reshape(4 * colours, C, 3, 3))
        self.pixels.bias.copy_(last.bias.repeat_interleave(4))

    def unshuffled(self, y_hat: Tensor) -> Tensor:
        """The pixels as `F.pixel_unshuffle` would sort them, (B, 12, H/2, W/2)."""
        x: Tensor = self.pixels(self.layers(y_hat))
        return x

    def forward(self, y_hat: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unshuffled(y_hat), self.shuffle)
