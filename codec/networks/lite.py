"""`lite`, for CPUs: transforms that are initialized to a 16×16 block DCT, and a narrow mean-scale hyperprior."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import Architecture
from .transforms import Networks


class _BlockOverlapAdd(torch.autograd.Function):
    """x (B, H, W, M) @ weight (M, 12·12·C) gives 12×12 patches, summed at stride 8; + bias (C,) → (B, 8H, 8W, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        B, H, W, M = x.shape
        C = weight.shape[-1]
        columns = (x.reshape(-1, M) @ weight.reshape(M, -1)).view(B, H, W, 12, 12, C)
        out = columns.new_empty(B, H + 1, 8, W + 1, 8, C)
        out[:, :H, :, :W] = columns[:, :, :, :8, :8].transpose(2, 3)
        out[:, H] = 0
        out[:, :H, :, W] = 0
        out[:, 1:, :4, :W] += columns[:, :, :, 8:, :8].transpose(2, 3)  # rows 8 to 11 overlap the next block
        out[:, :H, :, 1:, :4] += columns[:, :, :, :8, 8:].transpose(2, 3)
        out[:, 1:, :4, 1:, :4] += columns[:, :, :, 8:, 8:].transpose(2, 3)
        out = out.view(B, 8 * H + 8, 8 * W + 8, C)[:, 2 : 8 * H + 2, 2 : 8 * W + 2]
        return out + bias.repeat(8 * W, 1)  # whole rows: broadcasting a few channels is slow

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        B, H, W, M = x.shape
        patches = F.pad(grad, (0, 0, 2, 2, 2, 2)).unfold(1, 12, 8).unfold(2, 12, 8)  # (B, H, W, C, 12, 12)
        columns = patches.permute(0, 1, 2, 4, 5, 3).reshape(B * H * W, -1)
        grad_x = (columns @ weight.reshape(M, -1).T).view(B, H, W, M)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (x.reshape(-1, M).T @ columns).view(weight.shape)
        grad_bias = grad.sum(dim=(0, 1, 2)) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class BlockTranspose(nn.Module):
    """Transposed convolution, kernel 12, stride 8, padding 2, as one GEMM and an overlap-add.

    Equal to `nn.ConvTranspose2d`, several times faster on CPUs. `weight` is (in, 12, 12, out).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_channels, 12, 12, out_channels))
        nn.init.normal_(self.weight, std=0.01)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        out = _BlockOverlapAdd.apply(x.permute(0, 2, 3, 1), weight, bias)
        return out.permute(0, 3, 1, 2)  # (B, out, 8H, 8W), channels-last in memory


class _LappedTransform(torch.autograd.Function):
    """The 24×24 convolution of stride 16 and padding 4 as a float32 GEMM; the gradient of its weight as a bfloat16 one.

    For training on CPUs with fast bfloat16, with channels-last x, which gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        B, _, H, W = x.shape
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 4, 4, 4, 4))
        patches = padded.unfold(1, 24, 16).unfold(2, 24, 16).permute(0, 1, 2, 4, 5, 3)  # (B, h, w, 24, 24, 3)
        columns = patches.reshape(B * (H // 16) * (W // 16), -1)
        ctx.save_for_backward(columns.bfloat16())
        y = torch.addmm(bias, columns, weight.permute(0, 2, 3, 1).reshape(len(weight), -1).T)
        return y.view(B, H // 16, W // 16, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        (columns,) = ctx.saved_tensors
        grad = grads[0].permute(0, 2, 3, 1).flatten(0, 2)
        grad_weight = (grad.bfloat16().T @ columns).float().view(-1, 24, 24, 3).permute(0, 3, 1, 2)
        return None, grad_weight, grad.sum(dim=0)


class DepthwiseBlock(nn.Module):
    """x + project(LeakyReLU(expand(depthwise(x)))): a depthwise k×k and two 1×1 convolutions, twice as wide between."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)
        self.project.weight.data.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # on CPUs its backward is far slower in bfloat16
            t = self.depthwise(x.to(self.depthwise.weight.dtype).contiguous(memory_format=torch.channels_last))
        out: Tensor = x + self.project(F.leaky_relu(self.expand(t), 0.1))
        return out


class DepthwiseBranch(nn.Sequential):
    """1×1, depthwise blocks, 1×1: a residual branch at stride 16 that gives zero before it is trained."""

    def __init__(self, i: int, width: int, blocks: int, kernel: int, o: int) -> None:
        super().__init__(
            nn.Conv2d(i, width, 1), *(DepthwiseBlock(width, kernel) for _ in range(blocks)), nn.Conv2d(width, o, 1)
        )
        last: Any = self[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class LiteAnalysis(nn.Module):
    """A learned lapped transform (24×24, stride 16) plus convolutional residuals at stride 8 and 16."""

    def __init__(self, M: int, hidden: int, width: int, blocks: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3, M, 24, stride=16, padding=4)
        self.residual = nn.Sequential(
            nn.PixelUnshuffle(8),
            nn.Conv2d(192, hidden, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(hidden, M, 5, stride=2, padding=2),
        )
        self.deep = DepthwiseBranch(4 * hidden, width, blocks, 5, M) if blocks else None

    def forward(self, x: Tensor) -> Tensor:
        x = x - 0.5
        weight = self.linear.weight
        lapped = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and weight.requires_grad
        with torch.autocast(x.device.type, enabled=False):  # block means need more precision than bfloat16 has
            y = _LappedTransform.apply(x, weight, self.linear.bias) if lapped else self.linear(x)
        features = self.residual[:-1](x)  # (B, hidden, H/8, W/8)
        y = y + self.residual[-1](features)
        return y if self.deep is None else y + self.deep(F.pixel_unshuffle(features, 2))

    def last_layers(self) -> list[Any]:
        """The layers whose outputs add up to y."""
        return [self.linear, self.residual[-1], *([] if self.deep is None else [self.deep[-1]])]


class LiteSynthesis(nn.Module):
    """g_s: residual blocks on ŷ, transposed convolution to half resolution, a residual filter, sub-pixel convolution.

    After the two-layer synthesis of Yang & Mandt 2023 (arXiv 2304.06244). The body at stride 16 works on ŷ divided by
    `unit` (M,), the natural unit of each channel.
    """

    shuffle = 2  # factor of the pixel shuffle at the end

    def __init__(self, M: int, width: int, hidden: int, body_width: int, body_blocks: int) -> None:
        super().__init__()
        self.body = DepthwiseBranch(M, body_width, body_blocks, 3, M) if body_blocks else None
        if self.body is not None:
            self.register_buffer("unit", torch.ones(M))
        self.unit: Tensor
        self.blocks = BlockTranspose(M, width)  # (B, width, H/2, W/2)
        self.filter = nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(hidden, width, 3, padding=1),
        )
        self.pixels = nn.Conv2d(width, 12, 3, padding=1)

    def unshuffled(self, y_hat: Tensor) -> Tensor:
        """The output before the pixel shuffle, (B, 12, H/2, W/2); refinement computes the distortion on it."""
        if self.body is not None:
            unit = self.unit[None, :, None, None]
            y_hat = torch.addcmul(y_hat, self.body(y_hat / unit), unit)
        t = self.blocks(y_hat)
        t = self.filter(t).add_(t)
        return self.pixels(t)

    def forward(self, y_hat: Tensor) -> Tensor:
        return F.pixel_shuffle(self.unshuffled(y_hat), self.shuffle)

    def scale_input(self, gain: Tensor) -> None:
        """Multiply, in place, the input channels by `gain` (M,)."""
        self.blocks.weight.data *= gain.view(-1, 1, 1, 1)
        if self.body is not None:
            self.unit /= gain


def build_lite(a: Architecture) -> Networks:
    def down(i: int, o: int) -> nn.Conv2d:
        return nn.Conv2d(i, o, 5, stride=2, padding=2)

    def up(i: int, o: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(i, o, 5, stride=2, padding=2, output_padding=1)

    wide = 3 * a.inner // 2
    h_a = nn.Sequential(
        nn.Conv2d(a.M, a.inner, 3, padding=1), nn.LeakyReLU(), down(a.inner, a.N), nn.LeakyReLU(), down(a.N, a.N)
    )
    h_s = nn.Sequential(
        up(a.N, a.inner), nn.LeakyReLU(), up(a.inner, wide), nn.LeakyReLU(), nn.Conv2d(wide, 2 * a.M, 1)
    )
    g_a = LiteAnalysis(a.M, a.inner, a.deep_width, a.deep_blocks)
    g_s = LiteSynthesis(a.M, a.width, a.hidden, a.body_width, a.body_blocks)
    return Networks(g_a=g_a, h_a=h_a, h_s=h_s, g_s=g_s)


def dct_basis() -> Tensor:
    """Orthonormal basis images of the 16×16 DCT-II, (256, 16, 16) float64; frequency (i, j) is at index 16·i + j."""
    k = torch.arange(16, dtype=torch.float64)
    rows = torch.cos(math.pi / 16 * (k[None, :] + 0.5) * k[:, None]) * math.sqrt(2 / 16)
    rows[0] /= math.sqrt(2)
    return torch.einsum("iu,jv->ijuv", rows, rows).reshape(256, 16, 16)


def unit_ycbcr() -> Tensor:
    """The matrix RGB → YCbCr (BT.601) with rows of unit norm, (3, 3) float64."""
    matrix = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=torch.float64
    )
    return matrix / matrix.norm(dim=1, keepdim=True)


def start_as_dct(networks: Networks, crops: Tensor) -> Tensor:
    """Initialize g_a and g_s to a 16×16 block DCT in YCbCr, with the M of 768 coefficients that have the most energy.

    Parameters
    ----------
    networks : Networks
        Of family "lite"; changed in place.
    crops : Tensor (B, 3, H, W) float32
        Photographs in 0..1 on which the energies are measured; H and W are multiples of 16.

    Returns
    -------
    Tensor (M,) float32
        Mean absolute value of each latent of the crops.
    """
    g_a, g_s = networks.g_a, networks.g_s
    assert isinstance(g_a, LiteAnalysis)
    assert isinstance(g_s, LiteSynthesis)
    M = g_a.linear.out_channels
    colour, basis = unit_ycbcr(), dct_basis()
    filters = torch.einsum("pc,kuv->pkcuv", colour, basis).reshape(768, 3, 16, 16).float()
    energy = F.conv2d(crops - 0.5, filters, stride=16).square().mean(dim=(0, 2, 3))
    keep = torch.argsort(energy, descending=True)[:M]

    linear: Any = g_a.linear
    linear.weight.data = F.pad(filters[keep], (4, 4, 4, 4))
    linear.bias.data.zero_()
    last: Any = g_a.residual[-1]
    last.weight.data.zero_()
    last.bias.data.zero_()

    images = torch.einsum("cp,kuv->pkuvc", torch.linalg.inv(colour), basis).reshape(768, 16, 16, 3)[keep]
    phases = images.view(M, 8, 2, 8, 2, 3).permute(0, 1, 3, 5, 2, 4).reshape(M, 8, 8, 12).float()
    g_s.blocks.weight.data.mul_(0.1)
    g_s.blocks.weight.data[..., :12] = 0
    g_s.blocks.weight.data[:, 2:10, 2:10, :12] = phases
    last = g_s.filter[-1]
    last.weight.data.zero_()
    last.bias.data.zero_()
    pixels: Any = g_s.pixels
    pixels.weight.data.mul_(0.1)
    pixels.weight.data[:, :12] = 0
    pixels.weight.data[range(12), range(12), 1, 1] = 1
    pixels.bias.data.fill_(0.5)
    y_unit = F.conv2d(crops - 0.5, filters[keep], stride=16).abs().mean(dim=(0, 2, 3))
    if g_s.body is not None:
        g_s.unit.copy_(y_unit)
    return y_unit
