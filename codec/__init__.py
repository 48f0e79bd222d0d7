"""sgacodec: a neural image codec with latent refinement (SGA+). `import sgacodec` loads nothing heavy."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Codec", "Decoded", "Encoded", "Picture", "Settings", "__version__", "decode", "encode"]

_MODULES = {"Decoded": "reading", "Picture": "picture", "Settings": "settings", "decode": "decoding"}  # without torch


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_MODULES.get(name, 'api')}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = f"{__name__}.{name} needs torch, which is not installed: pip install sgacodec"
        raise ModuleNotFoundError(message, name="torch") from None
