"""Loss of rate and distortion through the quantization of hyper-decoder and context model to integers.

    python benchmarks/quantization.py IMAGES...

The same y and z of the encoder networks are rounded and coded under the same integer tables, once with the entropy
parameters of the integer networks and once with those of the float ones (whose files would not decode on another
machine). Prints the change of the bits and of λ·255²·MSE + bpp, in per cent, at the six anchor λ.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from sgacodec.coding.hyper_decoder import MU_BITS
from sgacodec.coding.tables import scale_thresholds
from sgacodec.hyperprior import code_rounded
from sgacodec.image import read_image
from sgacodec.latents import Latents, code_length, quantize, render
from sgacodec.models.catalogue import find_model
from sgacodec.models.file import read_model
from sgacodec.models.level import LevelModel
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.settings import ANCHORS


@torch.no_grad()
def float_latents(level: LevelModel, exact: Candidate) -> tuple[Latents, torch.Tensor]:
    """Symbols in the order of the passes, and ŷ, of the same y and z with the parameters of the float networks."""
    quantized = quantize(level, exact.y, exact.z)
    z_hat = quantized.z + level.folded.density.median[None, :, None, None]
    y, sigma, y_hat = (v.view(1, 1, 1, -1) if v.ndim == 2 else v for v in code_rounded(level.folded, exact.y, z_hat))
    index = torch.bucketize(sigma.double().log(), torch.from_numpy(scale_thresholds()))
    return replace(quantized, y=y.to(torch.int32), index=index.to(torch.uint8)), y_hat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--model", default="lite")
    arguments = parser.parse_args()
    model = read_model(find_model(arguments.model))
    print(f"{'lambda':>8} {'bits, exact against float':>26} {'R-D loss':>10}")
    for lmbda in ANCHORS:
        level = model.at(model.level_for(lmbda))
        bits, losses = [0.0, 0.0], [0.0, 0.0]
        for path in arguments.images:
            problem = Problem.of(level, read_image(path), None, lmbda, "mse")
            exact = problem.start()
            floating, y_hat = float_latents(level, exact)
            spent = code_length(level, floating)
            mu = torch.round(y_hat * 2**MU_BITS).to(torch.int32)
            shown = render(level, replace(floating, y=torch.zeros_like(mu), mu=mu), *problem.original.shape[:2])
            error = torch.from_numpy(shown).double() - torch.from_numpy(problem.original).double()
            loss = lmbda * float(error.square().mean()) + spent / problem.pixels
            bits = [bits[0] + exact.bits, bits[1] + spent]
            losses = [losses[0] + exact.loss, losses[1] + loss]
        print(f"{lmbda:8g} {100 * (bits[0] / bits[1] - 1):+25.3f}% {100 * (losses[0] / losses[1] - 1):+9.3f}%")


if __name__ == "__main__":
    main()
