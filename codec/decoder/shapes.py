"""The tensors of the synthesis transforms."""

from __future__ import annotations

from ..networks.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]


def synthesis_shapes(architecture: Architecture) -> Shapes:
    """The shape of each tensor of g_s, by its name there."""
    return _lite(architecture) if architecture.family == "lite" else _mshyper(architecture.N, architecture.M)


def _lite(a: Architecture) -> Shapes:
    shapes: Shapes = {"blocks.weight": (a.M, 12, 12, a.width), "blocks.bias": (a.width,)}
    convolutions = [("filter.0", a.width, a.hidden, 3), ("filter.2", a.hidden, a.width, 3), ("pixels", a.width, 12, 3)]
    if a.body_blocks:
        body = a.body_width
        shapes["unit"] = (a.M,)
        convolutions += [("body.0", a.M, body, 1), (f"body.{a.body_blocks + 1}", body, a.M, 1)]
        for i in range(1, a.body_blocks + 1):
            shapes |= {f"body.{i}.depthwise.weight": (body, 1, 3, 3), f"body.{i}.depthwise.bias": (body,)}
            convolutions += [(f"body.{i}.expand", body, 2 * body, 1), (f"body.{i}.project", 2 * body, body, 1)]
    for name, inputs, outputs, side in convolutions:
        shapes |= {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}
    return shapes


def _mshyper(N: int, M: int) -> Shapes:
    shapes: Shapes = {}
    for i, (inputs, outputs) in enumerate(((M, N), (N, N), (N, N), (N, 3))):
        shapes |= {f"{2 * i}.weight": (inputs, outputs, 5, 5), f"{2 * i}.bias": (outputs,)}
    for i in (1, 3, 5):
        shapes |= {f"{i}.gamma": (N, N), f"{i}.beta": (N,)}
        for kind in ("gamma", "beta"):
            shapes |= {f"{i}.{kind}_reparam.pedestal": (1,), f"{i}.{kind}_reparam.lower_bound.bound": (1,)}
    return shapes
