"""sgacodec: a neural image codec with latent refinement (SGA+). `import sgacodec` loads nothing heavy."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Codec", "Decoded", "Encoded", "Settings", "__version__", "decode", "encode"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
