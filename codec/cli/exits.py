"""Exit codes, and error messages of one line."""

from __future__ import annotations

import os

import click

DONE = 0
FAILED = 1  # an input could not be read, encoded, decoded or written
# 2 is click's, for wrong usage
BAD_FILE = 3  # not a valid .sga file, or damaged
NO_MODEL = 4  # model not found, or damaged
INTERRUPTED = 130  # 128 + SIGINT

# What to install for packages that decoding does without.
_INSTALL = dict.fromkeys(("torch", "matplotlib", "bjontegaard", "pytorch_msssim", "rich"), "sgacodec")
_INSTALL["compressai"] = "'sgacodec[compressai]'"


def debugging() -> bool:
    """Whether errors are shown as tracebacks (SGACODEC_DEBUG=1)."""
    return os.environ.get("SGACODEC_DEBUG", "0") not in ("", "0")


def exit_code(error: Exception) -> int:
    """Exit code of an exception."""
    from ..bitstream import FormatError
    from ..models.catalogue import ModelError, ModelNotFoundError

    if isinstance(error, FormatError):
        return BAD_FILE
    return NO_MODEL if isinstance(error, (ModelError, ModelNotFoundError)) else FAILED


def combined(codes: list[int]) -> int:
    """Exit code of several inputs: that of the failures if all have the same, else 1."""
    kinds = set(codes) - {DONE}
    return DONE if not kinds else kinds.pop() if len(kinds) == 1 else FAILED


def one_line(error: BaseException) -> str:
    """The message of an exception, as one line for the user."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name in _INSTALL:
        return f"this needs {error.name}, which is not installed here: pip install {_INSTALL[error.name]}"
    text = " ".join(str(error).split())
    meant = isinstance(error, (click.ClickException, ValueError, LookupError, OSError))
    if text and meant and not isinstance(error, (KeyError, IndexError)):
        return text
    return f"internal error: {type(error).__name__}: {text} (SGACODEC_DEBUG=1 shows where)"


def named(name: str, error: BaseException) -> str:
    """The message of an exception about an input or output, as one line that begins with its name, once."""
    text = one_line(error)
    file, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, None)
    if reason and isinstance(file, str) and os.path.abspath(file) == os.path.abspath(name):
        return f"{name}: {reason}"
    for written in (name, " ".join(name.split())):
        text = text.removeprefix(f"{written}: ")
    return f"{name}: {text}"
