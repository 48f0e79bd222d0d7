"""The stages of training: what a batch consists of, and its losses.

joint    crops ─► g_a, h_a ─► rate and distortion                     everything is trained
prior    windows of cached y₀ ─► h_a ─► rate                          h_a, h_s, density, context; gains of z
decoder  crops ─► g_a, h_a ─► SGA (refined.py) ─► rate and distortion   g_s, h_s, density, context; decoder gains of y

`recipe.FROZEN` lists what a stage does not train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cached import CachedLatents
from .checkpoint import State
from .crops import Crops
from .objective import Losses, forward, forward_decoder, forward_prior, lambdas
from .refined import refine_latents

Source = Crops | CachedLatents


def source_of(state: State, images: list[Tensor], device: torch.device) -> Source:
    """What the batches of a run are drawn from; for stage "prior", the latents of all images (3, H, W) uint8."""
    recipe = state.recipe
    if recipe.stage == "prior":
        return CachedLatents(state.model, images, max(recipe.crop, recipe.final_crop), recipe.bf16, device)
    return Crops(images, device)


def stage_losses(state: State, batch: Tensor, anchor: Tensor) -> Losses:
    """The losses of a batch of the stage's source, images or latents, each at an anchor λ (B,)."""
    recipe, model = state.recipe, state.model
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
        if recipe.stage == "prior":
            return forward_prior(model, batch, anchor, state.noise, recipe.compile)
        if recipe.stage == "decoder":
            lmbda = lambdas(model, anchor)
            sent = refine_latents(state.ema, batch, anchor, lmbda, recipe.refine_steps, state.noise)
            return forward_decoder(model, batch, anchor, sent, recipe.compile)
        return forward(model, batch, anchor, state.noise, recipe.compile)
