"""Loss of rate and distortion through the quantisation of the hyper-decoder to integers.

    python benchmarks/quantisation.py IMAGES...

The same y and z of the encoder networks are rounded and coded under the same integer tables, once with the entropy
parameters of the integer hyper-decoder and once with those of the float one (whose files would not decode on another
machine). Prints the change of the bits and of λ·255²·MSE + bpp, in per cent, at the six anchor λ.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from sgacodec.coding.hyper_decoder import MU_BITS
from sgacodec.coding.tables import scale_thresholds
from sgacodec.image import read_image
from sgacodec.latents import Latents, code_length, quantize, render
from sgacodec.models.catalogue import find_model
from sgacodec.models.file import read_model
from sgacodec.models.level import LevelModel
from sgacodec.refine.problem import Candidate, Problem
from sgacodec.settings import ANCHORS


@torch.no_grad()
def float_latents(level: LevelModel, exact: Candidate) -> tuple[Latents, torch.Tensor]:
    """Integers and ŷ of the same y and z with the entropy parameters of the float hyper-decoder."""
    quantized = quantize(level, exact.y, exact.z)
    median = level.folded.density.median[None, :, None, None]
    scale, mu = level.folded.networks.h_s(quantized.z + median).chunk(2, 1)
    log_sigma = scale if level.folded.architecture.scale == "exp" else torch.log(scale.clamp(min=1e-9))
    index = torch.bucketize(log_sigma.double().contiguous(), torch.from_numpy(scale_thresholds()))
    y = torch.round(exact.y - mu)
    return replace(quantized, y=y.to(torch.int32), index=index.to(torch.uint8)), y + mu


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
            # ŷ of the float hyper-decoder, rounded to the fractional bits of μ
            mu = torch.round((y_hat - floating.y) * 2**MU_BITS).to(torch.int32)
            shown = render(level, replace(floating, mu=mu), *problem.original.shape[:2])
            error = torch.from_numpy(shown).double() - torch.from_numpy(problem.original).double()
            loss = lmbda * float(error.square().mean()) + spent / problem.pixels
            bits = [bits[0] + exact.bits, bits[1] + spent]
            losses = [losses[0] + exact.loss, losses[1] + loss]
        print(f"{lmbda:8g} {100 * (bits[0] / bits[1] - 1):+25.3f}% {100 * (losses[0] / losses[1] - 1):+9.3f}%")


if __name__ == "__main__":
    main()
