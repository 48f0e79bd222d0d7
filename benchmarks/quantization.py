"""Loss of rate and distortion through integer arithmetic, and sizes of files against the estimated rate.

    python benchmarks/quantization.py IMAGES...

The same y and z of the encoder networks are rounded and coded under the same integer tables, once with the entropy
parameters of the integer networks and once with those of the float ones (whose files would not decode on another
machine). Prints the change of the bits and of λ·255²·MSE + bpp, in per cent, at the six anchor λ; then by how much the
sizes of files with these y and z (rounded to the nearest integers, without a dead zone), and of z and y in them, exceed
the rate that the floating-point densities estimate, in per cent: the mean over the images and the largest.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sgacodec import Codec, bitstream
from sgacodec.coding.hyper_decoder import MU_BITS
from sgacodec.coding.tables import scale_thresholds
from sgacodec.density import bits, gaussian_bits
from sgacodec.hyperprior import code_rounded
from sgacodec.image import read_image
from sgacodec.latents import Latents, code_length, pack, quantize, render
from sgacodec.models.level import LevelModel
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.settings import ANCHORS, Settings


@torch.no_grad()
def float_latents(level: LevelModel, exact: Candidate) -> tuple[Latents, torch.Tensor, float]:
    """Symbols of the same y and z with the parameters of the float networks, in the order of the passes; ŷ; bits."""
    quantized = quantize(level, exact.y, exact.z)
    z_hat = quantized.z + level.folded.density.median[None, :, None, None]
    y, sigma, y_hat = (v.view(1, 1, 1, -1) if v.ndim == 2 else v for v in code_rounded(level.folded, exact.y, z_hat))
    index = torch.bucketize(sigma.double().log(), torch.from_numpy(scale_thresholds()))
    estimate = gaussian_bits(y, sigma).double().sum() + bits(level.folded.density.likelihood(z_hat)).double().sum()
    return replace(quantized, y=y.to(torch.int32), index=index.to(torch.uint8)), y_hat, float(estimate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--model", default="lite")
    arguments = parser.parse_args()
    codec = Codec(arguments.model, device="cpu")
    print(
        f"{'lambda':>8} {'bits, exact against float':>26} {'R-D loss':>10}"
        f" {'file against estimate':>25} {'z and y against estimate':>25}"
    )
    for lmbda in ANCHORS:
        level = codec.levels.for_encoding(Settings(lmbda=lmbda, method="none"))
        rows = []
        for path in arguments.images:
            picture = read_image(path)
            problem = Problem.of(level, picture, None, lmbda, "mse")
            exact = problem.start()
            floating, y_hat, estimate = float_latents(level, exact)
            spent = code_length(level, floating)
            mu = torch.round(y_hat * 2**MU_BITS).to(torch.int32)
            shown = render(level, replace(floating, y=torch.zeros_like(mu), mu=mu), *problem.original.shape[:2])
            error = torch.from_numpy(shown).double() - torch.from_numpy(problem.original).double()
            loss = lmbda * float(error.square().mean()) + spent / problem.pixels
            (encoded,) = codec.encode([picture], Settings(lmbda=lmbda, method="none"))
            file, payload = bitstream.read(encoded.data), pack(level, exact.y, exact.z)
            coded, overhead = len(payload.z) + len(payload.y), len(encoded.data) - len(file.z) - len(file.y)
            sizes = 8 * (coded + overhead) / estimate, 8 * coded / estimate
            rows.append((exact.bits, spent, exact.loss, loss, *sizes))
        table = np.array(rows)
        exact_bits, float_bits, exact_loss, float_loss = table[:, :4].sum(0)
        print(
            f"{lmbda:8g} {100 * (exact_bits / float_bits - 1):+25.3f}% {100 * (exact_loss / float_loss - 1):+9.3f}%"
            + "".join(f" {100 * (v.mean() - 1):+12.3f}%, {100 * (v.max() - 1):+9.3f}%" for v in table[:, 4:].T)
        )


if __name__ == "__main__":
    main()
