"""The stages of training: what a batch consists of, and its losses.

joint    crops ─► g_a, h_a ─► rate and distortion         everything is trained
prior    windows of cached y₀ ─► h_a ─► rate              h_a, h_s, density, context; gains of z
decoder  crops ─► g_a, h_a ─► steps (refined.py) ─► rate and distortion   g_s, h_s, density, context, decoder gains
         crops ─► g_a, h_a ─► rate and distortion                          those and g_a, h_a

`recipe.FROZEN` lists what a stage does not train.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .cached import CachedLatents
from .checkpoint import State
from .crops import Crops
from .objective import Losses, forward, forward_decoder, forward_prior, refined_lambdas
from .refined import refine_latents

_REUSE = 8  # steps in which a refined crop is used, in the mean

Source = Crops | CachedLatents


def source_of(state: State, images: list[Tensor], device: torch.device) -> Source:
    """What the batches of a run are drawn from; for stage "prior", the latents of all images (3, H, W) uint8."""
    recipe = state.recipe
    if recipe.stage == "prior":
        return CachedLatents(state.model, images, max(recipe.crop, recipe.final_crop), recipe.bf16, device)
    return Crops(images, device)


def stage_losses(state: State, batch: Tensor, anchor: Tensor) -> tuple[Losses, Tensor]:
    """The losses of a batch of the stage's source, images or latents, each at an anchor λ (B,).

    Returns
    -------
    Losses, Tensor (B,) int64
        The losses, and the anchors of their `bpp` and `mse`: in stage "decoder", those of refined crops of the pool.
    """
    recipe, model = state.recipe, state.model
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
        if recipe.stage == "prior":
            return forward_prior(model, batch, anchor, state.noise, recipe.compile), anchor
        if recipe.stage == "decoder":
            return _decoder_losses(state, batch, anchor)
        return forward(model, batch, anchor, state.noise, recipe.compile, recipe.dead_zone), anchor


def _decoder_losses(state: State, x: Tensor, anchor: Tensor) -> tuple[Losses, Tensor]:
    """The losses of the decoder on refined crops, plus a part of that of everything on a part of x, unrefined."""
    recipe, model = state.recipe, state.model
    new = slice(0, max(1, len(x) // _REUSE) if len(state.pool) >= len(x) else len(x))
    lmbda = refined_lambdas(model, anchor[new])
    sent = refine_latents(state.ema, x[new], anchor[new], lmbda, recipe.refine_steps, state.noise)
    state.pool.add(x[new], anchor[new], sent)
    crops, own, sent = state.pool.draw(len(x), seed=state.step)
    refined = forward_decoder(model, crops, own, refined_lambdas(model, own), sent, recipe.compile)
    if not recipe.unrefined:
        return refined, own
    part = slice(0, max(1, len(x) // 2))
    unrefined = forward(model, x[part], anchor[part], state.noise, recipe.compile, recipe.dead_zone)
    return replace(refined, loss=refined.loss + recipe.unrefined * unrefined.loss), own
